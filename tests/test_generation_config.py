"""Defaults of `generate`: those of the base, budgets in `generation_config.json`, and what comes first."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from modeling_anee import AneeForCausalLM

from .tiny import tiny_base, token_ids, wrap


MODE = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
CALM = {"controller": "confidence", "exit_layers": [1, 2], "calibration": {"budgets": [0.4, 1.0], "settings": [1.0, 0.4]}}


@pytest.fixture
def base_folder(tmp_path):
    base = tiny_base()
    # A chat model: its own configuration knows only one of the two ends.
    base.generation_config = GenerationConfig(
        eos_token_id=[2, 7], pad_token_id=0, bos_token_id=1, do_sample=True, temperature=0.6, top_k=7, repetition_penalty=1.1
    )
    base.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def settings(model) -> dict:
    fields = model.generation_config.to_dict()
    return {name: value for name, value in fields.items() if value is not None and name != "transformers_version"}


def cost(model, **kwargs) -> float:
    return model.generate(token_ids(1), **{**MODE, **kwargs}).execution.mean_cost


def test_a_wrapper_generates_with_the_bases_defaults(base_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    expected = settings(base)
    assert expected["eos_token_id"] == [2, 7] and expected["temperature"] == 0.6
    wrapped, named = AneeForCausalLM.from_base(base), AneeForCausalLM.from_base(base_folder)
    named.save_pretrained(tmp_path / "artifact")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact")
    for model in (wrapped, named, loaded):
        assert settings(model) == expected
    torch.manual_seed(0)
    tokens = base.generate(token_ids(), max_new_tokens=8)
    torch.manual_seed(0)
    assert torch.equal(loaded.generate(token_ids(), max_new_tokens=8), tokens)


def test_an_artifacts_own_defaults_come_before_the_bases(base_folder, tmp_path):
    model = AneeForCausalLM.from_base(base_folder, controller="plan")
    model.generation_config.temperature = 0.3
    model.generation_config.eos_token_id = 9
    model.save_pretrained(tmp_path / "artifact")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact")
    assert settings(loaded) == settings(model)
    (tmp_path / "artifact" / "generation_config.json").unlink()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact")
    assert settings(loaded) == settings(AutoModelForCausalLM.from_pretrained(base_folder))


def test_budgets_are_saved_and_loaded_and_used(base_folder, tmp_path):
    model = AneeForCausalLM.from_base(base_folder, energy_budget=0.9, **CALM)
    own = {"energy_budget": 0.7, "prompt_energy_budget": 1.0, "budget_feedback": 0.5}
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path / "artifact")
    written = json.loads((tmp_path / "artifact" / "generation_config.json").read_text())
    assert own.items() <= written.items()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact")
    assert loaded.config.energy_budget == 0.9
    found = loaded.generate(token_ids(), **MODE)
    expected = loaded.generate(token_ids(), **own, **MODE)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.execution.actions, expected.execution.actions)
    assert not torch.equal(found.execution.actions, loaded.generate(token_ids(), energy_budget=0.9, **MODE).execution.actions)
    again = loaded.generation_config
    again.save_pretrained(tmp_path / "again")
    assert GenerationConfig.from_pretrained(tmp_path / "again").energy_budget == 0.7


def test_argument_then_given_configuration_then_the_models_then_config(base_folder, tmp_path):
    model = wrap(energy_budget=0.9)
    budgets = (0.9, 0.8, 0.7, 0.6)
    expected = [cost(model, energy_budget=budget) for budget in budgets]
    assert expected == sorted(expected, reverse=True) and len(set(expected)) == 4
    assert cost(model) == expected[0]
    model.generation_config.energy_budget = 0.8
    assert cost(model) == expected[1]
    given = GenerationConfig(energy_budget=0.7, **MODE)
    assert model.generate(token_ids(1), generation_config=given).execution.mean_cost == expected[2]
    assert model.generate(token_ids(1), generation_config=given, energy_budget=0.6).execution.mean_cost == expected[3]
    other = GenerationConfig(**MODE)  # has no budget: the model's
    assert model.generate(token_ids(1), generation_config=other).execution.mean_cost == expected[1]
    model.generation_config.energy_budget = None
    assert cost(model) == expected[0]


def test_a_bad_budget_in_the_configuration_is_refused_by_name():
    model = wrap()
    model.generation_config.energy_budget = 1.7
    with pytest.raises(ValueError, match="energy_budget=1.7 is not allowed"):
        model.generate(token_ids(1), **MODE)
    model.generation_config.energy_budget = "low"
    with pytest.raises(ValueError, match="energy_budget='low' is not allowed"):
        model.generate(token_ids(1), **MODE)
