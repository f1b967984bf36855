"""A target speedup as a default budget: for every controller, by a clock that only costs move."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_anee import AneeForCausalLM
from modeling_anee.speed_search import STEP, TargetNotReached
from modeling_anee.target_speedup import check_target, marks_of

from .tiny import BRIDGES, CONTROLLERS, tiny_base, token_ids, wrap
from .workshop import tiny_tokenizer


# What makes the mean cost of a kind follow its budget.
FIELDS = {kind: {"keep_first_tokens": 0, **BRIDGES} for kind in CONTROLLERS}
FIELDS["learned"] |= {"calibration": {"budgets": [0.4, 1.0], "settings": [60.0, -60.0]}}
FIELDS["confidence"] = {"calibration": {"budgets": [0.4, 1.0], "settings": [1.0, 0.4]}, "exit_layers": [1, 2]}
FEW = {"new_tokens": 8, "rounds": 1}
MODE = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}


@pytest.mark.parametrize("kind", CONTROLLERS)
def test_the_budget_that_is_found_is_the_default_and_reaches_the_target(clock, kind):
    model = wrap(tiny_base(), kind, **FIELDS[kind])
    inputs = tiny_tokenizer()("w5 w6 w7 w8 w9", return_tensors="pt")
    found = model.set_target_speedup(1.2, inputs, new_tokens=16, rounds=1)
    assert found.budget == model.config.energy_budget and model.controller.floor <= found.budget < 1.0
    assert (found.budget, found.speedup) == found.tried[-1] and found.speedup >= 1.2
    again, given = (model.generate(**inputs, **MODE, **budget) for budget in ({}, {"energy_budget": found.budget}))
    assert torch.equal(again.sequences, given.sequences) and torch.equal(again.execution.actions, given.execution.actions)
    assert again.execution.mean_cost < 1.0


@pytest.mark.parametrize("precisions", [None, ["int8", "int4"]])
def test_the_highest_budget_is_found(clock, precisions):
    """Costs move the clock, so a target of 1.6 is a budget of 1 / 1.6, as near as a few tokens are to their mean."""
    model = wrap(tiny_base(), precisions=precisions, keep_first_tokens=0)
    found = model.set_target_speedup(1.6, new_tokens=50, rounds=1)
    assert 1 / 1.6 / STEP**2 < found.budget < 1 / 1.6 * STEP


def test_whole_plans_are_tried_as_they_are():
    kinds = {kind: wrap(precisions=["int8"], plans=["4*INT8 / int8"], controller=kind) for kind in ("plan", "routed", "gated")}
    floor = kinds["plan"].controller.floor
    for model in kinds.values():
        assert set(marks_of(model.controller)) == {model.controller.floor, floor, 1.0}
    learned = wrap(tiny_base(), "learned").controller
    assert marks_of(learned) == [learned.floor, 1.0]


def test_a_target_of_one_is_budget_one_without_a_measurement(clock):
    model = wrap(tiny_base(), energy_budget=0.7)
    assert model.set_target_speedup(1).budget == model.config.energy_budget == 1.0 and clock == [0.0]


def test_the_default_is_saved_with_the_model_and_one_of_the_generation_config_follows_it(clock, tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    model = AneeForCausalLM.from_base(tmp_path / "base", controller="plan")
    for name in ("own", "generation"):
        budget = model.set_target_speedup(1.2, **FEW).budget
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert loaded.config.energy_budget == budget
        costs = [one.generate(token_ids(1), **MODE).execution.mean_cost for one in (model, loaded)]
        assert costs[0] == costs[1] == model.generate(token_ids(1), **MODE, energy_budget=budget).execution.mean_cost
        expected = None if name == "own" else budget
        assert getattr(loaded.generation_config, "energy_budget", None) == expected
        model.generation_config.energy_budget = 0.9


def test_a_capacity_of_the_generation_config_gives_way(clock):
    model = wrap(controller="gated", keep_first_tokens=0)
    model.generation_config.capacity = 0.9
    budget = model.set_target_speedup(1.1, **FEW).budget
    cost = model.generate(token_ids(1), **MODE).execution.mean_cost
    assert cost == model.generate(token_ids(1), **MODE, energy_budget=budget).execution.mean_cost


def test_what_can_not_be_reached_is_said_and_changes_nothing(clock):
    model = wrap(tiny_base(), energy_budget=0.8)
    model.generation_config.energy_budget = 0.9
    with pytest.raises(TargetNotReached, match=r"speedup of 50 can't be reached on this machine: the best of \d+ bu") as error:
        model.set_target_speedup(50.0, **FEW)
    assert (model.config.energy_budget, model.generation_config.energy_budget) == (0.8, 0.9)
    assert error.value.best.budget == pytest.approx(model.controller.floor) and error.value.best.speedup > 1.5


def test_the_plain_base_can_be_the_reference(clock, monkeypatch):
    model = wrap(tiny_base(), keep_first_tokens=0)

    def generate(input_ids, streamer, max_new_tokens, **kwargs):
        streamer.put(input_ids)
        for _ in range(max_new_tokens):
            clock[0] += 1.5
            streamer.put(input_ids[:, -1])

    monkeypatch.setattr(model.base, "generate", generate)
    assert model.set_target_speedup(1.5, reference="base", **FEW).budget == 1.0
    found = model.set_target_speedup(2.0, reference="base", new_tokens=50, rounds=1)
    assert 0.75 / STEP**2 < found.budget < 0.75 * STEP


def test_random_numbers_to_come_stay_what_they_were(clock):
    model = wrap(tiny_base())
    draws = []
    model.register_forward_hook(lambda *_: draws.append(torch.rand(1)))
    before = torch.get_rng_state()
    model.set_target_speedup(1.2, **FEW)
    assert draws and torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TargetNotReached):
        model.set_target_speedup(90.0, **FEW)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_users_way_to_generate_does_not_matter(clock):
    budgets = []
    for fields in ({}, {"do_sample": True, "num_beams": 2, "num_return_sequences": 2, "eos_token_id": list(range(1, 60))}):
        model = wrap(tiny_base())
        for name, value in fields.items():
            setattr(model.generation_config, name, value)
        budgets.append(model.set_target_speedup(1.4, token_ids(2, 5), **FEW).budget)
        assert all(getattr(model.generation_config, name) == value for name, value in fields.items())
    assert budgets[0] == budgets[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0.9}, "target=0.9 is not allowed: it must be a number that is at least 1"),
        ({"target": "fast"}, "target='fast' is not allowed"),
        ({"target": True}, "target=True is not allowed"),
        ({"target": float("nan")}, "target=nan is not allowed"),
        ({"target": float("inf")}, "target=inf is not allowed"),
        ({"new_tokens": 1}, "new_tokens=1 is not allowed: it must be an integer from 2"),
        ({"rounds": 0}, "rounds=0 is not allowed"),
        ({"reference": "llama"}, "reference='llama' is not allowed: it must be one of 'dense', 'base'"),
        ({"prompts": "hello"}, "prompts 'hello' is not allowed: it must be token ids"),
        ({"prompts": torch.ones(3)}, r"prompts of shape \(3,\), torch.float32 is not allowed"),
        ({"prompts": torch.ones(1, 0, dtype=torch.int64)}, r"prompts of shape \(1, 0\)"),
        ({"prompts": {"text": "hello"}}, "prompts .*hello.* is not allowed"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    model = wrap(tiny_base())
    with pytest.raises(ValueError, match=message):
        model.set_target_speedup(**({"target": 1.5} | arguments))
    assert model.config.energy_budget == 1.0


def test_numbers_of_torch_are_numbers():
    assert check_target(torch.tensor(1.5)) == 1.5


def test_without_full_weights_there_is_nothing_to_measure_against():
    model = AneeForCausalLM.from_base(tiny_base(), controller="plan", precisions=["int8"], drop_full=True)
    with pytest.raises(ValueError, match="speedup over reference='dense' can't be measured: the base's full weights were drop"):
        model.set_target_speedup(1.5)
