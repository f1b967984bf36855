"""The search for a target speedup, on curves that are made up: exact, noisy, with a peak, out of reach."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_anee.speed_search import STEP, Point, TargetNotReached, budgets_between, find_speedup

from .fakes import relaxed, seeds


NOISE = 0.05
marks = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=12)
targets = st.floats(1.0, 6.0)
MOST = 9 + math.ceil(math.log2(100))  # points that a scan and halving need for so many budgets


@st.composite
def curves(draw):
    """Ascending budgets, and speeds that fall with them, some of them alike."""
    speeds = draw(st.lists(st.floats(0.5, 6.0), min_size=1, max_size=100))
    return [(place + 1) / len(speeds) for place in range(len(speeds))], sorted(speeds, reverse=True)


def highest(budgets, speeds, target):
    return max((budget for budget, speed in zip(budgets, speeds, strict=True) if speed >= target), default=None)


@relaxed
@given(curves(), targets)
def test_of_an_exact_curve_the_highest_budget_that_reaches_the_target_is_found(curve, target):
    budgets, speeds = curve
    known, expected = dict(zip(budgets, speeds, strict=True)), highest(*curve, target)
    if expected is None:
        with pytest.raises(TargetNotReached) as error:
            find_speedup(target, budgets, known.__getitem__)
        assert error.value.best == (highest(*curve, speeds[0]), speeds[0]) and len(error.value.tried) <= MOST
        return
    found = find_speedup(target, budgets, known.__getitem__)
    assert (found.budget, found.speedup) == found.tried[-1] == (expected, known[expected])
    assert len(found.tried) <= MOST + 1
    assert all(point == Point(point.budget, known[point.budget]) for point in found.tried)


@relaxed
@given(curves(), targets, seeds)
def test_of_a_noisy_curve_what_is_found_reaches_the_target_within_the_noise(curve, target, seed):
    """What reaches it whatever the noise is never passed over; what never reaches it is never found."""
    budgets, speeds = curve
    noise, known = random.Random(seed), dict(zip(*curve, strict=True))
    sure, possible = (highest(*curve, target / (1.0 + sign * NOISE)) for sign in (-1, 1))
    try:
        found = find_speedup(target, budgets, lambda budget: known[budget] * (1.0 + noise.uniform(-NOISE, NOISE)))
    except TargetNotReached as error:
        assert sure is None and error.best.speedup < target
        return
    assert (sure or 0.0) <= found.budget <= possible
    assert found.tried[-1] == (found.budget, found.speedup) and found.speedup >= target


def test_what_is_found_only_by_luck_gives_way_to_the_next_lower_budget():
    speeds = {0.1: [4.0] * 9, 0.2: [3.0, 3.0, 3.0], 0.3: [2.0, 1.4], 0.4: [1.1], 1.0: [1.0]}
    left = {budget: iter(values) for budget, values in speeds.items()}
    found = find_speedup(1.5, list(speeds), lambda budget: next(left[budget]))
    assert (found.budget, found.speedup) == (0.2, 3.0)
    assert found.tried == ((1.0, 1.0), (0.4, 1.1), (0.3, 2.0), (0.3, 1.4), (0.2, 3.0))


def test_a_peak_in_the_middle_is_found_and_named():
    """Below some budget deciding costs more than it saves."""
    budgets = budgets_between([0.1, 1.0])

    def speed(budget):
        return 0.9 / budget if budget > 0.2 else 3.0

    found = find_speedup(4.0, budgets, speed)
    assert 0.2 < found.budget <= 0.9 / 4.0 < found.budget * STEP
    with pytest.raises(TargetNotReached, match=r"a speedup of 6 .* tried is \d\.\d\d, at energy_budget=0\.2") as error:
        find_speedup(6.0, budgets, speed)
    assert error.value.best.speedup > 3.0


def test_the_best_that_is_named_is_below_the_target_even_after_a_lucky_first_time():
    speeds = iter([1.0, 5.0, 2.0])
    with pytest.raises(TargetNotReached) as error:
        find_speedup(3.0, [0.5, 1.0], lambda budget: next(speeds))
    assert error.value.best == (0.5, 2.0) and error.value.tried == ((1.0, 1.0), (0.5, 5.0), (0.5, 2.0))


@relaxed
@given(marks)
def test_budgets_have_every_mark_and_no_long_steps(marks):
    budgets = budgets_between(marks)
    assert set(marks) <= set(budgets) and budgets[0] == min(marks) and budgets[-1] == max(marks)
    assert all(low < high <= low * STEP * (1 + 1e-9) for low, high in itertools.pairwise(budgets))
