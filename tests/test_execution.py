"""The executor: subsets, gathering or not, and what it says of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from modeling_anee import execution
from modeling_anee.execution import Subset

from .tiny import CONTROLLERS, FAMILIES, tiny_base, token_ids, wrap


@given(st.integers(1, 5), st.integers(1, 7), st.data())
@settings(max_examples=50, deadline=None)
def test_subset_gathers_and_scatters_the_chosen_tokens(rows, tokens, data):
    chosen = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=rows, max_size=rows))
    )
    if not chosen.any():
        return
    x = torch.arange(rows * tokens * 2.0).reshape(rows, tokens, 2)
    subset = Subset.of(chosen, x.device)
    part = subset.gather(x)
    assert part[subset.real].tolist() == x[chosen].tolist()
    assert int(subset.real.sum()) == int(chosen.sum()) and subset.columns.shape[1] == int(chosen.sum(dim=1).max())
    changed = subset.scatter(x, part + 100)
    assert torch.equal(changed[chosen], x[chosen] + 100) and torch.equal(changed[~chosen], x[~chosen])
    assert not torch.equal(changed, x)


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gathering_or_not_gives_the_same(family, controller, monkeypatch):
    fields = {"plans": ["PSSP", "PPSS", "PSPE", "PPPS"]} if controller == "plan" else {}
    model, ids = wrap(tiny_base(family), controller, **fields), token_ids(3)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    call = {"attention_mask": mask, "energy_budget": [0.5, 0.7, 0.9]}
    gathered = model(ids, **call)
    monkeypatch.setitem(execution.GATHERING_FLOPS, "cpu", 1e30)
    dense = model(ids, **call)
    real = mask.bool()
    torch.testing.assert_close(dense.logits[real], gathered.logits[real], atol=2e-5, rtol=1e-4)
    assert torch.equal(dense.execution.actions, gathered.execution.actions)
    torch.testing.assert_close(dense.execution.cost, gathered.execution.cost)
    assert gathered.execution.ran_anyway is None and gathered.execution.share_run_anyway == 0.0


def test_the_trace_says_what_was_run_anyway(monkeypatch):
    monkeypatch.setitem(execution.GATHERING_FLOPS, "cpu", 1e30)
    model, ids = wrap(cost_unit="flops", plans=["PSSP", "PPSP"]), token_ids(1, 20)
    trace = model(ids, energy_budget=0.75).execution
    mixed = (trace.actions[0] != 0).float().mean(dim=0)
    expected = sum(int((trace.actions[0, :, layer] != 0).sum()) for layer in range(4) if 0 < mixed[layer] < 1)
    assert int(trace.ran_anyway.sum()) == expected > 0
    assert "run anyway" in trace.summary()
    output = model.generate(ids, energy_budget=0.75, max_new_tokens=3, return_dict_in_generate=True)
    assert torch.equal(output.execution.ran_anyway[:, :20], trace.ran_anyway)
    alone = model(ids[:, :1], energy_budget=0.75).execution
    assert alone.ran_anyway is None and "run anyway" not in alone.summary()


def test_where_every_token_skips_nothing_is_ever_run(monkeypatch):
    monkeypatch.setitem(execution.GATHERING_FLOPS, "cpu", 1e30)
    model, ids = wrap(cost_unit="flops", plans=["PSSP"]), token_ids(2)
    with FlopCounterMode(display=False) as counter:
        trace = model(ids, energy_budget=0.0).execution
    linear = sum(v for name, v in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))
    processed = float(model.costs.layers[[0, 3], 0].sum())
    assert trace.ran_anyway is None
    assert linear / model.costs.stack == pytest.approx((processed + model.costs.head) * ids.numel())
