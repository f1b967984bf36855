"""Signals of a token are those of the definitions, and depend on nothing but that token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_anee.signals import SIGNALS, SignalProbe, state_vector


HIDDEN = 16


def random_probe(seed: int = 0) -> SignalProbe:
    torch.manual_seed(seed)
    probe = SignalProbe(HIDDEN).requires_grad_(False)
    probe.linear.weight.normal_()
    probe.linear.bias.normal_()
    return probe


def random_states(tokens: int, seed: int = 0, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden, previous = scale * torch.randn(2, tokens, HIDDEN, generator=generator)
    return hidden, previous, torch.rand(tokens, generator=generator, dtype=torch.float64)


def test_there_are_seven_signals_in_order():
    hidden, previous, remaining = random_states(5)
    vector = state_vector(random_probe(), hidden, previous, 0.5, remaining)
    assert vector.shape == (5, len(SIGNALS)) == (5, 7) and vector.dtype == torch.float32
    named = dict(zip(SIGNALS, vector.unbind(dim=1), strict=True))
    for token in range(5):
        h, p = hidden[token].double(), previous[token].double()
        rms, mean = math.sqrt(sum(h**2) / HIDDEN), sum(h) / HIDDEN
        expected = {
            "hidden_norm": math.log(rms),
            "delta_norm": math.sqrt(sum((h - p) ** 2) / HIDDEN) / rms,
            "activation_variance": math.log(sum((h - mean) ** 2) / HIDDEN),
            "relative_depth": 0.5,
            "remaining_budget": float(remaining[token]),
        }
        assert {name: float(named[name][token]) for name in expected} == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(vector[:, :2], random_probe()(hidden))


def test_an_untrained_probe_answers_one_half_and_so_does_one_that_was_reset():
    hidden, _, _ = random_states(4)
    probe = random_probe()
    assert not torch.allclose(probe(hidden), torch.tensor(0.5))
    probe.reset_parameters()
    for untrained in (probe, SignalProbe(HIDDEN)):
        assert torch.equal(untrained(hidden), torch.full((4, 2), 0.5))


@given(st.integers(0, 2**31), st.sampled_from([1.0, 30.0, 1e4]))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_the_probe_stays_within_bounds_and_ignores_the_scale(seed, scale):
    probe, (hidden, _, _) = random_probe(seed), random_states(6, seed)
    answer = probe(scale * hidden)
    assert ((answer >= 0) & (answer <= 1)).all()
    torch.testing.assert_close(answer, probe(hidden), rtol=1e-3, atol=1e-3)


@given(st.integers(1, 8), st.integers(0, 2**31), st.data())
@settings(deadline=None, derandomize=True, max_examples=30)
def test_signals_of_a_token_do_not_depend_on_the_others(tokens, seed, data):
    probe, states = random_probe(), random_states(tokens, seed)
    chosen = data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=5))
    together = state_vector(probe, *states[:2], 0.25, states[2])
    alone = state_vector(probe, *(state[chosen] for state in states[:2]), 0.25, states[2][chosen])
    torch.testing.assert_close(alone, together[chosen])


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e18])
def test_signals_of_odd_hidden_states_are_finite(value):
    hidden = torch.full((2, HIDDEN), value)
    vector = state_vector(random_probe(), hidden, torch.zeros_like(hidden), 0.0, torch.zeros(2, dtype=torch.float64))
    assert vector.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_signals(dtype):
    hidden, previous, remaining = random_states(5)
    low = state_vector(random_probe(), hidden.to(dtype), previous.to(dtype), 0.5, remaining)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, state_vector(random_probe(), hidden, previous, 0.5, remaining), rtol=2e-2, atol=2e-2)


def test_no_change_means_no_delta():
    hidden, _, remaining = random_states(5)
    vector = state_vector(random_probe(), hidden, hidden, 0.0, remaining)
    assert torch.equal(vector[:, SIGNALS.index("delta_norm")], torch.zeros(5))
