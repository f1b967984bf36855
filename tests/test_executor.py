"""The executor: subsets, gathering or not, and what it says of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from modeling_anee import hardware
from modeling_anee.actions import PROCESS, SKIP_FFN
from modeling_anee.step import Subset

from .tiny import BRIDGES, CONTROLLERS, FAMILIES, LAYERS, tiny_base, token_ids, wrap


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
    assert subset.columns.shape[1] == int(chosen.sum(dim=1).max())
    part = subset.flat(subset.gather(x))
    assert part.tolist() == x[chosen].tolist()
    changed = subset.scatter(x, part + 100)
    assert torch.equal(changed[chosen], x[chosen] + 100) and torch.equal(changed[~chosen], x[~chosen])
    assert not torch.equal(changed, x)


@pytest.mark.usefixtures("always_gather")
@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gathering_or_not_gives_the_same(family, controller, monkeypatch):
    fields = {"plans": ["PSSF", "PFSS", "PSPE", "FPFP"]} if controller == "plan" else {"decision_interval": 2}
    model, ids = wrap(tiny_base(family), controller, **fields, **BRIDGES), token_ids(3)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    call = {"attention_mask": mask, "energy_budget": [0.5, 0.7, 0.9]}
    gathered = model(ids, **call)
    monkeypatch.setitem(hardware.GATHERING_FLOPS, "cpu", 1e30)
    dense = model(ids, **call)
    real = mask.bool()
    torch.testing.assert_close(dense.logits[real], gathered.logits[real], atol=2e-5, rtol=1e-4)
    assert torch.equal(dense.execution.actions, gathered.execution.actions)
    torch.testing.assert_close(dense.execution.cost, gathered.execution.cost)
    assert gathered.execution.ran_anyway is None and gathered.execution.share_run_anyway == 0.0


def test_the_trace_says_what_was_run_anyway(monkeypatch):
    monkeypatch.setitem(hardware.GATHERING_FLOPS, "cpu", 1e30)
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


def runs(model, ids, **call) -> tuple[list[int], list[int], torch.Tensor]:
    """For how many tokens each layer's attention output and feed-forward ran, and the actions, [tokens, layers]."""
    counts: dict[str, list[int]] = {"self_attn.o_proj": [0] * LAYERS, "mlp.down_proj": [0] * LAYERS}
    hooks = []
    for number, layer in enumerate(model.base.model.layers):
        for name, count in counts.items():

            def add(module, args, output, count=count, number=number):
                count[number] += output.numel() // output.shape[-1]

            hooks.append(layer.get_submodule(name).register_forward_hook(add))
    trace = model(ids, **call).execution
    for hook in hooks:
        hook.remove()
    return *counts.values(), trace.actions[trace.valid]


MIXTURES = {
    "all four": (["PSFE", "FPSE", "SFPF"], 0.5),
    "feed-forward or not": (["FFPP", "FPFP"], 0.85),
    "some attend, none feeds": (["FSSS", "SFSF"], 0.3),
    "nobody feeds": (["FFFF"], 0.0),
    "nobody attends": (["SSSS"], 0.0),
    "some leave": (["SEEE", "SSSE"], 0.0),
}


@pytest.mark.usefixtures("always_gather")
@pytest.mark.parametrize("plans, budget", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("cached", [True, False])
def test_what_is_left_out_is_not_called(plans, budget, cached):
    model, ids = wrap(plans=plans, keep_first_tokens=0, **BRIDGES), token_ids(1, 20)
    attended, fed, actions = runs(model, ids, energy_budget=budget, use_cache=cached)
    feeds = actions == PROCESS
    assert fed == feeds.sum(dim=0).tolist()
    assert attended == (feeds | (actions == SKIP_FFN)).sum(dim=0).tolist()


@pytest.mark.parametrize("plans, budget", MIXTURES.values(), ids=MIXTURES)
def test_even_where_gathering_does_not_pay_nothing_runs_for_nobody(plans, budget, monkeypatch):
    monkeypatch.setitem(hardware.GATHERING_FLOPS, "cpu", 1e30)
    model, ids = wrap(plans=plans, keep_first_tokens=0, **BRIDGES), token_ids(1, 20)
    attended, fed, actions = runs(model, ids, energy_budget=budget)
    feeds = actions == PROCESS
    attends = feeds | (actions == SKIP_FFN)
    assert fed == (20 * feeds.any(dim=0)).tolist() and attended == (20 * attends.any(dim=0)).tolist()
    trace = model(ids, energy_budget=budget).execution
    expected = sum(20 - int(feeds[:, n].sum()) for n in range(LAYERS) if feeds[:, n].any())
    expected += sum(20 - int(attends[:, n].sum()) for n in range(LAYERS) if attends[:, n].any() and not feeds[:, n].any())
    assert (0 if trace.ran_anyway is None else int(trace.ran_anyway.sum())) == expected


@pytest.mark.usefixtures("always_gather")
def test_fillers_and_padding_are_not_fed():
    """Rows of a subset are filled up to the longest; that is for attention only."""
    model, ids = wrap(plans=["PSFE", "FPSE", "SFPF"], **BRIDGES), token_ids(3)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    _, fed, actions = runs(model, ids, attention_mask=mask, energy_budget=[0.45, 0.6, 0.5])
    feeds = actions == PROCESS
    assert fed == feeds.sum(dim=0).tolist() and 0 < feeds.sum() < feeds.numel()


@pytest.mark.parametrize("gathering", [0.0, 1e30])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_logits_at_padding_do_not_depend_on_the_batch(controller, gathering, monkeypatch):
    """They mean nothing, but a row is what it is alone, all of it."""
    monkeypatch.setitem(hardware.GATHERING_FLOPS, "cpu", gathering)
    model, ids, others = wrap(tiny_base(), controller, **BRIDGES), token_ids(3), token_ids(3, seed=9)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[0, -2:] = 0
    alone = model(ids[:1], attention_mask=mask[:1], energy_budget=0.6).logits
    for mates in (ids[1:], others[1:]):
        for budget in (0.6, [0.6, 0.9, 1.0]):
            batch = model(torch.cat((ids[:1], mates)), attention_mask=mask, energy_budget=budget)
            torch.testing.assert_close(batch.logits[:1], alone)


def test_where_every_token_skips_nothing_is_ever_run(monkeypatch):
    monkeypatch.setitem(hardware.GATHERING_FLOPS, "cpu", 1e30)
    model, ids = wrap(cost_unit="flops", plans=["PSSP"], keep_first_tokens=0), token_ids(2)
    with FlopCounterMode(display=False) as counter:
        trace = model(ids, energy_budget=0.0).execution
    linear = sum(v for name, v in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))
    processed = float(model.costs.layers[[0, 3], 0].sum())
    assert trace.ran_anyway is None
    assert linear / model.costs.total == pytest.approx((processed + model.costs.head) * ids.numel())


@pytest.mark.parametrize("precisions", [None, ["int8", "int4"]])
def test_a_token_alone_leaves_no_tensors_of_inference_mode_behind(precisions):
    fields = {"plans": ["PSSF"], "precisions": precisions, "keep_first_tokens": 0, **BRIDGES}
    model, ids = wrap(tiny_base("llama"), "plan", **fields), token_ids(1)
    with torch.no_grad():
        cache = model(ids[:, :4], energy_budget=0.3, use_cache=True).past_key_values
        for token in range(4, 7):
            output = model(ids[:, token : token + 1], energy_budget=0.3, past_key_values=cache, use_cache=True)
            output.logits.add_(1)
    model.train()  # what was left out is due now, and a backward goes through it
    later = model(ids[:, 7:], energy_budget=[[1.0] * (ids.shape[1] - 8) + [0.3]], past_key_values=cache, use_cache=True)
    later.logits.sum().backward()
    assert not any(layer.keys.is_inference() for layer in cache.layers)
