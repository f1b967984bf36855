"""Timing: cases in turn, and decoding without its prompt, by a clock that nothing real moves."""

import pytest
import torch

from modeling_anee.timing import TokenClock, decode_seconds, greedy, interleave, ratios, seconds_of

from .tiny import tiny_base, token_ids, wrap


def test_seconds_are_those_of_the_call(clock):
    def wait(seconds):
        clock[0] += seconds

    assert seconds_of(lambda: wait(3.0)) == 3.0 and seconds_of(lambda: None) == 0.0


def test_cases_run_in_turn_after_a_round_that_does_not_count():
    calls = []
    cases = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert interleave(cases, 2) == {"a": [3, 5], "b": [4, 6]}
    assert calls == list("ababab")


def test_ratios_say_how_much_faster_a_case_is():
    assert ratios([4.0, 6.0], [2.0, 6.0]) == [2.0, 1.0]


@pytest.mark.parametrize("rows", [1, 2])
def test_decoding_is_timed_from_the_first_new_token_to_the_last(clock, rows):
    """The prompt is in full, the new tokens are cheaper."""
    model = wrap(tiny_base(), plans=["PSSP"], keep_first_tokens=0)
    plan = model.controller.floor
    inputs = {"input_ids": token_ids(rows, 9), "attention_mask": torch.ones(rows, 9, dtype=torch.int64)}
    seconds = decode_seconds(model, inputs, new_tokens=5, energy_budget=plan, prompt_energy_budget=1.0)
    assert seconds == pytest.approx(plan) and clock[0] == pytest.approx(9 + 4 * plan)


def test_several_tokens_that_come_at_once_count_as_many(clock):
    timer = TokenClock()
    for seconds, tokens in enumerate([torch.zeros(1, 7), torch.zeros(1), torch.zeros(1, 3), torch.zeros(1)]):
        clock[0] = float(seconds)
        timer.put(tokens)
    timer.end()
    assert timer.seconds_per_token == 2.0 / 4


def test_greedy_decodes_so_many_tokens_even_past_the_end():
    model = wrap(tiny_base())
    model.generation_config.eos_token_id = list(range(1, 60))
    assert model.generate(token_ids(1, 4), **greedy(6)).shape == (1, 10)
