"""A picture of linear maps under the roof of a machine: operations in a second against operations for each byte read."""

import os
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes

from .drawing import INK, bare, save


COLOURS = {"full": "#2a6f97", "int8": "#3a7d44", "int4": "#c1440e"}
OTHER = "#7a5c99"
MARKERS = {"analytic": "o", "measured": "x"}
SPAN = 10.0  # times beyond the points that the roof is drawn


def draw_rooflines(machines: list[dict[str, Any]], path: str | os.PathLike) -> None:
    """Write a picture with a panel for each machine.

    Args:
        machines: `name`, `bandwidth` in GB/s, `peaks` in 1e9 operations a second by precision, and `points`: `variant`, `rows`,
            `level`, `operations_per_byte`, `gops`.
        path: of the picture.
    """
    columns = min(len(machines), 4)
    lines = -(-len(machines) // columns)
    size = (4.3 * columns + 0.6, 3.7 * lines)
    figure, panels = pyplot.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, machine in zip(panels.flat, machines, strict=False):
        _draw(axes, machine)
    for axes in panels.flat[len(machines) :]:
        axes.set_visible(False)
    panels[0, 0].legend(fontsize=7, frameon=False, loc="lower right")
    bare(*panels.flat)
    save(figure, path)


def _draw(axes: Axes, machine: dict[str, Any]) -> None:
    intensities = [point["operations_per_byte"] for point in machine["points"]]
    low, high = min(intensities) / SPAN, max(intensities) * SPAN
    for number, (precision, peak) in enumerate(sorted(machine["peaks"].items(), key=lambda one: one[1])):
        knee = peak / machine["bandwidth"]
        axes.plot([low, knee, max(high, knee)], [low * machine["bandwidth"], peak, peak], color=INK, linewidth=0.9)
        place = max(high, knee) / (1.0, 4.0)[number % 2]  # roofs may lie close to each other
        axes.annotate(precision, (place, peak), fontsize=7, color=INK, ha="right", va="bottom")
    known = dict.fromkeys((point["variant"], point["level"]) for point in machine["points"])
    for variant, level in known:
        own = [point for point in machine["points"] if (point["variant"], point["level"]) == (variant, level)]
        axes.scatter(
            [point["operations_per_byte"] for point in own],
            [point["gops"] for point in own],
            s=14,
            marker=MARKERS[level],
            color=COLOURS.get(variant, OTHER),
            label=f"{variant}, {level}",
            linewidths=1.0,
            zorder=3,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(f"{machine['name']}: {machine['bandwidth']:.4g} GB/s", fontsize=9)
    axes.set_xlabel("operations for each byte read", fontsize=8)
    axes.set_ylabel("1e9 operations a second", fontsize=8)
    axes.tick_params(labelsize=7)
