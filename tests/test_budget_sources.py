"""Budgets that follow resources: what is asked when, what is kept, deadlines and rates by a clock that only work moves."""

import functools
import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_anee.budget_sources import BudgetSource, Deadline, Joules, Meter, Passed, Progress, TokensPerSecond, budget_for
from modeling_anee.energy_counters import Counter

from .clocks import passes_with_cost
from .fakes import fewer
from .tiny import BRIDGES, CONTROLLERS, tiny_base, token_ids, wrap


NEW = 40


def mode(new_tokens=NEW, **more):
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    return {**lengths, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, **more}


@dataclass
class Machine:
    """A token takes `overhead` seconds and as many as it costs, `slow` times as long from `slow_at` on."""

    overhead: float = 0.3
    slow_at: float = float("inf")
    slow: float = 1.0
    now: float = 0.0

    def run(self, cost: float) -> None:
        self.now += (self.overhead + cost) * (self.slow if self.now >= self.slow_at else 1.0)


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    passes_with_cost(monkeypatch, lambda: made.now, lambda cost: made.run(float(cost[:, -1].mean())))
    return made


@functools.cache
def dial():
    """A model whose realised cost is its budget, nearly."""
    return wrap(keep_first_tokens=0, precisions=["int8", "int4"])


def falling(progress):
    """A budget for each token that can be told from all others."""
    return 1.0 - 0.01 * progress.tokens


@pytest.mark.parametrize("kind", CONTROLLERS)
@torch.no_grad()
def test_scoring_a_generation_with_its_budgets_gives_its_logits(kind):
    model = wrap(controller=kind, exit_layers=[2], **BRIDGES)
    waves = itertools.cycle([0.9, 0.5, 0.3, 1.0, 0.6])
    output = model.generate(token_ids(2, 6), energy_budget=lambda progress: next(waves), **mode(12))
    budgets = output.execution.budget
    scored = model(output.sequences[:, :-1], energy_budget=budgets)
    assert budgets.shape == (2, 17) and budgets[0, 5:].tolist() == [0.9, 0.5, 0.3, 1.0, 0.6, 0.9, 0.5, 0.3, 1.0, 0.6, 0.9, 0.5]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), scored.logits[:, 5:], atol=1e-4, rtol=1e-4)
    assert torch.equal(scored.execution.actions, output.execution.actions)


def test_every_token_is_asked_about_once_and_the_trace_keeps_what_was_said():
    asked = []

    def source(progress):
        asked.append(progress)
        return falling(progress)

    output = dial().generate(token_ids(1, 5), energy_budget=source, guidance_scale=1.5, **mode(8))
    assert [progress.tokens for progress in asked] == list(range(8)) and {progress.limit for progress in asked} == {8}
    assert output.execution.budget[0].tolist() == [1.0] * 5 + [falling(progress) for progress in asked[1:]]
    assert asked[0].budget == 1.0 and asked[-1].budget == falling(asked[-2]) and asked[-1].left == 1


def test_what_the_tokens_before_took_and_cost_is_told(machine):
    last = []

    def source(progress):
        last.append(Progress(**{**vars(progress), "history": tuple(progress.history)}))
        return falling(progress)

    output = dial().generate(token_ids(1, 5), energy_budget=source, **mode(8))
    first, progress = last[0], last[-1]
    assert (first.seconds, first.tokens, first.history) == (0.0, 0, ()) and progress.seconds == machine.now - 0.3 - cost_of(
        output, -1
    )
    assert progress.prompt_seconds == pytest.approx(0.3 + cost_of(output, 4))
    assert [passed.budget for passed in progress.history] == [falling(progress) for progress in last[1:-1]]
    for place, passed in enumerate(progress.history):
        assert passed.cost == pytest.approx(cost_of(output, 5 + place)) and passed.tokens == 1
        assert passed.seconds == pytest.approx(0.3 + passed.cost)
    assert progress.work == pytest.approx(sum(passed.cost for passed in progress.history))


def cost_of(output, token):
    return float(output.execution.cost[0, token])


@pytest.mark.parametrize("slow", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("kind", ["plan", "budget"])
def test_a_deadline_is_met_though_the_machine_becomes_slower_on_the_way(machine, slow, kind):
    model = wrap(controller=kind, keep_first_tokens=0, precisions=["int8", "int4"])
    seconds = NEW * (0.3 + 1.0) * 0.95
    machine.slow_at, machine.slow = seconds / 2, slow
    output = model.generate(token_ids(1, 5), energy_budget=Deadline(seconds), **mode())
    assert machine.now == pytest.approx(seconds, rel=0.05)
    budgets = output.execution.budget[0, 5:]
    before, after = budgets[: NEW // 2].mean(), budgets[NEW // 2 :].mean()
    assert len(budgets.unique()) > 3 and (slow == 1.0 or before > after + 0.1)


def test_what_cannot_be_reached_is_not_asked_for():
    output = dial().generate(token_ids(1, 5), energy_budget=Deadline(1e-9), **mode(8))
    assert set(output.execution.budget[0, 6:].tolist()) == {dial().controller.floor}


def test_a_deadline_that_is_never_near_costs_no_quality_and_one_that_is_past_the_least():
    for seconds, budget in ((1e9, 1.0), (1e-9, 0.2)):
        output = dial().generate(token_ids(1, 5), energy_budget=Deadline(seconds, lowest=0.2), **mode(8))
        assert set(output.execution.budget[0, 6:].tolist()) == {budget}


def test_a_deadline_of_fewer_tokens_than_may_come(machine):
    seconds = 20 * (0.3 + 0.6)
    ids, ends = token_ids(1, 5), lambda ids, scores: torch.tensor([ids.shape[1] >= 25])
    limits = mode(25, max_new_tokens=500, stopping_criteria=[ends])
    output = dial().generate(ids, energy_budget=Deadline(seconds, tokens=20), **limits)
    assert output.sequences.shape[1] == 25 and machine.now == pytest.approx(seconds, rel=0.05)


@pytest.mark.parametrize("rate", [0.9, 1.2, 1.5])
def test_a_rate_is_kept_over_the_generation(machine, rate):
    machine.slow_at, machine.slow = 25.0, 1.2
    told = []
    output = dial().generate(token_ids(1, 30), energy_budget=Noting(TokensPerSecond(rate), told), **mode(60))
    progress = told[-1]
    assert (progress.tokens - 1) / (progress.seconds - progress.prompt_seconds) == pytest.approx(rate, rel=0.05)
    assert output.execution.mean_cost < 1.0


class Noting(BudgetSource):
    """Another source, and what it was told."""

    def __init__(self, source, told):
        self.source, self.told = source, told

    def begin(self, model):
        ask = self.source.begin(model)

        def noting(progress):
            self.told.append(progress)
            return ask(progress)

        return noting


def test_joules_that_are_counted(machine):
    """Of 2 joules a second."""
    output = dial().generate(token_ids(1, 5), energy_budget=Joules(70.0, read=lambda: 100.0 + 2.0 * machine.now), **mode())
    assert 2.0 * machine.now == pytest.approx(70.0, rel=0.05)
    assert len(output.execution.budget.unique()) > 2


def test_joules_that_are_modelled():
    output = dial().generate(token_ids(1, 5), energy_budget=Joules(NEW * 0.55 * 3.0, full=3.0), **mode())
    assert float(output.execution.cost[0, 5:].sum()) * 3.0 == pytest.approx(NEW * 0.55 * 3.0, rel=0.05)


def test_a_machine_without_counters_says_so(monkeypatch):
    monkeypatch.setattr("modeling_anee.budget_sources.find_counters", lambda devices: ([], ["no RAPL counters"], ""))
    with pytest.raises(ValueError, match=r"Joules\(total=5\) is not possible on this machine: no RAPL counters. Give read"):
        dial().generate(token_ids(1, 5), energy_budget=Joules(5.0), **mode(3))


def test_counters_that_start_again_are_added_up():
    values = iter([90, 95, 5, 8])
    meter = Meter([Counter("CPU", lambda: next(values), 0.5, wraps_at=100)])
    assert [meter(), meter(), meter()] == [2.5, 7.5, 9.0]


@fewer
@given(st.lists(st.tuples(st.floats(0.05, 1.0), st.floats(1e-3, 10.0)), min_size=1, max_size=30), st.floats(1e-3, 20.0))
def test_more_time_for_a_token_never_means_a_lower_budget(steps, seconds):
    history = [Passed(1, cost, cost, took) for cost, took in steps]
    progress = Progress(0.0, 0.0, 1, 2, 1.0, 0.0, history)
    assert budget_for(progress, seconds) <= budget_for(progress, seconds * 1.1)
    slower = Progress(0.0, 0.0, 1, 2, 1.0, 0.0, [Passed(1, one.budget, one.cost, 2 * one.seconds) for one in history])
    assert budget_for(slower, seconds) <= budget_for(progress, seconds)


def test_rows_may_have_budgets_of_their_own():
    output = dial().generate(token_ids(2, 5), energy_budget=lambda progress: [0.5, 1.0], **mode(6))
    assert output.execution.budget[0].unique().tolist() == [0.5] and output.execution.budget[1].unique().tolist() == [1.0]


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"use_cache": True}])
def test_beams_samples_and_a_prompt_of_its_own_budget(how):
    output = dial().generate(token_ids(2, 5), energy_budget=falling, prompt_energy_budget=0.7, **(mode(8) | how))
    expected = [0.7] * 5 + [1.0 - 0.01 * tokens for tokens in range(1, 8)]
    for row in output.execution.budget.tolist():
        assert row == expected


def test_an_assistant_decides_for_itself():
    ids, said = token_ids(1, 5), []

    def source(progress):
        said.append(progress.tokens)
        return 0.6

    output = dial().generate(ids, energy_budget=source, assistant_model=wrap(tiny_base(seed=1)), **mode(12))
    assert said == sorted(set(said)) and set(output.execution.budget.flatten().tolist()) == {0.6}


@pytest.mark.parametrize("said", [1.5, -0.1, float("nan"), None, "much", True, [0.5, 0.5], torch.full((1, 5), 0.5)])
def test_what_is_no_budget_is_refused(said):
    with pytest.raises(ValueError, match="energy_budget of <"):
        dial().generate(token_ids(1, 5), energy_budget=lambda progress: said, **mode(3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_cache": False}, "use_cache=False"),
        ({"budget_feedback": 0.5}, "budget_feedback is not possible with energy_budget="),
        ({"capacity": 0.5}, "capacity=0.5 and energy_budget="),
    ],
)
def test_what_does_not_go_with_a_source_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dial().generate(token_ids(1, 5), energy_budget=Deadline(1.0), **mode(3, **fields))


def test_only_generate_asks():
    model, ids = dial(), token_ids(1, 5)
    for call in (model, functools.partial(model.generate, max_new_tokens=2, prompt_energy_budget=Deadline(1.0))):
        with pytest.raises(ValueError, match="is not allowed here: only energy_budget of generate"):
            call(ids, energy_budget=Deadline(1.0))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Deadline(0.0), "seconds=0.0"),
        (lambda: Deadline("soon"), "seconds='soon'"),
        (lambda: Deadline(1.0, tokens=0), "tokens=0"),
        (lambda: Deadline(1.0, lowest=1.5), "lowest=1.5"),
        (lambda: Deadline(1.0, lowest=0.6, highest=0.5), "lowest=0.6"),
        (lambda: TokensPerSecond(float("inf")), "rate=inf"),
        (lambda: Joules(-1.0), "total=-1.0"),
        (lambda: Joules(1.0, full=0), "full=0"),
        (lambda: Joules(1.0, read=lambda: 0.0, full=1.0), "read and full=1.0"),
    ],
)
def test_bad_settings_are_refused_by_name(make, name):
    with pytest.raises(ValueError, match=name):
        make()


def test_a_source_may_serve_many_generations(machine):
    deadline, taken = Deadline(NEW * 1.0), []
    for _ in range(2):
        begun = machine.now
        dial().generate(token_ids(1, 5), energy_budget=deadline, **mode())
        taken.append(machine.now - begun)
    assert taken == pytest.approx([NEW, NEW], rel=0.05)
