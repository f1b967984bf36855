"""Dials beside controls at equal milliseconds: the best within a time, a dial's loss between its points, and both as tables."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_anee.evaluation.equal_time import Point, as_text, best_within, compare_times, loss_at
from modeling_anee.evaluation.report import check_figures


TIMES, LOSSES = st.floats(0.1, 100.0), st.floats(-1.0, 10.0)
POINTS = st.lists(st.builds(Point, st.text(max_size=2), TIMES, LOSSES), max_size=6)


@given(POINTS, TIMES)
def test_the_best_within_a_time_is_no_slower_and_nothing_else_there_is_better(points, milliseconds):
    best = best_within(points, milliseconds)
    within = [point for point in points if point.milliseconds <= milliseconds]
    assert (best is None) == (not within)
    if best is not None:
        assert best in within and all((best.loss, best.milliseconds) <= (one.loss, one.milliseconds) for one in within)


@given(POINTS, TIMES)
def test_a_loss_lies_between_those_of_the_neighbours_and_is_known_within_the_ends_alone(points, milliseconds):
    loss = loss_at(points, milliseconds)
    faster = [point for point in points if point.milliseconds <= milliseconds]
    slower = [point for point in points if point.milliseconds >= milliseconds]
    assert (loss is None) == (not faster or not slower)
    if loss is not None:
        low, high = max(point.milliseconds for point in faster), min(point.milliseconds for point in slower)
        ends = [min(point.loss for point in points if point.milliseconds == end) for end in (low, high)]
        assert min(ends) - 1e-9 <= loss <= max(ends) + 1e-9


@given(TIMES, TIMES, LOSSES, LOSSES, st.floats(0.0, 1.0))
def test_two_points_are_joined_by_a_line(low, gap, one, other, share):
    points = [Point("", low + gap, other), Point("", low, one)]
    between = low + share * gap
    exact = (between - low) / (points[0].milliseconds - low)
    assert loss_at(points, between) == pytest.approx(one + exact * (other - one), abs=1e-6)


@given(POINTS)
def test_a_point_of_a_dial_has_its_own_loss_unless_another_is_as_fast(points):
    for point in points:
        alike = [one.loss for one in points if one.milliseconds == point.milliseconds]
        assert loss_at(points, point.milliseconds) == min(alike)


def row(name, budget, milliseconds, ratio, **more):
    return {"name": name, "budget": budget, "milliseconds": milliseconds, "ratio": ratio} | more


ROWS = [
    row("base", 1.0, 20.0, 1.0),
    row("INT8", 0.25, 10.0, 1.1, fixed=True),
    row("fast", 0.1, 1.0, 9.0, fixed=True),
    row("random", 0.5, 8.0, 3.0),
    row("oracle", 0.5, None, 1.01),
    row("mine", 0.5, 15.0, 1.05),
    row("mine", 0.2, 8.0, 1.2),
    row("other", 0.2, 0.5, 4.0),
]


def test_every_point_of_a_dial_is_beside_the_best_control_that_is_no_slower():
    found = compare_times(ROWS, ["mine", "other"])
    check_figures(found)
    beside = {entry["name"]: (entry["control"], entry["control_milliseconds"]) for entry in found["dials"]}
    assert beside == {"mine at 0.5": ("INT8", 10.0), "mine at 0.2": ("random at 0.5", 8.0), "other at 0.2": (None, None)}
    ratios = [entry["ratio"] for entry in found["dials"]]
    assert ratios[:2] == pytest.approx([1.05 / 1.1, 1.2 / 3.0]) and ratios[2] is None


def test_the_base_is_the_control_of_what_is_slower_and_the_dearest_point_of_every_dial():
    found = compare_times([*ROWS, row("mine", 0.9, 21.0, 1.02)], ["mine"])
    assert found["dials"][-1]["control"] == "base at 1" and found["dials"][-1]["ratio"] == pytest.approx(1.02)
    found = compare_times([ROWS[0], row("INT8", 0.25, 18.0, 1.1, fixed=True), row("mine", 0.5, 15.0, 1.05)], ["mine"])
    assert found["controls"][0]["ratio"] == pytest.approx(math.exp(0.4 * math.log(1.05)) / 1.1)


def test_a_control_is_beside_each_dial_that_is_timed_on_both_sides_of_it():
    found = compare_times(ROWS, ["mine", "other"])["controls"]
    named = [(entry["name"], entry["dial"]) for entry in found]
    assert named == [
        ("INT8", "mine"),
        ("INT8", "other"),
        ("fast", "other"),
        ("random at 0.5", "mine"),
        ("random at 0.5", "other"),
    ]
    between = math.exp((math.log(1.2) * 5 + math.log(1.05) * 2) / 7)
    assert found[0]["ratio"] == pytest.approx(between / 1.1) and found[3]["ratio"] == pytest.approx(1.2 / 3.0)


def test_tables_are_markdown():
    found = compare_times(ROWS, ["mine", "other"])
    dials, controls = (part.splitlines() for part in as_text(found).split("\n\n"))
    assert len(dials) == 2 + 3 and {line.count("|") for line in dials} == {6}
    assert len(controls) == 2 + 5 and {line.count("|") for line in controls} == {5}
    assert "| mine at 0.5 | 15.00 | INT8 | 10.00 | 0.955 |" in dials and "| other at 0.2 | 0.50 | none |  |  |" in dials
