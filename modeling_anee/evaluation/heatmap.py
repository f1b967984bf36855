"""Heatmap of an execution: tokens across, layers upwards, coloured by action."""

import os
from collections.abc import Sequence

import matplotlib


matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Patch

from ..actions import Action
from ..trace import ExecutionTrace


COLOURS = {Action.PROCESS: "#2a6f97", Action.SKIP: "#f2cc8f", Action.EXIT: "#e5e5e5", Action.SKIP_FFN: "#8ab6d6"}
INK = "#333333"
MAX_TOKENS = 160


def draw_heatmap(
    trace: ExecutionTrace,
    path: str | os.PathLike,
    tokens: Sequence[str] | None = None,
    row: int = 0,
    prompt_length: int | None = None,
    title: str | None = None,
) -> None:
    """Write a PNG of one row of a trace.

    Above the map is the cost of each token, at its right the share of tokens that each layer ran for, by action.

    Args:
        trace: what was done.
        path: file to write.
        tokens: text of each token, for the ticks; padding included. The last token of `generate`, which was not
            run, may be among them.
        row: which row of the batch.
        prompt_length: draw a line after this many tokens.
        title: text above.

    Raises:
        ValueError: a number of tokens that is not the trace's.
    """
    valid = trace.valid[row]
    if tokens is not None and len(tokens) - len(valid) not in (0, 1):
        raise ValueError(f"tokens has {len(tokens)} entries, but the trace has {len(valid)} tokens")
    skipped = int((~valid[:prompt_length]).sum())
    actions = trace.actions[row][valid][:MAX_TOKENS].T  # [L, T]
    cost = trace.cost[row][valid][:MAX_TOKENS]
    layers, count = actions.shape

    figure = pyplot.figure(figsize=(max(6.0, 2.2 + 0.17 * count), 2.6 + 0.16 * layers), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[max(count, 12), 12], height_ratios=[1, 4])
    main = figure.add_subplot(grid[1, 0])
    main.imshow(
        actions.numpy(),
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap=ListedColormap([COLOURS[action] for action in Action]),
        norm=BoundaryNorm([i - 0.5 for i in range(len(Action) + 1)], len(Action)),
    )
    main.set_ylabel("layer")
    main.set_xlim(-0.5, count - 0.5)
    if tokens is not None:
        labels = [text for text, is_real in zip(tokens, valid.tolist(), strict=False) if is_real][:count]
        main.set_xticks(range(count), [_label(text) for text in labels], rotation=90, fontsize=7)
    if prompt_length is not None and 0 < prompt_length - skipped < count:
        main.axvline(prompt_length - skipped - 0.5, color=INK, linewidth=1.2, linestyle="--")

    top = figure.add_subplot(grid[0, 0], sharex=main)
    top.bar(range(count), cost.numpy(), width=0.9, color=COLOURS[Action.PROCESS])
    top.axhline(float(cost.mean()), color=INK, linewidth=0.8)
    top.set_ylim(0, max(1.05, float(cost.max()) * 1.05))
    top.set_ylabel("cost")
    cut = "" if count == int(valid.sum()) else f" (first {count} of {int(valid.sum())} tokens)"
    top.set_title((title or f"mean cost {float(cost.mean()):.3f} of the decoder stack") + cut, fontsize=10, loc="left")
    top.tick_params(labelbottom=False)

    side = figure.add_subplot(grid[1, 1], sharey=main)
    whole, attention = ((actions == a).float().mean(dim=1).numpy() for a in (Action.PROCESS, Action.SKIP_FFN))
    side.barh(range(layers), whole, height=0.9, color=COLOURS[Action.PROCESS])
    side.barh(range(layers), attention, height=0.9, left=whole, color=COLOURS[Action.SKIP_FFN])
    side.set_xlim(0, 1)
    side.set_xticks([0, 1], ["0", "100%"], fontsize=7)
    side.set_xlabel("tokens it ran for", fontsize=8)
    side.tick_params(labelleft=False)

    corner = figure.add_subplot(grid[0, 1])
    corner.axis("off")
    corner.legend(handles=[Patch(color=COLOURS[a], label=a.name) for a in Action], loc="center", fontsize=8, frameon=False)
    for axes in (main, top, side):
        _plain(axes)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _label(text: str) -> str:
    """A token as a tick label: visible spaces and line ends, no maths mode."""
    text = text.replace("\n", "⏎").replace("\t", "⇥").replace("$", r"\$")
    return (text[:14] + "…" if len(text) > 15 else text) or "∅"


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
