"""Samples, schedules and losses of gates."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_anee.training import gating


NUMBERS = st.floats(-8, 8, width=32)
TEMPERATURES = st.floats(0.1, 4)


def noise(*shape, seed=0):
    return gating.logistic_noise(shape, torch.Generator().manual_seed(seed))


# Samples


@given(logit=NUMBERS, forward=TEMPERATURES, backward=TEMPERATURES)
def test_gates_are_0_or_1_and_learn_as_a_sigmoid_does(logit, forward, backward):
    logits = torch.full((7,), logit, requires_grad=True)
    drawn = noise(7)
    gates = gating.gumbel_sigmoid(logits, drawn, forward, backward)
    assert set(gates.detach().round(decimals=5).tolist()) <= {0.0, 1.0}
    gates.sum().backward()
    soft = torch.sigmoid((logit + forward * drawn) / backward)
    torch.testing.assert_close(logits.grad, soft * (1 - soft) / backward)


@pytest.mark.parametrize(("logit", "forward"), [(0.0, 1.0), (1.0, 1.0), (1.0, 0.5), (-2.0, 2.0)])
def test_how_often_gates_open_follows_the_temperature_of_the_forward_alone(logit, forward):
    drawn = noise(20000)
    for backward in (0.1, 3.0):
        gates = gating.gumbel_sigmoid(torch.full((20000,), logit), drawn, forward, backward)
        assert abs(float(gates.mean()) - 1 / (1 + math.exp(-logit / forward))) < 0.02


@given(logits=st.lists(NUMBERS.filter(lambda x: abs(x) > 1e-3), min_size=1))
def test_at_temperature_0_only_the_logit_decides(logits):
    logits = torch.tensor(logits)
    gates = gating.gumbel_sigmoid(logits, noise(len(logits)), 0.0, 1.0)
    torch.testing.assert_close(gates, (logits > 0).float())


# Schedules


def test_the_lowest_capacity_need_not_fall():
    assert [gating.lowest_capacity(step, 3, 0.4, 0.0) for step in range(3)] == [0.4, 0.4, 0.4]


@given(steps=st.integers(1, 100), lowest=st.floats(0, 1), first=TEMPERATURES, last=TEMPERATURES)
def test_schedules_go_one_way_between_their_ends(steps, lowest, first, last):
    capacities = [gating.lowest_capacity(step, steps, lowest, 0.5) for step in range(steps)]
    assert capacities[0] == 1.0 and capacities == sorted(capacities, reverse=True) and capacities[-1] >= lowest
    assert steps < 3 or capacities[-1] == lowest
    temperatures = [gating.annealed(step, steps, first, last) for step in range(steps)]
    assert temperatures[0] == first
    assert steps == 1 or math.isclose(temperatures[-1], last)
    assert all(min(first, last) - 1e-9 <= one <= max(first, last) + 1e-9 for one in temperatures)


@given(layers=st.integers(1, 40), highest=st.floats(0, 1))
def test_layers_are_dropped_more_often_with_depth(layers, highest):
    shares = gating.layer_dropout(layers, highest)
    assert shares.shape == (layers,) and shares[0] == 0.0 and bool((shares.diff() >= 0).all())
    assert layers == 1 or math.isclose(float(shares[-1]), highest, abs_tol=1e-6)


# Losses


@given(logits=st.lists(NUMBERS, min_size=1), bigger=st.floats(1.1, 3))
def test_a_z_loss_grows_with_the_logits_whatever_their_sign(logits, bigger):
    logits = torch.tensor(logits)
    plain, negated, larger = (gating.z_loss(gating.two_way(one)) for one in (logits, -logits, bigger * logits))
    assert plain >= math.log(2) ** 2 - 1e-6
    torch.testing.assert_close(plain, negated)
    assert larger >= plain - 1e-6


@given(logits=st.lists(NUMBERS, min_size=1))
def test_entropy_is_that_of_bernoulli(logits):
    logits = torch.tensor(logits)
    expected = torch.distributions.Bernoulli(logits=logits).entropy().mean()
    torch.testing.assert_close(gating.gate_entropy(logits), expected, atol=1e-5, rtol=1e-4)
    assert math.isclose(float(gating.gate_entropy(torch.zeros(3))), math.log(2), rel_tol=1e-6)


@given(gates=st.lists(st.integers(0, 1), min_size=1), capacity=st.floats(0, 1))
def test_a_capacity_costs_nothing_where_it_is_met(gates, capacity):
    gates = torch.tensor(gates, dtype=torch.float32)
    assert gating.capacity_penalty(gates, float(gates.mean())) < 1e-10
    assert math.isclose(float(gating.capacity_penalty(gates, capacity)), (float(gates.mean()) - capacity) ** 2, abs_tol=1e-6)


def test_the_best_prediction_is_the_logarithm_of_the_mean():
    losses = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 3
    best = losses.mean().log()
    assert all(gating.misfit(best, losses) < gating.misfit(best + error, losses) for error in (-0.1, 0.1))


# Exits


@given(leaves=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6))
def test_every_token_leaves_once_or_stays(leaves):
    shares = gating.shares_of_exits(torch.tensor(leaves))
    assert len(shares) == len(leaves) + 1 and bool((shares >= 0).all())
    assert math.isclose(float(shares.sum()), 1.0, rel_tol=1e-5)


def test_tokens_leave_at_the_first_open_gate():
    leaves = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    assert gating.shares_of_exits(leaves).argmax(dim=-1).tolist() == [1, 3, 0]


# Capacity


@given(scores=st.lists(st.integers(-1000, 1000), min_size=1, unique=True), capacity=st.floats(0, 1))
def test_a_threshold_keeps_the_asked_share(scores, capacity):
    scores = torch.tensor(scores, dtype=torch.float32)
    share = float((scores > gating.threshold(scores, capacity)).float().mean())
    assert abs(share - capacity) <= 0.5 / len(scores) + 1e-6


@pytest.mark.parametrize("scale, shift", [(0.3, -1.0), (1.0, 0.0), (2.0, 3.0)])
def test_what_is_said_becomes_the_expected_loss(scale, shift):
    said = torch.randn(20000, generator=torch.Generator().manual_seed(0)) - 1.5
    lost = (scale * said + shift).exp() * -torch.rand(20000, generator=torch.Generator().manual_seed(1)).log()
    found = gating.expectation(said, lost)
    assert abs(found[0] - scale) < 0.03 and abs(found[1] - shift) < 0.06
    predicted = found[0] * said + found[1]
    lowest = said < said.quantile(0.1)
    assert abs(float(lost[lowest].mean() / predicted[lowest].exp().mean()) - 1.0) < 0.1


def test_nothing_is_expected_of_what_says_nothing():
    """Whatever is said, or always the same, the mean loss is expected."""
    lost = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    for said in (torch.full((5000,), 10.0), torch.randn(5000, generator=torch.Generator().manual_seed(1))):
        scale, shift = gating.expectation(said, lost)
        assert abs(float((scale * said + shift).exp().mean()) - 0.5) < 0.03
