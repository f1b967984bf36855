"""The budget curve: perplexity ratio and decoding speed against realised cost, from what the verbs have written.

It measures nothing: the figures are those of `anee compare`, `anee perplexity` and `anee bench`.
"""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from ..evaluation.report import check_row, read_report
from .drawing import INK, bare, save


MAX_RATIO = 10.0  # what is above is marked at the edge, with its value
TICKS = (1, 1.1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 7, 10)
STRONG = ("#2a6f97", "#c1440e", "#3a7d44", "#7b4b94", "#b8860b", "#d1478c")
PALE = ("#98a3ad", "#4d565e", "#b08a4a", "#5fa384")
MARKERS = "osD^vP*X"


class Point(NamedTuple):
    """One measured point: realised cost, value, and the ends of its error bar (nan for none)."""

    cost: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """Points of one way to spend a budget.

    Args:
        name: for the legend.
        points: by the budget that was asked for.
        control: whether it is only there to be beaten.
        fixed: whether it has no dial: a single point, with its name beside it.
    """

    name: str
    points: dict[float, Point]
    control: bool = False
    fixed: bool = False


def read_quality(files: Iterable[Path], highlight: Sequence[str] = ()) -> list[Curve]:
    """Perplexity ratios of the figures that `anee compare` and `anee perplexity` wrote, one curve by name.

    Args:
        files: what the verbs wrote.
        highlight: names of controls that are not only there to be beaten.

    Raises:
        OSError: a file can't be read.
        ValueError: it is neither, was measured on other text than another file, or contradicts another file; a name to
            highlight that no file has.
    """
    curves: dict[str, Curve] = {}
    windows: dict[str, Path] = {}
    for file in files:
        report = _read_figures(file)
        windows.setdefault(report["windows_sha256"], file)
        if len(windows) > 1:
            first, other = windows.values()
            raise ValueError(f"{first} and {other} are of different windows of text; a curve needs the same ones")
        for curve in quality(report):
            known = curves.setdefault(curve.name, replace(curve, points={}))
            for budget, point in curve.points.items():
                if known.points.setdefault(budget, point) != point:
                    raise ValueError(f"{file} has other figures for {curve.name!r} at budget {budget:g} than a file before it")
    if unknown := [name for name in highlight if name not in curves]:
        raise ValueError(f"highlight={unknown[0]!r} is not among the curves: {', '.join(map(repr, curves))}")
    return [replace(curve, control=curve.control and curve.name not in highlight) for curve in curves.values()]


def quality(report: dict[str, Any]) -> list[Curve]:
    """Perplexity ratios of a report of `anee compare` or `anee perplexity`; every curve with a dial begins at the base."""
    if "controllers" not in report:
        names = ("mean_cost", "ratio", "ratio_standard_error")
        points = {row["budget"]: _with_error(*(row[name] for name in names)) for row in report["rows"]}
        return [Curve(report["controller"], points)]
    curves: dict[str, Curve] = {}
    for row in report["rows"]:
        if row["name"] != "base":
            fixed = row.get("fixed", False)
            start = {} if fixed else {1.0: Point(1.0, 1.0, 1.0, 1.0)}
            new = Curve(row["name"], start, control=row["name"] not in report["controllers"], fixed=fixed)
            curve = curves.setdefault(row["name"], new)
            curve.points[row["budget"]] = _with_error(row["cost"], row["ratio"], row["standard_error"])
    return list(curves.values())


def read_speed(file: Path) -> list[Curve]:
    """Speed-ups over plain transformers of the figures that `anee bench` wrote, one curve by table, and their ceiling.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not a report of `anee bench`.
    """
    names = ("case", "ratio", "ratio_low", "ratio_high", "mean_cost", "weights_read")
    report = read_report(file, "bench", ("tables",), ())
    missing = [name for rows in report["tables"].values() for row in rows for name in names if name not in row]
    if missing:
        raise ValueError(f"{file} is not a report of anee bench: its tables lack {missing[0]}")
    for row in (row for rows in report["tables"].values() for row in rows):
        check_row(file, row, names[:-1])
    return [curve for title, rows in report["tables"].items() for curve in speed(title, rows)]


def speed(title: str, rows: Sequence[dict[str, Any]]) -> list[Curve]:
    """Speed-ups of one table of `anee bench`, where it has them those that reading so many fewer bytes could give, and others'.

    Those of the base in one precision are points without a dial.
    """
    ours = [row for row in rows if row["case"].startswith("budget ")]
    points = {row["mean_cost"]: _speed_point(row) for row in ours}
    dense = next((row["ratio"] for row in ours if row["case"] == "budget 1.0"), None)
    ceiling = {
        row["mean_cost"]: Point(row["mean_cost"], dense / row["weights_read"], math.nan, math.nan)
        for row in ours
        if dense is not None and row["weights_read"]
    }
    curves = [Curve(title, points)]
    if ceiling:
        curves.append(Curve("the same, if only bytes read counted", ceiling, control=True))
    uniform = [row for row in rows if row["case"].startswith("uniform ")]
    return curves + [Curve(row["case"], {row["mean_cost"]: _speed_point(row)}, fixed=True) for row in uniform]


def _speed_point(row: dict[str, Any]) -> Point:
    return Point(row["mean_cost"], row["ratio"], row["ratio_low"], row["ratio_high"])


def draw_budget_curve(quality: Sequence[Curve], path: str | os.PathLike, speed: Sequence[Curve] = ()) -> None:
    """Write a PNG: perplexity ratios against realised cost on a log axis and, if there are any, speed-ups beside them.

    Error bars of ratios are one standard error, those of speed-ups the smallest and the largest of a round. A ratio above
    `MAX_RATIO` is a mark at the edge with its value.

    Args:
        quality: perplexity ratios.
        path: file to write.
        speed: speed-ups.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not quality and not speed:
        raise ValueError("there is no curve to draw")
    panels = [(_draw_quality, quality), (_draw_speed, speed)]
    panels = [(draw, curves) for draw, curves in panels if curves]
    size = (0.6 + 5.6 * len(panels), 4.6)
    figure, grid = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    lowest = min(point.cost for _, curves in panels for curve in curves for point in curve.points.values())
    for axes, (draw, curves) in zip(grid[0], panels, strict=True):
        draw(axes, curves)
        axes.set_xlim(max(0.0, lowest - 0.04), 1.02)
        axes.set_xlabel("realised cost, share of the whole model")
        axes.grid(color="#e8e8e8", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.legend(fontsize=8, frameon=False)
        bare(axes)
    save(figure, path)


def _draw_quality(axes: Axes, curves: Sequence[Curve]) -> None:
    values = [p.value for c in curves for p in c.points.values() if p.value <= MAX_RATIO]
    edge = MAX_RATIO if any(p.value > MAX_RATIO for c in curves for p in c.points.values()) else max(values) * 1.15
    axes.set_yscale("log")
    axes.set_ylim(min(0.97, min(values, default=1.0) * 0.97), edge * 1.02)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticks([tick for tick in TICKS if tick <= edge])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title("perplexity, ratio to the base (+- one standard error)", fontsize=10, loc="left")
    marked: dict[float, int] = {}
    for curve, style in zip(curves, _styles(curves), strict=True):
        _draw_curve(axes, curve, style)
        for point in curve.points.values():
            if point.value > MAX_RATIO:
                place = round(point.cost, 1)
                marked[place] = marked.get(place, 0) + 1
                _mark_at_the_edge(axes, point, edge, style["color"], marked[place], curve.name if curve.fixed else "")
    _name_points(axes, curves)


def _mark_at_the_edge(axes: Axes, point: Point, edge: float, colour: str, nth: int, name: str) -> None:
    """A triangle at the upper edge, and the value, after a name if it has one, below the values that are already there."""
    axes.plot([point.cost], [edge], marker="^", color=colour, markersize=7, clip_on=False, linestyle="")
    offset = (6, -3 - 10 * (nth - 1))
    text, place = f"{name} {point.value:,.0f}".lstrip(), (point.cost, edge)
    axes.annotate(text, place, offset, textcoords="offset points", fontsize=8, color=INK, va="center")


def _draw_speed(axes: Axes, curves: Sequence[Curve]) -> None:
    axes.set_title("speed, ratio to plain transformers (min to max of the rounds)", fontsize=10, loc="left")
    axes.axhline(1.0, color=INK, linewidth=0.8)
    for curve, style in zip(curves, _styles(curves), strict=True):
        _draw_curve(axes, curve, style)
    _name_points(axes, curves)
    axes.set_ylim(bottom=min(0.9, axes.get_ylim()[0]))


def _draw_curve(axes: Axes, curve: Curve, style: dict[str, Any]) -> None:
    points = sorted(curve.points.values())
    cost, value = ([p[i] for p in points] for i in (0, 1))
    below = [max(p.value - p.low, 0.0) if math.isfinite(p.low) else 0.0 for p in points]
    above = [max(p.high - p.value, 0.0) if math.isfinite(p.high) else 0.0 for p in points]
    label = None if curve.fixed else curve.name
    axes.errorbar(cost, value, yerr=[below, above], label=label, capsize=2.5, elinewidth=1, **style)


def _name_points(axes: Axes, curves: Sequence[Curve]) -> None:
    """The names of what has no dial, one below the other, each with a thin line to its point; at the edge the mark has it."""
    styled = zip(curves, _styles(curves), strict=True)
    found = [(p.value, p.cost, c.name, s["color"]) for c, s in styled if c.fixed for p in c.points.values()]
    shown = [one for one in found if axes.get_yscale() != "log" or one[0] <= MAX_RATIO]
    for place, (value, cost, name, colour) in enumerate(sorted(shown, key=lambda one: (one[1], -one[0]))):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "relpos": (0.0, 0.5)}
        where: dict[str, Any] = {"xytext": (0.42, 0.6 - 0.05 * place), "textcoords": "axes fraction", "va": "center"}
        axes.annotate(name, (cost, value), fontsize=8, color=colour, arrowprops=line, **where)


def _styles(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Strong lines for what is on offer, pale and dashed ones for controls; a marker of its own for each.

    Points without a dial have the colour of the line on offer that they come after; controls without one are ink.
    """
    styles: list[dict[str, Any]] = []
    counts, strong = {False: 0, True: 0}, INK
    for curve in curves:
        if curve.fixed:
            styles.append({"color": INK if curve.control else strong, "marker": "h", "markersize": 7, "linestyle": ""})
            continue
        colours = PALE if curve.control else STRONG
        colour, marker = colours[counts[curve.control] % len(colours)], MARKERS[sum(counts.values()) % len(MARKERS)]
        counts[curve.control] += 1
        strong = strong if curve.control else colour
        line = {"linestyle": "--", "linewidth": 1.1} if curve.control else {"linestyle": "-", "linewidth": 1.8}
        styles.append({"color": colour, "marker": marker, "markersize": 4.5, **line})
    return styles


def _with_error(cost: float, ratio: float, error: float | None) -> Point:
    """A ratio and its standard error, if that is known."""
    error = math.nan if error is None else error
    return Point(cost, ratio, ratio - error, ratio + error)


def _read_figures(file: Path) -> dict[str, Any]:
    """A report of either verb.

    Raises:
        ValueError: it is neither.
    """
    problems = []
    for verb, field, row_fields in (
        ("compare", "controllers", ("name", "budget", "cost", "ratio", "standard_error")),
        ("perplexity", "controller", ("budget", "mean_cost", "ratio", "ratio_standard_error")),
    ):
        try:
            return read_report(file, verb, (field, "windows_sha256"), row_fields)
        except ValueError as error:
            problems.append(str(error).removeprefix(f"{file} is "))
    raise ValueError(f"{file} is {', and '.join(problems)}")
