"""An artifact over a base in another dtype: the same ways at budgets that are shares of that base's bytes."""

import math

import pytest
import torch

from modeling_anee import AneeForCausalLM
from modeling_anee.other_dtype import grown_dial, growth, growth_of

from .tiny import BRIDGES, tiny_base, token_ids, wrap


HALF = [torch.bfloat16, torch.float16]
PLANS = ["4*INT8 / int8", "INT8, 2*INT8_SKIP_FFN, INT8 / int8", "INT8, 2*SKIP_INT8, INT8 / int8"]
FIELDS = {"precisions": ["int8"], "plans": PLANS, "min_layers": 1, **BRIDGES}


def fitted(folder, dtype=torch.float32) -> AneeForCausalLM:
    """A router over a base in a dtype, saved with the base beside it."""
    base = tiny_base().to(dtype)
    base.save_pretrained(folder / "base")
    controller = wrap(base, "routed", **FIELDS).controller
    calibration = {"budgets": [controller.floor, controller.top], "settings": [4.0, -2.0]}
    fields = FIELDS | {"router_plans": [1, 2], "base_model_name_or_path": str(folder / "base")}
    model = wrap(base, "routed", calibration=calibration, **fields)
    model.save_pretrained(folder / "artifact")
    return model


@pytest.mark.parametrize("before, after", [(torch.float32, dtype) for dtype in HALF] + [(torch.bfloat16, torch.float32)])
@torch.no_grad()
def test_a_router_has_the_same_ways_and_chooses_among_them_alike(tmp_path, before, after):
    model = fitted(tmp_path, before)
    other = AneeForCausalLM.from_pretrained(tmp_path / "artifact", dtype=after)
    one, two, times = model.controller, other.controller, before.itemsize / after.itemsize
    assert growth_of(other.config, other.costs) == times
    assert torch.equal(one.plans, two.plans) and torch.equal(one.heads, two.heads)
    assert len(one.plan_costs.unique()) == 3
    torch.testing.assert_close(two.plan_costs, one.plan_costs * times, rtol=0.1, atol=0)  # norms are in the base's dtype, too
    loss = torch.rand(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    budget = torch.linspace(one.floor, one.top, 200, dtype=torch.float64)
    chosen = one.choose(loss, one.dial.setting(budget)), two.choose(loss, two.dial.setting(budget * times))
    assert len(chosen[0].unique()) == 3 and (chosen[0] == chosen[1]).double().mean() > 0.98
    ids = token_ids(2, 40)
    for budget in (one.floor, (one.floor + one.top) / 2, one.top):
        first, second = model(ids, energy_budget=budget), other(ids, energy_budget=budget * times)
        assert first.execution.mean_cost * times == pytest.approx(second.execution.mean_cost, rel=0.1)


@torch.no_grad()
def test_it_is_saved_in_the_terms_that_it_was_fitted_in(tmp_path):
    model = fitted(tmp_path)
    other = AneeForCausalLM.from_pretrained(tmp_path / "artifact", dtype=torch.bfloat16)
    other.save_pretrained(tmp_path / "again")
    again, ids, budget = AneeForCausalLM.from_pretrained(tmp_path / "again"), token_ids(2, 20), model.controller.top - 0.01
    assert again.config.base_dtype == model.config.base_dtype == "float32"
    for name in ("router_plans", "calibration"):
        assert getattr(again.config, name) == getattr(model.config, name)
    assert torch.equal(again(ids, energy_budget=budget).logits, model(ids, energy_budget=budget).logits)


@pytest.mark.parametrize("dtype", HALF)
def test_a_model_that_is_cast_means_the_same_by_its_budgets_as_one_that_was_loaded_so(tmp_path, dtype):
    model = fitted(tmp_path)
    model.base.to(dtype)
    model.prepare()
    one, two = model.controller, AneeForCausalLM.from_pretrained(tmp_path / "artifact", dtype=dtype).controller
    assert torch.equal(one.plans, two.plans) and torch.equal(one.plan_costs, two.plan_costs)
    assert torch.equal(one.dial.budgets, two.dial.budgets) and torch.equal(one.dial.settings, two.dial.settings)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_what_a_base_is_wrapped_in_is_what_its_budgets_mean(tmp_path, dtype):
    tiny_base().save_pretrained(tmp_path)
    cast = tiny_base()
    cast.config.dtype = torch.float32
    cast.to(dtype)  # which its config does not notice
    for base, loading in ((cast, {}), (tmp_path, {"dtype": dtype})):
        model = AneeForCausalLM.from_base(base, controller="routed", **FIELDS, **loading)
        assert getattr(torch, model.config.base_dtype) == dtype and growth_of(model.config, model.costs) == 1.0


@pytest.mark.parametrize("fields", [BRIDGES, FIELDS | {"cost_unit": "flops"}, FIELDS | {"base_dtype": None}])
def test_what_runs_in_full_has_the_same_share_in_any_dtype(fields):
    model = wrap(tiny_base(), "routed", **fields)
    model.config.base_dtype = fields.get("base_dtype", "float32")
    model.base.to(torch.bfloat16)
    model.prepare()
    assert growth_of(model.config, model.costs) == 1.0


def test_dials_and_dtypes():
    assert growth("float32", torch.bfloat16) == growth("float32", torch.float16) == 2.0
    assert growth("bfloat16", torch.float64) == 0.25
    assert growth(None, torch.float16) == growth("float16", None) == 1.0
    table = {"budgets": [0.1, 0.2], "settings": [1.0, -1.0], "cost": [0.1, 0.2]}
    assert grown_dial(table, 1.0) is table and grown_dial(None, 2.0) is None
    assert grown_dial(table, 2.0) == {"budgets": [0.2, 0.4], "settings": [1.0 - math.log(2.0), -1.0 - math.log(2.0)]}
    measured = {"budgets": [0.1, 0.2], "cost": [0.1, 0.2]}
    assert grown_dial(measured, 2.0) is measured


@pytest.mark.parametrize("precisions, warns", [(["int8"], True), (None, False)])
def test_a_price_that_has_no_other_terms_is_named(said, precisions, warns):
    table = {"budgets": [0.3, 0.9], "settings": [3.0, -1.0]}
    model = wrap(tiny_base(), "learned", precisions=precisions, calibration=table, **BRIDGES)
    assert not said
    model.base.to(torch.bfloat16)
    model.prepare()
    assert any("calibrated over a base in float32" in message for message in said) == warns
