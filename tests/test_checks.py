"""Numbers of any library are numbers, and what is misspelt is named with what was meant."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_anee import AneeConfig
from modeling_anee.checks import check_budget, nearest, plain, refuse_unknown

from .tiny import CONFIGS, LAYERS, token_ids, wrap


TEXT_CONFIG = CONFIGS["llama"]().to_dict()


@given(st.floats(0, 1, width=16))
def test_numbers_of_numpy_and_torch_are_budgets(value):
    for number in (np.float64(value), np.float32(value), np.float16(value), np.array(value), torch.tensor(value)):
        checked = check_budget(number)
        assert type(checked) is float and checked == value
    assert check_budget(np.int64(round(value))) == round(value)


@pytest.mark.parametrize(
    "value", [np.bool_(True), np.float32(1.5), np.float32("nan"), np.array([0.5]), torch.tensor([0.5, 0.6])]
)
def test_what_is_no_number_of_numpy_is_no_budget(value):
    with pytest.raises(ValueError, match="energy_budget=.* is not allowed"):
        check_budget(value)


@pytest.mark.parametrize("budget", [np.float32(0.5), np.array(0.5), np.array([0.5, 0.5]), [np.float32(0.5)] * 2])
def test_forward_and_generate_take_budgets_of_numpy(budget):
    model, ids = wrap(), token_ids()
    torch.testing.assert_close(model(ids, energy_budget=budget).logits, model(ids, energy_budget=0.5).logits)
    greedy = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(ids, energy_budget=0.5, prompt_energy_budget=0.5, **greedy)
    assert torch.equal(model.generate(ids, energy_budget=budget, prompt_energy_budget=budget, **greedy), expected)


def test_fields_of_numpy_are_saved_as_plain_numbers(tmp_path):
    fields = {
        "energy_budget": np.float32(0.5),
        "min_layers": np.int64(2),
        "skip_order": np.argsort([3, 1, 2, 0]),
        "bridge_layers": [np.int32(1), np.int64(2)],
        "router_budgets": np.array([0.75, 0.5]),
        "calibration": {"budgets": np.array([0.25, 0.5]), "cost": [np.float32(0.25), 0.5]},
        "strict_base": np.bool_(True),
    }
    config = AneeConfig(text_config=TEXT_CONFIG, **fields)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written[name] for name in fields} == plain(fields)
    with pytest.raises(ValueError, match=f"min_layers={LAYERS + 1}"):
        AneeConfig(text_config=TEXT_CONFIG, min_layers=np.int64(LAYERS + 1))


def test_a_misspelt_name_is_named_with_the_nearest():
    assert nearest("energy_buget", AneeConfig.known_fields()) == "'energy_buget' (did you mean 'energy_budget'?)"
    assert nearest("zzz", AneeConfig.known_fields()) == "'zzz'"
    refuse_unknown([], ["a"], "anything")
    with pytest.raises(ValueError, match="unknown keyword 'skip_ordr' .*'skip_order'.*, 'zzz': it must be a field"):
        refuse_unknown(["skip_ordr", "zzz"], AneeConfig.known_fields(), "a field")
