"""Bridges: nothing at first, nothing without a rank, in the dtype of the hidden states, and what they add is the delta."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_anee import AneeForCausalLM
from modeling_anee.bridges import Bridge, Bridges, normalised

from .fakes import HIDDEN, configuration, relaxed, states
from .tiny import BRIDGES, FAMILIES, tiny_base, token_ids, wrap


def random_bridge(rank: int = 3, seed: int = 0) -> Bridge:
    torch.manual_seed(seed)
    bridge = Bridge(HIDDEN, rank).requires_grad_(False)
    for parameter in bridge.parameters():
        parameter.normal_()
    return bridge


def layers_of(bridges: Bridges) -> dict[str, list[int]]:
    answers = {"skip": bridges.of_skip, "skip_ffn": bridges.of_skip_ffn, "exit": bridges.of_exit}
    return {name: [layer for layer in range(5) if answer(layer) is not None] for name, answer in answers.items()}


@pytest.mark.parametrize("rank", [1, HIDDEN, 3 * HIDDEN])
def test_untrained_or_reset_it_changes_nothing(rank):
    hidden = states(5)
    trained = random_bridge(rank)
    assert not torch.equal(trained(hidden), hidden)
    trained.up.reset_parameters()
    for untrained in (trained, Bridge(HIDDEN, rank)):
        assert torch.equal(untrained(hidden), hidden)
        untrained.requires_grad_(True)(hidden).square().sum().backward()
        assert untrained.up.weight.grad.abs().sum() > 0  # so that it can be trained


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_bridges_leave_a_model_as_it_is_without_any(family):
    base, ids = tiny_base(family), token_ids()
    plans = ["PSFP", "SPFF", "PFEE"]
    without = AneeForCausalLM.from_base(base, controller="plan", plans=plans)
    untrained = AneeForCausalLM.from_base(base, controller="plan", plans=plans, **BRIDGES)
    actions = torch.tensor([[0, 1, 3, 0], [1, 0, 3, 3], [0, 3, 2, 2]], dtype=torch.uint8)
    for plan in actions:
        budget = float(without.costs.of_plans(plan)), float(untrained.costs.of_plans(plan))
        assert budget[0] < budget[1]  # what they cost is charged all the same
        first, second = (model(ids, energy_budget=b) for model, b in zip((without, untrained), budget, strict=True))
        assert (first.execution.actions[:, 1:] == plan).all() and (second.execution.actions[:, 1:] == plan).all()
        torch.testing.assert_close(first.logits, second.logits)


def test_rank_0_is_none():
    bridges = Bridges(configuration("plan", 5, bridge_layers=[1], ffn_bridge_layers=[2], exit_layers=[3]))
    assert not list(bridges.parameters())
    assert layers_of(bridges) == {"skip": [], "skip_ffn": [], "exit": []}


def test_layers_are_those_that_are_listed():
    bridges = Bridges(configuration("plan", 5, **BRIDGES))
    assert layers_of(bridges) == {"skip": [0, 1, 2, 3, 4], "skip_ffn": [0, 1, 2, 3, 4], "exit": [0, 1, 2, 3, 4]}
    bridges = Bridges(configuration("plan", 5, **BRIDGES, bridge_layers=[3, 1], ffn_bridge_layers=[], exit_layers=[4]))
    assert layers_of(bridges) == {"skip": [1, 3], "skip_ffn": [], "exit": [4]}
    assert len({id(module) for module in bridges.modules() if isinstance(module, Bridge)}) == 3
    assert {name for name, _ in bridges.named_parameters()} == {
        f"{where}.{part}" for where in ("skip.1", "skip.3", "exit.4") for part in ("down.weight", "up.weight", "up.bias")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_the_result_has_the_dtype_of_the_hidden_states(dtype, own):
    bridge, hidden = random_bridge().to(own), states(5)
    out = bridge(hidden.to(dtype))
    assert out.dtype == dtype and bridge.delta(hidden.to(dtype)).dtype == own
    torch.testing.assert_close(out.float(), random_bridge()(hidden), atol=0.2, rtol=0.05)


@given(st.integers(1, 9), st.integers(0, 2**31), st.sampled_from([(), (2,), (2, 3)]))
@relaxed
def test_what_it_adds_is_the_delta_of_the_normalised_state(rank, seed, rows):
    bridge = random_bridge(rank, seed)
    hidden = torch.randn(*rows, HIDDEN, generator=torch.Generator().manual_seed(seed))
    delta = bridge.delta(hidden)
    torch.testing.assert_close(bridge(hidden), hidden + delta)
    unit = hidden.double() / hidden.double().square().mean(dim=-1, keepdim=True).sqrt()
    expected = unit @ bridge.down.weight.double().T @ bridge.up.weight.double().T + bridge.up.bias.double()
    torch.testing.assert_close(delta.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bridge.delta(100 * hidden), delta, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e15])
def test_odd_hidden_states_stay_finite(value):
    assert normalised(torch.full((2, HIDDEN), value)).isfinite().all()
    assert random_bridge()(torch.full((2, HIDDEN), value)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_is_cast_runs(dtype):
    model = wrap(tiny_base(), "plan", plans=["PSFE", "FSPP"], **BRIDGES)
    expected = model(token_ids(), energy_budget=0.6)
    output = model.to(dtype)(token_ids(), energy_budget=0.6)
    assert output.logits.dtype == dtype and {parameter.dtype for parameter in model.bridges.parameters()} == {dtype}
    if dtype == torch.float64:
        torch.testing.assert_close(output.logits.float(), expected.logits, atol=1e-4, rtol=1e-4)
