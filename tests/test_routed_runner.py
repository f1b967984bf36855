"""One token alone under a `routed` controller: bit by bit what the general way gives, without its detours."""

import functools

import pytest
import torch

from modeling_anee import AneeForCausalLM
from modeling_anee.budget import Dial
from modeling_anee.executor import Executor
from modeling_anee.routed_runner import RoutedRunner

from .tiny import BRIDGES, tiny_base, token_ids, wrap


PLANS = [
    "4*INT8 / int8",
    "INT8, 2*INT8_SKIP_FFN, INT8 / int8",
    "INT8, SKIP_INT8, INT8_SKIP_FFN, INT8",
    "INT8, 3*SKIP_INT8 / int8",
]
LEAVING = ["PPSP", "PSEE", "PEEE"]
VARIANTS = {
    "full": {},
    "8 bits": {"precisions": ["int8"], "plans": PLANS, "calibration": {"budgets": [0.15, 0.3], "settings": [3.0, -1.0]}},
    "late": {"min_layers": 2},
    "exits": {"plans": LEAVING, "exit_layers": [1, 2], "min_layers": 1},
    "all first": {"keep_first_tokens": 3},
}


@functools.cache
def model_of(family: str = "llama", variants: str = "full", min_layers: int = 1) -> AneeForCausalLM:
    return wrap(tiny_base(family), "routed", **(BRIDGES | {"min_layers": min_layers} | VARIANTS[variants]))


def between(model: AneeForCausalLM, share: float) -> float:
    """A budget between the floor of the router and its dearest plan."""
    controller = model.controller
    return controller.floor + share * (controller.top - controller.floor)


@torch.no_grad()
def decoded(model, ids, budgets):
    """Logits, trace and cache of feeding a sequence token by token, each at its own budget."""
    parts, cache = [], None
    for part, budget in zip(ids.split(1, dim=1), budgets, strict=True):
        parts.append(model(part, energy_budget=budget, past_key_values=cache))
        cache = parts[-1].past_key_values
    return torch.cat([part.logits for part in parts], dim=1), cache.execution_log.trace, cache


def assert_same(model, ids, budgets, monkeypatch):
    """Check one way against the other; the actions that were taken."""
    logits, trace, cache = decoded(model, ids, budgets)
    with monkeypatch.context() as patch:
        patch.setattr(RoutedRunner, "takes", lambda *_: False)
        expected, expected_trace, expected_cache = decoded(model, ids, budgets)
    assert torch.equal(logits, expected)
    assert (trace.head is None) == (expected_trace.head is None)
    for name in ("actions", "cost", "account", "valid") + (("head",) if trace.head is not None else ()):
        assert torch.equal(getattr(trace, name), getattr(expected_trace, name)), name
    for layer, other in zip(cache.layers, expected_cache.layers, strict=True):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)
    return trace.actions[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("variants", VARIANTS)
def test_it_does_what_the_controller_decides(family, variants, monkeypatch):
    model, ids = model_of(family, variants), token_ids(1, 20)
    moving = [between(model, share) for share in torch.linspace(-0.1, 1.3, 20).tolist()]
    taken = torch.cat([assert_same(model, ids, [between(model, share)] * 20, monkeypatch) for share in (0.1, 0.5, 0.8)])
    taken = torch.cat([taken, assert_same(model, ids, [min(max(one, 0.0), 1.0) for one in moving], monkeypatch)])
    assert len(taken.unique(dim=0)) > 1


@pytest.mark.parametrize("start", [0, 4])
def test_a_decision_before_the_first_layer_or_never(start, monkeypatch):
    for variants in ("full", "8 bits"):
        assert_same(model_of("llama", variants, start), token_ids(1, 8), [0.2] * 8, monkeypatch)


@torch.no_grad()
def test_a_dial_that_is_set_anew_and_a_router_that_is_trained_on_count_at_once(monkeypatch):
    model, ids = wrap(controller="routed", min_layers=1, **BRIDGES), token_ids(1, 12)
    budgets = [between(model, 0.5)] * 12
    taken = [assert_same(model, ids, budgets, monkeypatch)]
    model.controller.dial = Dial({"budgets": [0.3, 0.9], "settings": [9.0, 8.0]}, neutral=0.0)
    taken.append(assert_same(model, ids, budgets, monkeypatch))
    model.controller.predictor[-1].bias.add_(torch.linspace(-4.0, 4.0, len(model.controller.plans)))
    taken.append(assert_same(model, ids, budgets, monkeypatch))
    model.config.router_budgets = [0.5]
    model.controller.predictor[-1].weight.data = model.controller.predictor[-1].weight[:2]
    model.controller.predictor[-1].bias.data = model.controller.predictor[-1].bias[:2]
    model.controller.bind(model.costs)
    taken.append(assert_same(model, ids, budgets, monkeypatch))
    assert len({str(one.tolist()) for one in taken}) >= 3


@torch.no_grad()
def test_nobody_is_asked_by_way_of_tensors(monkeypatch):
    model, ids = model_of(), token_ids(1, 6)
    cache = model(ids[:, :5], energy_budget=0.5).past_key_values
    monkeypatch.setattr(Executor, "_decide", None)
    assert model(ids[:, 5:], energy_budget=0.5, past_key_values=cache).execution.actions.shape == (1, 1, 4)


@pytest.mark.parametrize("change", ["budget", "first", "gradients", "padding", "strict"])
def test_it_takes_no_other_tokens(change, monkeypatch):
    model, ids = model_of(variants="all first"), token_ids(1, 6)
    if change == "strict":
        model = wrap(controller="routed", budget_mode="strict", **BRIDGES)
    monkeypatch.setattr(RoutedRunner, "run", None)
    fields = {
        "energy_budget": 1.0 if change == "budget" else 0.5,
        "past_key_values": None if change == "first" else model(ids, energy_budget=1.0).past_key_values,
    }
    if change == "padding":
        fields["attention_mask"] = torch.tensor([[0] + [1] * 6])
    with torch.set_grad_enabled(change == "gradients"):
        model(ids[:, :1], **fields)


@torch.no_grad()
def test_a_trace_that_is_written_to_changes_nothing():
    model, ids = model_of(variants="8 bits"), token_ids(1, 6)
    budgets = [between(model, 0.5)] * 6
    _, expected, cache = decoded(model, ids, budgets)
    for step in cache.execution_log.steps:
        step.actions.fill_(0)
        step.head.fill_(0)
    assert torch.equal(decoded(model, ids, budgets)[1].actions, expected.actions)
