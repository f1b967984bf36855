"""One token alone under a `gated` controller: the same as any other way of running it, without its detours."""

import functools

import pytest
import torch

from modeling_anee import AneeForCausalLM
from modeling_anee.executor import Executor
from modeling_anee.gated_runner import GatedRunner

from .tiny import BRIDGES, calibration_of_gates, tiny_base, token_ids, wrap


VARIANTS = {
    "none": {},
    "8 bits": {"precisions": ["int8"]},
    "three": {"precisions": ["int8", "int4"], "gated_variants": ["int8", "int4", "none"]},
    "no bridges": {"ffn_bridge_rank": 0, "exit_translator_rank": 0},
}


@functools.cache
def model_of(family: str = "llama", variants: str = "none", mode: str = "average") -> AneeForCausalLM:
    return wrap(tiny_base(family), "gated", budget_mode=mode, **(BRIDGES | {"exit_layers": [2, 3]} | VARIANTS[variants]))


def between(model: AneeForCausalLM, share: float) -> float:
    """A budget between the cheapest way and the fixed plans."""
    controller = model.controller
    low = controller.head_cost + controller.rest[0]
    return low + share * (controller.top - low)


def calibrate_between(model: AneeForCausalLM) -> None:
    model.config.calibration = calibration_of_gates(model.config, (between(model, 0.2), between(model, 0.9)))
    model.controller.bind(model.costs)


@torch.no_grad()
def decoded(model, ids, budget):
    """Logits, trace and cache of feeding a sequence token by token."""
    parts, cache = [], None
    for part in ids.split(1, dim=1):
        parts.append(model(part, energy_budget=budget, past_key_values=cache))
        cache = parts[-1].past_key_values
    return torch.cat([part.logits for part in parts], dim=1), cache.execution_log.trace, cache


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3_text"])
@pytest.mark.parametrize("variants", VARIANTS)
@pytest.mark.parametrize("mode", ["average", "strict"])
def test_it_does_what_the_controller_decides(family, variants, mode, monkeypatch):
    model, ids = model_of(family, variants, mode), token_ids(1, 16)
    calibrate_between(model)
    taken = set()
    for share in (0.1, 0.5, 0.8):
        budget = between(model, share)
        logits, trace, cache = decoded(model, ids, budget)
        with monkeypatch.context() as patch:
            patch.setattr(GatedRunner, "takes", lambda *_: False)
            expected, expected_trace, expected_cache = decoded(model, ids, budget)
        torch.testing.assert_close(logits, expected, atol=2e-3 if model.config.precisions else 2e-5, rtol=1e-4)
        assert torch.equal(trace.actions, expected_trace.actions)
        torch.testing.assert_close(trace.cost, expected_trace.cost)
        assert (trace.head is None) == (expected_trace.head is None)
        assert trace.head is None or torch.equal(trace.head, expected_trace.head)
        for layer, other in zip(cache.layers, expected_cache.layers, strict=True):
            torch.testing.assert_close(layer.keys, other.keys, atol=2e-3, rtol=1e-4)
        taken.update(trace.actions[:, 1:].unique().tolist())
    assert len(taken) > 1


def test_nobody_is_asked_by_way_of_tensors(monkeypatch):
    model, ids = model_of(), token_ids(1, 6)
    calibrate_between(model)
    cache = model(ids[:, :5], energy_budget=0.5).past_key_values
    monkeypatch.setattr(Executor, "_decide", None)
    with torch.no_grad():
        output = model(ids[:, 5:], energy_budget=between(model, 0.5), past_key_values=cache)
    assert output.execution.actions.shape == (1, 1, 4)


@pytest.mark.parametrize("change", ["budget", "first", "gradients", "padding"])
def test_it_takes_no_other_tokens(change, monkeypatch):
    model, ids = model_of(), token_ids(1, 6)
    calibrate_between(model)
    monkeypatch.setattr(GatedRunner, "run", None)
    fields = {
        "energy_budget": 0.5,
        "past_key_values": None if change == "first" else model(ids, energy_budget=1.0).past_key_values,
    }
    if change == "budget":
        fields["energy_budget"] = 1.0
    if change == "padding":
        fields["attention_mask"] = torch.tensor([[0] + [1] * 6])
    with torch.set_grad_enabled(change == "gradients"):
        model(ids[:, :1], **fields)


@torch.no_grad()
def test_gates_that_are_trained_on_count_at_once():
    model, ids = wrap(tiny_base(), "gated", exit_layers=[2], **BRIDGES), token_ids(1, 6)
    calibrate_between(model)
    budget = between(model, 0.5)
    decoded(model, ids, budget)
    for change in (lambda bank: bank.bias.fill_(50.0), lambda bank: bank.bias.fill_(-50.0), lambda bank: bank.weight.zero_()):
        change(model.controller.routers)
        change(model.controller.gates)
        assert torch.equal(decoded(model, ids, budget)[1].actions, model(ids, energy_budget=budget).execution.actions)
    model.controller.routers.weight.data = torch.randn(4, 32)
    model.controller.routers.bias.zero_()
    model.controller.gates.bias.fill_(50.0)
    assert torch.equal(decoded(model, ids, budget)[1].actions, model(ids, energy_budget=budget).execution.actions)


@torch.no_grad()
def test_what_is_left_out_is_not_run(monkeypatch):
    """Feed-forwards are run exactly where the trace says so."""
    model, ids, ran = model_of(), token_ids(1, 8), []
    calibrate_between(model)
    runner = model.executor.alone
    halves = [
        [_noting(half, layer, number, ran) for number, half in enumerate(own)] for layer, own in enumerate(runner._halves)
    ]
    monkeypatch.setattr(runner, "_halves", halves)
    cache, claimed = model(ids[:, :1], energy_budget=0.5).past_key_values, []
    for part in ids[:, 1:].split(1, dim=1):
        trace = model(part, energy_budget=between(model, 0.5), past_key_values=cache).execution
        for layer, action in enumerate(trace.actions[0, 0].tolist()):
            if action != model.controller.leave:
                claimed.append((layer, model.controller.choices.tolist().index(action)))
    assert ran == claimed and {number for _, number in ran} == {0, 1}


def _noting(half, layer, number, ran):
    def run(row):
        ran.append((layer, number))
        return half(row)

    return run
