"""Heatmap of an execution: tokens across, layers upwards, coloured by action."""

import os
from collections.abc import Sequence

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Patch
from torch import Tensor

from ..actions import ActionTable
from ..trace import ExecutionTrace
from .drawing import INK, bare, count_valid, cut_note, labels_of, save, token_ticks


MAX_TOKENS = 160
ONCE, AGAIN = "#8d99a6", "#c1440e"  # of bars of cost: not the colours of actions


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
    labels = None if tokens is None else labels_of(trace, tokens, row)
    total = count_valid(trace, row, None)
    actions = trace.actions[row][trace.valid[row]][:MAX_TOKENS].T  # [L, T]
    cost = trace.cost[row][trace.valid[row]][:MAX_TOKENS]
    layers, count = actions.shape

    figure = pyplot.figure(figsize=(max(6.0, 2.2 + 0.17 * count), 2.6 + 0.16 * layers), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[max(count, 12), 12], height_ratios=[1, 4])
    main = figure.add_subplot(grid[1, 0])
    _draw_map(main, actions, trace.table)
    if labels is not None:
        token_ticks(main, labels[:count])

    top = figure.add_subplot(grid[0, 0], sharex=main)
    heading = (title or f"mean cost {float(cost.mean()):.3f} of the whole model") + cut_note(count, total)
    top.set_title(heading, fontsize=10, loc="left")
    again = None if trace.refined is None else trace.refined[row][trace.valid[row]][:MAX_TOKENS]
    _draw_cost(top, cost, again)
    end = None if prompt_length is None else count_valid(trace, row, prompt_length)
    if end is not None and 0 < end < count:
        for axes in (main, top):
            axes.axvline(end - 0.5, color=INK, linewidth=1.2, linestyle="--")
        top.text(end - 0.7, 1.06, "prompt", ha="right", fontsize=8, color=INK)
        top.text(end - 0.3, 1.06, "new tokens", ha="left", fontsize=8, color=INK)

    side = figure.add_subplot(grid[1, 1], sharey=main)
    _draw_shares(side, actions, trace.table)
    corner = figure.add_subplot(grid[0, 1])
    corner.axis("off")
    taken = [trace.table[place] for place in trace.table.darkest_first(actions)]
    handles = [Patch(color=a.colour, label=a.name) for a in taken]
    if again is not None:
        handles.append(Patch(color=AGAIN, label="ran again"))
    corner.legend(handles=handles, loc="center", fontsize=8, frameon=False)
    bare(main, top, side)
    save(figure, path)


def _draw_map(axes: Axes, actions: Tensor, table: ActionTable) -> None:
    """The map itself, of actions uint8 [L, T]."""
    axes.imshow(
        actions.numpy(),
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap=ListedColormap([action.colour for action in table]),
        norm=BoundaryNorm([i - 0.5 for i in range(len(table) + 1)], max(len(table), 2)),
    )
    axes.set_ylabel("layer")
    axes.set_xlim(-0.5, actions.shape[1] - 0.5)


def _draw_cost(axes: Axes, cost: Tensor, again: Tensor | None) -> None:
    """Bars of the cost of each token, float32 [T], in another colour if it ran `again`, bool [T]; their mean as a line."""
    colours = [ONCE] * len(cost) if again is None else [AGAIN if one else ONCE for one in again.tolist()]
    axes.bar(range(len(cost)), cost.numpy(), width=0.9, color=colours)
    axes.axhline(float(cost.mean()), color=INK, linewidth=0.8)
    axes.set_ylim(0, max(1.2, float(cost.max()) * 1.05))
    axes.set_yticks([0, 0.5, 1])
    axes.set_ylabel("cost")
    axes.tick_params(labelbottom=False, bottom=False)


def _draw_shares(axes: Axes, actions: Tensor, table: ActionTable) -> None:
    """The share of tokens that each layer ran for, of actions uint8 [L, T]."""
    layers = range(len(actions))
    done = torch.zeros(len(actions))
    for place in table.darkest_first(actions):
        if table[place].runs:
            share = (actions == place).float().mean(dim=1)
            axes.barh(layers, share.numpy(), height=0.9, left=done.numpy(), color=table[place].colour)
            done += share
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 1], ["0", "100%"], fontsize=7.5)
    axes.set_xlabel("tokens it ran for", fontsize=8)
    axes.tick_params(axis="y", labelleft=False, left=False)
