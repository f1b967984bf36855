"""A picture of where the time of a token goes: a stacked bar for each budget and way to know it, a panel for each machine."""

import os
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes

from .drawing import bare, save


COLOURS = ("#2a6f97", "#8ab6d6", "#c9a227", "#1d3b53", "#3a7d44", "#c1440e", "#98a3ad")


def draw_parts(rows: list[dict[str, Any]], path: str | os.PathLike) -> None:
    """Write a picture of the rows of a simulation: `hardware`, `level`, `budget` and `decode_parts_ms`."""
    names = list(dict.fromkeys(row["hardware"] for row in rows))
    columns = min(len(names), 4)
    lines = -(-len(names) // columns)
    bars = max(sum(row["hardware"] == name for row in rows) for name in names)
    size = (max(columns * max(3.2, 0.55 * bars), 6.4), 3.7 * lines + 0.6)
    figure, panels = pyplot.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, name in zip(panels.flat, names, strict=False):
        _draw(axes, name, [row for row in rows if row["hardware"] == name])
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=4)
    bare(*panels.flat)
    save(figure, path)


def _draw(axes: Axes, name: str, rows: list[dict[str, Any]]) -> None:
    several = len({row["level"] for row in rows}) > 1
    labels = [f"{row['level']} {row['budget']:g}" if several else f"{row['budget']:g}" for row in rows]
    places, bottoms = range(len(rows)), [0.0] * len(rows)
    for colour, part in zip(COLOURS, rows[0]["decode_parts_ms"], strict=False):
        heights = [max(row["decode_parts_ms"][part], 0.0) for row in rows]
        axes.bar(places, heights, bottom=bottoms, color=colour, label=part, width=0.7)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_xticks(places, labels, fontsize=7, rotation=40 if several else 0, ha="right" if several else "center")
    axes.tick_params(axis="y", labelsize=7)
    axes.set_title(name, fontsize=9)
    axes.set_xlabel("energy budget", fontsize=8)
    axes.set_ylabel("milliseconds of a step", fontsize=8)
