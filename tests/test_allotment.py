"""Stages fitted to a time."""

import pytest

from modeling_anee.training.allotment import DoesNotFit, Effort, allot, least_seconds


def test_what_is_allotted_fits_and_uses_the_time():
    efforts = {"a": Effort(2, 1000, 1.0, 0.5, 0.7), "b": Effort(10, 40, 0.0, 1.0, 0.2), "c": Effort(1, 2, 3.0, 2.0, 0.1)}
    assert least_seconds(efforts) == 2.0 + 10.0 + 5.0
    before = {"a": 0, "b": 0, "c": 0}
    for seconds in (17.0, 20.0, 60.0, 200.0, 400.0):
        counts = allot(efforts, seconds)
        total = sum(efforts[name].seconds(count) for name, count in counts.items())
        assert seconds - 2.0 <= total <= seconds
        assert all(efforts[name].least <= count <= efforts[name].most for name, count in counts.items())
        assert all(counts[name] >= before[name] for name in counts)
        before = counts
    assert allot(efforts, 1e6) == {"a": 1000, "b": 40, "c": 2}
    with pytest.raises(DoesNotFit, match="16 s are not enough: the least is 17 s"):
        allot(efforts, 16.0)
