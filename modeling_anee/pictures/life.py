"""The life of tokens: what share of each class runs at each layer, and in what variant, is skipped there, or has left."""

import os
from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from ..action_looks import brightness
from .drawing import bare, save


ALL = "all tokens"


def draw_life(report: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a picture with a line of panels for each budget: all tokens, then each class; layers upwards, shares across.

    Args:
        report: figures of `evaluation/analysis.py`.
        path: file to write.

    Raises:
        ValueError: the path does not end as a picture does.
    """
    actions = sorted(report["actions"], key=lambda action: brightness(action["colour"]))  # as in other pictures: dearest first
    rows = report["rows"]
    panels = 1 + max(len(row["classes"]) for row in rows)
    size = (1.0 + 1.25 * panels, 0.7 + (1.1 + 0.08 * len(rows[0]["layers"])) * len(rows))
    figure, grid = pyplot.subplots(len(rows), panels, figsize=size, sharey=True, layout="constrained", squeeze=False)
    for row, line in zip(rows, grid, strict=True):
        _draw_line(line, row, actions)
    taken = {name for row in rows for one in row["classes"] for name in one["actions"]}
    handles = [Patch(color=action["colour"], label=action["meaning"]) for action in actions if action["name"] in taken]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, fontsize=8, frameon=False)
    save(figure, path)


def _draw_line(line: Sequence[Axes], row: dict[str, Any], actions: Sequence[dict[str, Any]]) -> None:
    """The panels of one budget; those that are too many are left blank."""
    layers = len(row["layers"])
    whole = {action["name"]: [layer["actions"].get(action["name"], 0.0) for layer in row["layers"]] for action in actions}
    panels = [(ALL, row["mean_cost"], whole)]
    panels += [(one["class"], one["mean_cost"], one["actions"]) for one in row["classes"]]
    for axes, (name, cost, shares) in zip(line, panels, strict=False):
        _draw_shares(axes, [(action["colour"], shares.get(action["name"])) for action in actions], layers)
        axes.set_title(f"{name}\ncost {cost:.3f}", fontsize=8)
    line[0].set_ylabel(f"budget {row['budget']:g}\nlayer", fontsize=8)
    for axes in line[len(panels) :]:
        axes.axis("off")


def _draw_shares(axes: Axes, shares: Sequence[tuple[str, Sequence[float] | None]], layers: int) -> None:
    """Stacked bars, one for each layer, of colours and their shares [L]; None: nowhere."""
    done = [0.0] * layers
    for colour, share in shares:
        if share is not None:
            axes.barh(range(layers), share, height=1.0, left=done, color=colour)
            done = [before + more for before, more in zip(done, share, strict=True)]
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.5, layers - 0.5)
    axes.set_xticks([0, 1], ["0", "100%"], fontsize=7.5)
    bare(axes)
