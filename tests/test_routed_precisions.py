"""`routed` with fewer bits: plans that leave nothing out are fixed, those below are chosen for each token; the invariants."""

import functools

import pytest
import torch

from modeling_anee import AneeForCausalLM

from .tiny import BRIDGES, FAMILIES, assert_alike, tiny_base, token_ids, wrap


# From everything in full down to two layers left out, all of them cheaper than the one before.
PLANS = [
    "4*INT8 / int8",
    "4*INT4 / int8",
    "INT4, 2*INT4_SKIP_FFN, INT4 / int8",
    "INT4, INT4_SKIP_FFN, SKIP_INT4, INT4 / int4",
    "INT4, 2*SKIP_INT4, INT4 / int4",
]
# Where decisions are compared: kernels of 4 bits round to bfloat16 for few rows alone, so they could differ.
IN_8_BITS = [plan.replace("INT4", "INT8").replace("int4", "int8") for plan in PLANS[1:]]
CLOSE = {"atol": 2e-3, "rtol": 0}


@functools.cache
def model_of(family: str = "llama", mode: str = "average", plans: tuple[str, ...] = tuple(IN_8_BITS)) -> AneeForCausalLM:
    return wrap(
        tiny_base(family),
        "routed",
        precisions=["int8", "int4"],
        plans=list(plans),
        budget_mode=mode,
        calibration={"budgets": [0.15, 0.3], "settings": [3.0, -1.0]},
        **BRIDGES,
    )


def below(model: AneeForCausalLM, share: float) -> float:
    """A budget between the floor of the router and its dearest plan."""
    controller = model.controller
    return controller.floor + share * (controller.top - controller.floor)


def test_the_dearest_plan_leaves_nothing_out_and_all_begin_and_cost_alike():
    model = model_of(plans=tuple(PLANS))
    controller, table = model.controller, model.config.table
    assert table.text(controller.plans[0].tolist(), int(controller.heads[0])) == "4*INT4 / int8"
    assert (controller.plans[:, 0] == controller.plans[0, 0]).all() and len(controller.heads.unique()) == 2
    assert controller.plan_costs.tolist() == sorted(controller.plan_costs.tolist(), reverse=True)
    assert controller.top == pytest.approx(float(controller.plan_costs[0]))
    assert len(controller.plans) == 7 and table.text(controller.plans[-1].tolist(), 1) == PLANS[-1]
    named = wrap(model.base, "routed", precisions=["int8", "int4"], plans=PLANS, router_budgets=[0.9, 0.0], **BRIDGES)
    places = [
        table.text(plan.tolist(), int(head)) for plan, head in zip(named.controller.plans, named.controller.heads, strict=True)
    ]
    assert places == ["4*INT4 / int8", "4*INT4 / int8", PLANS[-1]]  # none is dearer than the first


@torch.no_grad()
def test_what_a_budget_affords_without_leaving_anything_out_is_as_of_fixed_plans(monkeypatch):
    model = model_of(plans=tuple(PLANS))
    plan = wrap(model.base, "plan", precisions=["int8", "int4"], plans=PLANS, **BRIDGES)
    monkeypatch.setattr(model.controller, "predict", None)  # nobody asks
    ids = token_ids(2, 9)
    for budget in (model.controller.top, 0.3, 0.6, [0.99, 0.25]):
        assert_alike(model, plan, ids, budget)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["average", "strict"])
def test_scoring_is_decoding_with_budgets_by_token(family, mode):
    model, ids = model_of(family, mode), token_ids(2, 24)
    some = torch.tensor([below(model, 0.5), 0.9, below(model, 0.2), model.controller.top, 1.0, 0.0], dtype=torch.float64)
    budgets = torch.stack((some.repeat(4), some.flip(0).repeat(4)))
    whole = model(ids, energy_budget=budgets, use_cache=False)
    assert len(whole.execution.actions.unique()) > 3
    for size in (1, 5):
        parts, cache = [], None
        for part, budget in zip(ids.split(size, dim=1), budgets.split(size, dim=1), strict=True):
            parts.append(model(part, energy_budget=budget, past_key_values=cache, use_cache=True))
            cache = parts[-1].past_key_values
        torch.testing.assert_close(torch.cat([part.logits for part in parts], dim=1), whole.logits, **CLOSE)
        trace = cache.execution_log.trace
        assert torch.equal(trace.actions, whole.execution.actions) and torch.equal(trace.head, whole.execution.head)
        torch.testing.assert_close(trace.account, whole.execution.account)


@torch.no_grad()
def test_rows_do_not_depend_on_their_batch_or_padding():
    model, ids, lengths = model_of(), token_ids(4, 12), [12, 5, 9, 1]
    budgets = [below(model, 0.4), 0.5, 0.0, below(model, 0.9)]
    mask = torch.stack([torch.arange(12) >= 12 - length for length in lengths]).long()
    together = model(ids, attention_mask=mask, position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0), energy_budget=budgets)
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, 12 - length :], energy_budget=budgets[row])
        torch.testing.assert_close(together.logits[row, 12 - length :], alone.logits[0], **CLOSE)
        assert torch.equal(together.execution.actions[row, 12 - length :], alone.execution.actions[0])
        torch.testing.assert_close(together.execution.row_cost[row], alone.execution.row_cost[0])


@torch.no_grad()
@pytest.mark.parametrize("mode", ["average", "strict"])
def test_a_lower_budget_never_costs_more_and_costs_add_up(mode):
    model, ids = model_of(mode=mode, plans=tuple(PLANS)), token_ids(2, 300)
    controller, kept = model.controller, model.controller.keep_first
    budgets = [below(model, step / 8) for step in range(-1, 9)] + [controller.top, 0.3, 0.5, 0.9, 1.0]
    traces = [model(ids, energy_budget=budget, use_cache=False).execution for budget in budgets]
    costs = [trace.mean_cost for trace in traces]
    assert costs == sorted(costs) and costs[0] == pytest.approx(controller.floor, abs=0.01)
    for budget, trace in zip(budgets, traces, strict=True):
        if mode == "strict":
            assert (trace.cost <= max(budget, controller.floor) + 1e-6).all()
        else:
            assert abs(trace.mean_cost - max(budget, controller.floor)) <= 0.02
        routed = torch.zeros_like(trace.valid)
        routed[:, kept:] = budget < controller.top - 1e-9
        expected = model.costs.of_plans(trace.actions, trace.head) + routed * model.costs.of_module(controller.predictor)
        torch.testing.assert_close(trace.cost.double(), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_untrained_nothing_is_left_out():
    model = AneeForCausalLM.from_base(tiny_base(), controller="routed", precisions=["int4"])
    actions = model(token_ids(), energy_budget=0.1).execution.actions
    assert model.config.table.where([row.is_whole for row in model.config.table])[actions.long()].all()


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    base = type(tiny_base()).from_pretrained(tmp_path / "base")
    model, ids = wrap(base, "routed", precisions=["int8"], plans=IN_8_BITS, **BRIDGES), token_ids()
    model.save_pretrained(tmp_path / "artifact")
    again = AneeForCausalLM.from_pretrained(tmp_path / "artifact")
    assert again.config.router_budgets is None and torch.equal(again.controller.plans, model.controller.plans)
    for budget in (below(model, 0.5), 0.5):
        assert torch.equal(again(ids, energy_budget=budget).logits, model(ids, energy_budget=budget).logits)


@torch.no_grad()
def test_generation_is_that_of_one_forward():
    model, ids = model_of(), token_ids(1, 6)
    for budget in (below(model, 0.5), 0.5):
        found = model.generate(ids, max_new_tokens=8, do_sample=False, energy_budget=budget)
        logits = model(found[:, :-1], energy_budget=budget).logits[0, 5:]
        assert torch.equal(logits.argmax(dim=-1), found[0, 6:])
