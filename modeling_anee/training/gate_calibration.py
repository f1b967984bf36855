"""The dial of a `gated` controller: thresholds for each capacity, found on held-out text, with what they cost.

One price serves all layers and exit gates: a threshold is what the score must be for a loss to be worth what is saved. What
has been measured for one capacity narrows the search for the next.
"""

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from ..controller_gated import GatedController
from ..evaluation.rollout import begin
from ..executor import Executor
from ..modeling_anee import AneeForCausalLM
from .mixing import controller_of
from .run import Run


PRICES = (-20.0, 20.0)  # logarithms between which one is sought
WIDE = 3.0  # distance of two prices above which halving it is better than interpolating
ROUNDS = 12  # evaluations for one capacity, at most
TOLERANCE = 0.015  # of the capacity: what was realised is what is kept, so nearer is no better
BATCH_WINDOWS = 4


@dataclass(frozen=True)
class Point:
    """What a price (its logarithm) leads to.

    Args:
        price: the logarithm.
        capacity: share of the feed-forwards that run.
        cost: of a token, in the mean.
        shares: of the tokens asked about that each layer runs.
    """

    price: float
    capacity: float
    cost: float
    shares: tuple[float, ...] = ()

    @classmethod
    def read(cls, row: list) -> "Point":
        """From what a checkpoint has of it."""
        return cls(row[0], row[1], row[2], tuple(row[3]))


def calibrate_gates(run: Run, windows: Tensor, capacities: list[float], name: str) -> dict[str, list]:
    """Columns of the calibration: `budgets` (costs), `settings` (capacities) and the thresholds, ascending.

    Args:
        run: has the model.
        windows: int64 [W, T].
        capacities: to look for.
        name: of the stage, under which the points so far are saved.

    Raises:
        ValueError: the routers leave nothing out at any price.
    """
    saved, order = run.load(name), sorted(capacities, reverse=True)
    points = [] if saved is None else [Point.read(row) for row in saved[2]["found"]]
    chosen = [] if saved is None else [Point.read(row) for row in saved[2]["chosen"]]
    for number in run.track(len(order), "calibrating", len(chosen)):
        points = points or [measured(run, windows, price) for price in PRICES]
        chosen.append(nearest_point(order[number], points, lambda price: measured(run, windows, price)))
        values = {"found": [astuple(point) for point in points], "chosen": [astuple(point) for point in chosen]}
        run.save(name, number + 1, {}, values)
    return columns(controller_of(run.model), chosen)


def nearest_point(capacity: float, points: list[Point], measure: Callable[[float], Point]) -> Point:
    """The point nearest to a capacity, once it is near enough or no nearer one is found.

    Args:
        capacity: what is sought.
        points: what is known, two at least; gets what is measured.
        measure: a point at a price.
    """
    for number in range(ROUNDS):
        points.sort(key=lambda point: point.price)
        best = min(points, key=lambda point: abs(point.capacity - capacity))
        dear = next((i for i, point in enumerate(points[1:]) if point.capacity < capacity), None)
        if abs(best.capacity - capacity) <= TOLERANCE or dear is None or points[dear].capacity < capacity:
            return best  # or out of reach
        low, high = points[dear], points[dear + 1]
        share = (low.capacity - capacity) / (low.capacity - high.capacity)
        halve = high.price - low.price > WIDE or number % 3 == 2  # where the curve is steep, interpolating creeps
        points.append(measure(low.price + (high.price - low.price) * (0.5 if halve else min(max(share, 0.05), 0.95))))
    return min(points, key=lambda point: abs(point.capacity - capacity))


@torch.no_grad()
def measured(run: Run, windows: Tensor, price: float) -> Point:
    """What a price leads to on windows int64 [W, T].

    Raises:
        ValueError: the cost is not a finite number.
    """
    executor, layers = executor_at(run.model, price), run.model.config.num_layers
    sums = torch.zeros(3, dtype=torch.float64, device=run.device)  # runs, costs, tokens
    asked, ran = torch.zeros(2, layers, dtype=torch.float64, device=run.device)
    for batch in run.share(windows).split(BATCH_WINDOWS):
        hidden, step = begin(run.model, batch)
        _, trace = executor.run(hidden, step)
        tokens = float(trace.valid.sum())
        sums += torch.tensor([trace.capacity * tokens, float(trace.cost.double().sum()), tokens], device=run.device)
        counts = [part.sum(dim=(0, 1)).to(run.device) for part in executor.controller.counted(step, trace.actions)]
        asked, ran = asked + counts[0], ran + counts[1]
    capacity, cost, tokens = run.sum(sums).tolist()
    if not math.isfinite(cost):
        raise ValueError(f"no capacity can be calibrated: at the price {price:g} the mean cost is {cost / tokens}")
    asked, ran = run.sum(asked), run.sum(ran)
    shares = torch.where(asked > 0, ran / asked.clamp(min=1.0), 1.0)
    return Point(price, capacity / tokens, cost / tokens, tuple(shares.tolist()))


def executor_at(model: AneeForCausalLM, price: float) -> Any:
    """An `Executor` over the model's parts, at whose every budget below the fixed plans thresholds are those of a price."""
    model.prepare()  # the base may have been changed since it was wrapped
    controller = controller_of(model)
    dial = controller.dial_of({"budgets": [0.0], "settings": [1.0]} | thresholds_at(controller, price))
    twin = controller.with_dial(dial)
    twin.strict = False  # a strict budget would decide, not the price
    return Executor(model.stack, twin, model.bridges, model.costs, model.config.table)


def thresholds_at(controller: GatedController, price: float) -> dict[str, list]:
    """Columns of thresholds of one row."""
    routers, exits = (part.float().double().tolist() for part in controller.at_price(price))
    return {"thresholds": [routers], "exit_thresholds": [exits]}


def columns(controller: GatedController, points: list[Point]) -> dict[str, list]:
    """The calibration of some points: those of ascending cost and capacity, below the fixed plans.

    Raises:
        ValueError: there is none.
    """
    rows: list[Point] = []
    for point in sorted(set(points), key=lambda point: point.cost):
        if point.cost < controller.top and (not rows or (point.cost > rows[-1].cost and point.capacity > rows[-1].capacity)):
            rows.append(point)
    if not rows:
        raise ValueError("no capacity can be calibrated: the routers leave nothing out at any price; train them first")
    table: dict[str, list] = {"budgets": [point.cost for point in rows], "settings": [point.capacity for point in rows]}
    if all(point.shares for point in rows):
        table["shares"] = [list(point.shares) for point in rows]
    for row in rows:
        for name, column in thresholds_at(controller, row.price).items():
            table.setdefault(name, []).extend(column)
    return table
