"""Calibration of a `gated` controller: capacities are found and kept, and an interrupted search goes on."""

import math

import pytest
import torch

from modeling_anee.training import gate_calibration
from modeling_anee.training.gate_calibration import Point, calibrate_gates, columns, measured, nearest_point
from modeling_anee.training.run import Run
from modeling_anee.training.stages import calibration

from .tiny import BRIDGES, randomise_gates
from .workshop import make_workshop, recipe_of


CAPACITIES = [0.6, 0.75, 0.9]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workshop")
    make_workshop(folder)
    return folder


def opened(workshop, folder, asked=None, **fields):
    anee = {"controller": "gated", "exit_layers": [2, 3], **BRIDGES} | fields
    recipe = recipe_of(
        workshop,
        length=32,
        text={"calibrate": [{"file": "text.txt", "tokens": 1000}]},
        anee=anee,
        stages={"calibration": {"windows": 20} | (asked or {"capacities": CAPACITIES})},
    )
    run = Run.open(recipe, folder, workshop / "data")
    if fields.get("controller", "gated") == "gated":
        randomise_gates(run.model.controller)
        run.model.controller.gates.bias.data.fill_(2.0)
    return run


@pytest.mark.parametrize("fields", [{}, {"precisions": ["int8"]}, {"budget_mode": "strict"}])
def test_each_capacity_is_realised_by_forward_and_budgets_are_its_costs(workshop, tmp_path, fields):
    run = opened(workshop, tmp_path, **fields)
    table = calibration.run_stage(run)["calibration"]
    assert table["budgets"] == pytest.approx(table["cost"], abs=0.01) or run.model.controller.strict
    assert table["settings"] == pytest.approx(CAPACITIES, abs=0.02)
    run.model.config.calibration = table
    run.model.config.check()
    run.model.controller.bind(run.model.costs)
    windows = run.windows("calibrate")[:20]
    for budget, capacity in zip(table["budgets"], table["settings"], strict=True):
        trace = run.model(windows, energy_budget=budget, use_cache=False).execution
        if not run.model.controller.strict:
            assert trace.capacity == pytest.approx(capacity, abs=0.02) and trace.mean_cost == pytest.approx(budget, abs=0.01)


def test_an_interrupted_search_goes_on_where_it_was(workshop, tmp_path, monkeypatch):
    whole = calibrate_gates(*arguments(opened(workshop, tmp_path / "a")))
    run, left = opened(workshop, tmp_path / "b"), [5]

    def dying(*args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return measured(*args)

    with monkeypatch.context() as patch:
        patch.setattr(gate_calibration, "measured", dying)
        with pytest.raises(KeyboardInterrupt):
            calibrate_gates(*arguments(run))
    assert calibrate_gates(*arguments(run)) == whole


def arguments(run):
    return run, run.windows("calibrate")[:20], CAPACITIES, "calibration"


@pytest.mark.parametrize("scale", [0.3, 1.0, 6.0])
def test_few_measurements_find_a_capacity_on_a_curve(scale):
    def measure(price):
        asked.append(price)
        return Point(price, 0.1 + 0.9 / (1 + math.exp((price - 2) / scale)), -price)

    asked, points = [], []
    points += [measure(-20.0), measure(20.0)]
    for capacity in (0.97, 0.9, 0.7, 0.4, 0.2):
        assert abs(nearest_point(capacity, points, measure).capacity - capacity) <= gate_calibration.TOLERANCE
    assert len(asked) < 40
    assert nearest_point(0.05, points, measure).price == 20.0  # out of reach


def test_rows_ascend_below_the_fixed_plans_or_there_are_none(workshop, tmp_path):
    controller = opened(workshop, tmp_path).model.controller
    points = [Point(0.0, 0.9, 0.8), Point(1.0, 0.8, 0.82), Point(2.0, 0.7, 0.6), Point(-9.0, 1.0, 1.01)]
    table = columns(controller, points)
    assert table["budgets"] == [0.6, 0.8] and table["settings"] == [0.7, 0.9]
    assert torch.tensor(table["thresholds"]).shape == (2, 1, 4) and torch.tensor(table["exit_thresholds"]).shape == (2, 2)
    with pytest.raises(ValueError, match="leave nothing out at any price"):
        columns(controller, points[-1:])


def test_kinds_are_asked_for_what_they_have(workshop, tmp_path):
    with pytest.raises(ValueError, match="controller='gated' is not calibrated at budgets"):
        calibration.run_stage(opened(workshop, tmp_path / "a", {"budgets": [0.5]}))
    with pytest.raises(ValueError, match="controller='plan' is not calibrated at capacities"):
        calibration.run_stage(opened(workshop, tmp_path / "b", controller="plan"))
    with pytest.raises(ValueError, match="budgets, or capacities for a gated controller, must be given"):
        recipe_of(workshop, stages={"calibration": {"windows": 2}})
