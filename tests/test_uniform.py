"""The base in 8 and in 4 bits as a control: every token alike, at one cost, over the very base that is measured."""

import pytest
import torch
from transformers.utils import logging

from modeling_anee.actions import FULL
from modeling_anee.configuration_anee import AneeConfig
from modeling_anee.data.windows import windows
from modeling_anee.evaluation.comparison import as_text, compare, count_scores
from modeling_anee.evaluation.shown import OF_PRECISIONS_IN_HALF, budgets_to_show
from modeling_anee.evaluation.uniform import PLANS, uniform_precisions

from .tiny import BRIDGES, LAYERS, tiny_base, token_ids, wrap


EXPECTED = {"uniform INT8": ("INT8", "int8"), "uniform INT4, INT8 head": ("INT4", "int8"), "uniform INT4": ("INT4", "int4")}


@pytest.fixture(scope="module")
def text():
    return windows(token_ids(1, 240)[0], 40)


@pytest.mark.parametrize("fields", [{}, {"cost_unit": "flops"}, {"precisions": ["int8", "int4"]}])
@torch.no_grad()
def test_every_token_runs_in_one_precision_over_the_same_base(fields):
    model, ids = wrap(tiny_base(), "plan", **BRIDGES, **fields), token_ids(2, 9)
    dense = model(ids, energy_budget=1.0).logits
    found = uniform_precisions(model)
    assert [one.name for one in found] == list(EXPECTED) == list(PLANS)
    for one in found:
        assert one.model.base is model.base
        trace, (action, head) = one.model(ids, energy_budget=one.budget).execution, EXPECTED[one.name]
        assert trace.actions.eq(trace.table.place(action)).all()
        assert trace.head.eq(trace.table.heads.index(head)).all()
        assert trace.mean_cost == pytest.approx(one.budget)
    costs = [one.cost for one in found]
    if "cost_unit" in fields:
        assert costs == pytest.approx([1.0] * 3)  # rounded weights take as many operations
    else:
        assert costs == [one.budget for one in found] == sorted(costs, reverse=True) and costs[0] < 0.4
    assert not model.stack.changed and torch.equal(model(ids, energy_budget=1.0).logits, dense)


@pytest.mark.parametrize("part", ["lm_head", "model.layers.1.mlp"])
def test_a_base_that_can_not_be_run_so_is_left_out_and_said(monkeypatch, caplog, text, part):
    """Where code of others sits on a part, its weights alone are not what it does."""
    base = tiny_base()
    for module in base.get_submodule(part).modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, args, output: output)
    model = wrap(base, "plan")
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    assert uniform_precisions(model) == []
    what = "head" if part == "lm_head" else "feed-forward"
    assert "uniform INT8 and INT4 are left out" in caplog.text and f"is not possible for the {what} of" in caplog.text
    rows = compare({"plan": model}, text, [0.8], uniform=[])
    assert [row["name"] for row in rows][:2] == ["base", "random skip, same bridges"]


@pytest.mark.parametrize("fields", [{}, {"precisions": ["int8", "int4"]}, {"cost_unit": "flops"}])
def test_the_comparison_has_one_row_of_each(text, fields):
    model, advanced = wrap(tiny_base(), "plan", **fields), []
    uniform = uniform_precisions(model)
    rows = compare({"plan": model}, text, [0.8, 0.6], progress=advanced.append, uniform=uniform)
    assert sum(advanced) == count_scores(1, 2, others=0, uniform=3) * len(text)
    fixed = [row for row in rows if row.get("fixed")]
    assert rows[1:4] == fixed and [row["name"] for row in fixed] == list(EXPECTED)
    for one, row in zip(uniform, fixed, strict=True):
        assert row["budget"] == row["cost"] == one.cost and row["ratio"] > 0
    assert fixed[0]["ratio"] == pytest.approx(1.0, abs=0.1)  # 8 bits lose little
    lines = as_text(rows).splitlines()
    assert lines[3].startswith(f"| fixed | uniform INT8 | {uniform[0].cost:.3f} |")
    assert {line.count("|") for line in lines} == {6}


def test_budgets_to_show_fit_the_actions():
    text_config = tiny_base().config
    plain, own = AneeConfig(text_config=text_config), AneeConfig(text_config=text_config, precisions=["int4"])
    assert plain.table.variants == {FULL} and budgets_to_show(plain) == (1.0, 0.8, 0.6, 0.5, 0.3)
    assert budgets_to_show(own) == (1.0, 0.5, 0.26, 0.18, 0.12)
    for dtype in (torch.bfloat16, torch.float16):
        assert budgets_to_show(plain, dtype) == budgets_to_show(plain) and budgets_to_show(own, dtype) == OF_PRECISIONS_IN_HALF
    assert plain.num_layers == LAYERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_budgets_to_show_end_above_each_precision(dtype):
    model = wrap(tiny_base().to(dtype), "plan", precisions=["int8", "int4"])
    shown, costs = budgets_to_show(model.config, model.dtype), [one.cost for one in uniform_precisions(model)]
    assert shown[1] > costs[0] > shown[3]  # norms, scales and offsets are many in so small a base
