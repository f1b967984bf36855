"""Entropy and mutual information, at their bounds and against definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_anee.evaluation.entropy import entropy, information


relaxed = settings(deadline=None, derandomize=True, max_examples=60)
counts_of = st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=2, max_size=5).filter(
    lambda rows: sum(map(sum, rows)) > 0
)


@given(st.integers(1, 64))
@relaxed
def test_entropy_lies_between_a_sure_choice_and_an_even_one(count):
    assert float(entropy(torch.eye(count, dtype=torch.float64)[0])) == 0.0
    assert float(entropy(torch.full((count,), 1.0 / count, dtype=torch.float64))) == pytest.approx(math.log2(count))


@given(counts_of)
@relaxed
def test_information_is_within_the_entropies_and_the_same_both_ways(rows):
    counts = torch.tensor(rows)
    shares = counts.double() / counts.sum()
    told = information(counts)
    assert 0.0 <= told <= min(float(entropy(shares.sum(dim=0))), float(entropy(shares.sum(dim=1)))) + 1e-9
    assert told == pytest.approx(information(counts.T))


@given(st.lists(st.integers(1, 30), min_size=2, max_size=4), st.lists(st.integers(1, 30), min_size=2, max_size=4))
@relaxed
def test_what_is_independent_tells_nothing_and_what_is_the_same_tells_all(rows, columns):
    assert information(torch.tensor(rows).unsqueeze(1) * torch.tensor(columns)) == 0.0
    many = 100_000 * torch.tensor(rows)
    assert information(torch.diag(many)) == pytest.approx(float(entropy(many.double() / many.sum())), abs=1e-4)


def test_chance_is_taken_off():
    """Draws that are independent tell nothing in the mean, however few they are."""
    generator = torch.Generator().manual_seed(0)
    told = []
    for _ in range(200):
        places = torch.randint(12, (60,), generator=generator)
        told.append(information(torch.bincount(places, minlength=12).view(4, 3)))
    assert sum(told) / len(told) < 0.03  # without it 0.07
