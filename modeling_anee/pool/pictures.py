"""Pictures of a pool: the levels of its fuzzy rules, and what its policies cost and lose."""

import os
from collections.abc import Sequence
from itertools import pairwise

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter

from ..pictures.drawing import INK, bare, save
from .config import Fuzzy
from .features import MEANING
from .rules import CENTRES
from .table import Row, lower_hull


COLOURS = {"LOW": "#3b9a7c", "MEDIUM": "#e09f3e", "HIGH": "#c1440e"}
POLICY_COLOURS = {
    "energy": "#2a6f97",
    "complexity": "#e09f3e",
    "learned": "#3b9a7c",
    "cascade": "#8f5ea8",
    "mixture": "#c1440e",
}


def draw_rules(fuzzy: Fuzzy, path: str | os.PathLike, features: dict[str, float] | None = None) -> None:
    """Write a picture of the membership functions of every variable, and of what complexity means; a case's features as lines.

    Raises:
        ValueError: the path does not end as a picture does.
    """
    count = len(fuzzy.variables) + 1
    figure, grid = pyplot.subplots(count, 1, figsize=(7.0, 1.35 * count), layout="constrained")
    for axes, (name, levels) in zip(grid, fuzzy.variables.items(), strict=False):
        for level, (a, b, c, d) in levels.items():
            axes.plot([a, b, c, d], [float(a == b), 1, 1, float(c == d)], color=COLOURS[level], label=level, linewidth=1.6)
        if features is not None:
            axes.axvline(features[name], color=INK, linestyle="--", linewidth=1)
        _finish(axes, f"{name}: {MEANING[name]}")
    for name, centre in CENTRES.items():
        grid[-1].plot([centre, centre], [0, 1], color=COLOURS[name], linewidth=3)
    for cut in fuzzy.cuts:
        grid[-1].axvline(cut, color=INK, linestyle=":", linewidth=1)
    served = ", ".join(f"{level} {rung}" for level, rung in fuzzy.rungs.items())
    _finish(grid[-1], f"complexity that each level stands for; cuts dotted; served by {served}")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    save(figure, path)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=8.5, loc="left", color=INK)
    axes.set_ylim(-0.03, 1.08)
    axes.set_yticks([0, 1])
    axes.tick_params(labelsize=8)
    bare(axes)


def draw_points(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Write a picture of loss against cost: every policy, single rungs, and the line of random choice between these.

    Raises:
        ValueError: the path does not end as a picture does.
    """
    figure, axes = pyplot.subplots(figsize=(8.0, 4.8), layout="constrained")
    fixed = [row for row in rows if row.policy == "always"]
    hull = hull_of(fixed)
    costs, losses = between([(row.megabytes, row.loss) for row in hull])
    axes.plot(costs, losses, color=INK, linewidth=1, label="random choice")
    axes.scatter([row.megabytes for row in fixed], [row.loss for row in fixed], color=INK, s=36, zorder=2)
    for row in fixed:
        axes.annotate(row.setting, (row.megabytes, row.loss), xytext=(5, 5), textcoords="offset points", fontsize=8, color=INK)
    for policy, colour in POLICY_COLOURS.items():
        own = sorted((row.megabytes, row.loss) for row in rows if row.policy == policy)
        if own:
            line = "" if policy == "energy" else "-"  # a budget between two rungs is served by one of them
            axes.plot(*zip(*own, strict=True), color=colour, marker="o", markersize=4, linestyle=line, label=policy)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_xlabel("MB of weights read per byte of text")
    axes.set_ylabel("bits per byte")
    axes.legend(frameon=False, fontsize=8)
    bare(axes)
    save(figure, path)


def between(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Points on the straight lines between points, which are none where an axis is logarithmic."""
    found = [
        tuple(low + (high - low) * step / 20 for low, high in zip(first, second, strict=True))
        for first, second in pairwise(points)
        for step in range(20)
    ]
    costs, losses = zip(*found, points[-1], strict=True)
    return list(costs), list(losses)


def hull_of(fixed: Sequence[Row]) -> list[Row]:
    """Single rungs on the line of random choice, the cheapest first."""
    points = {row.setting: (row.megabytes, row.loss) for row in fixed}
    by_name = {row.setting: row for row in fixed}
    return [by_name[name] for name, _ in lower_hull(points)]
