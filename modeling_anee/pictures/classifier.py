"""Pictures of an early-exit classifier, from the figures of `anee evaluate-classifier`: accuracy against cost, reliability."""

import os
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes

from .drawing import INK, bare, save


COLOURS = {"confidence": "#2a6f97", "agreement": "#c1440e", "patience": "#3a7d44", "fixed": "#98a3ad"}
MARKERS = {"confidence": "o", "agreement": "s", "patience": "D", "fixed": "^"}
COLUMNS = 5


def draw_accuracy(figures: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a picture of accuracy against realised cost by exit rule; dotted: as many exits, but of random rows.

    Where the figures have `seconds`, a second panel has accuracy against the time of a row.
    """
    timed = "seconds" in figures
    figure, panels = pyplot.subplots(
        1, 1 + timed, figsize=(7.0 + 4.0 * timed, 4.4), layout="constrained", squeeze=False, sharey=True
    )
    axes = panels[0, 0]
    last = figures["last"]["accuracy"]
    for each in panels.flat:
        each.axhspan(last - 0.01, last, color="#e5e5e5", zorder=0, label="within one point of it")
        each.axhline(last, color=INK, linewidth=1.0, label=f"last head alone: {last:.1%}")
    for rule, colour in COLOURS.items():
        rows = sorted((row for row in figures["rows"] if row["rule"] == rule), key=lambda row: row["cost"])
        if not rows:
            continue
        costs = [row["cost"] for row in rows]
        errors = [row["standard_error"] for row in rows]
        axes.errorbar(costs, [row["accuracy"] for row in rows], errors, elinewidth=0.6, label=rule, **_style(rule))
        if rule == "confidence":
            label = "the same exits, random rows"
            axes.plot(costs, [row["shuffled"] for row in rows], color=colour, linewidth=1.0, linestyle=":", label=label)
    axes.set_xlabel(f"realised cost, share of all layers and heads ({figures['unit']})")
    axes.set_ylabel(f"accuracy on {figures['texts']} texts (bars: one standard error)")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    if timed:
        _draw_times(panels[0, 1], figures)
    bare(*panels.flat)
    save(figure, path)


def _style(rule: str) -> dict[str, Any]:
    return {"color": COLOURS[rule], "marker": MARKERS[rule], "markersize": 4.5, "linewidth": 1.4}


def _draw_times(axes: Axes, figures: dict[str, Any]) -> None:
    """Accuracy against milliseconds of a row: what was timed, joined with what came of it."""
    known = {(row["rule"], row["budget"]): row for row in figures["rows"]}
    plain, *rows = figures["seconds"]
    axes.axvline(plain["milliseconds"], color=INK, linewidth=1.0, linestyle="--", label="plain base, all layers")
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = "last head alone" if row["budget"] == 1.0 else row["rule"]
        found = figures["last"] if row["budget"] == 1.0 else known[row["rule"], row["budget"]]
        points.setdefault(name, []).append((row["milliseconds"], found["accuracy"]))
    for name, pairs in points.items():
        times, right = zip(*sorted(pairs), strict=True)
        style = {"color": INK, "marker": "*", "linestyle": ""} if name not in COLOURS else _style(name)
        axes.plot(times, right, label=name, **style)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"milliseconds a text, batches of {plain['batch_size']}")
    axes.legend(fontsize=8, facecolor="white", edgecolor="none", framealpha=1.0, loc="lower right")


def draw_reliability(figures: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a picture of how often each head is right by its confidence; on the diagonal, that can be taken literally."""
    heads = figures["heads"]
    lines = -(-len(heads) // COLUMNS)
    columns = min(COLUMNS, len(heads))
    figure, grid = pyplot.subplots(
        lines,
        columns,
        figsize=(2.1 * columns, 2.2 * lines + 0.4),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for axes, head in zip(grid.flat, heads, strict=False):
        _draw_head(axes, head, 1 / len(figures["labels"]))
    for axes in grid.flat[len(heads) :]:
        axes.set_visible(False)
    figure.supxlabel("confidence (bars: share of the texts)", fontsize=9)
    figure.supylabel("share that is right", fontsize=9)
    save(figure, path)


def _draw_head(axes: Axes, head: dict[str, Any], lowest: float) -> None:
    confidence, right, sizes = zip(*head["bins"], strict=True)
    total = sum(sizes)
    axes.bar(confidence, [size / total for size in sizes], width=0.03, color="#f2cc8f", zorder=0)
    axes.plot([lowest, 1], [lowest, 1], color=INK, linewidth=0.8, linestyle="--")
    axes.plot(confidence, right, color="#2a6f97", marker="o", markersize=3, linewidth=1.2)
    error, before = head["calibration_error"], head["calibration_error_without_temperature"]
    axes.set_title(f"layer {head['layers']}: error {error:.3f} (was {before:.3f})", fontsize=7.5)
    axes.set_xlim(lowest - 0.03, 1.03)
    axes.set_ylim(0, 1.03)
    axes.tick_params(labelsize=7)
    bare(axes)
