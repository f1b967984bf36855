"""Effective depth along a text: how many layers ran for each token, and what it cost, in lines like the text's own."""

import os
from collections.abc import Sequence

import torch
from matplotlib import pyplot
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from ..actions import Action, ActionTable
from ..trace import ExecutionTrace
from .drawing import INK, bare, count_valid, cut_note, labels_of, save, token_ticks


PER_LINE = 64
MAX_TOKENS = 8 * PER_LINE


def draw_depth(
    trace: ExecutionTrace,
    path: str | os.PathLike,
    tokens: Sequence[str],
    row: int = 0,
    prompt_length: int | None = None,
    title: str | None = None,
) -> None:
    """Write a PNG of one row of a trace: for each token a bar of the layers that ran, and its cost as a line.

    The bar has the layers that ran, the dearest actions at its foot: those that ran whole in full, then cheaper ones.

    Args:
        trace: what was done.
        path: file to write.
        tokens: text of each token, padding included. The last token of `generate`, which was not run, may be among them.
        row: which row of the batch.
        prompt_length: draw a line after this many tokens.
        title: text above.

    Raises:
        ValueError: a number of tokens that is not the trace's, or no token at all.
    """
    labels, total = labels_of(trace, tokens, row)[:MAX_TOKENS], count_valid(trace, row, None)
    if not labels:
        raise ValueError(f"row={row} of the trace has no tokens to draw")
    actions = trace.actions[row][trace.valid[row]][:MAX_TOKENS]  # [T, L]
    cost = trace.cost[row][trace.valid[row]][:MAX_TOKENS]
    depth = float(trace.depth[row][trace.valid[row]][:MAX_TOKENS].float().mean())
    count, layers = actions.shape
    heading = title or f"mean depth {depth:.1f} of {layers} layers, mean cost {float(cost.mean()):.3f} of the whole model"
    end = None if prompt_length is None else count_valid(trace, row, prompt_length)

    starts = range(0, count, PER_LINE)
    width = min(count, PER_LINE)
    size = max(6.0, 1.6 + 0.17 * width), 0.55 + 1.75 * len(starts)
    figure, grid = pyplot.subplots(len(starts), 1, figsize=size, layout="constrained", squeeze=False)
    for start, axes in zip(starts, grid[:, 0], strict=True):
        stop = min(start + PER_LINE, count)
        _draw_line(axes, actions[start:stop], cost[start:stop], width, trace.table)
        token_ticks(axes, labels[start:stop])
        if end is not None and start < end < stop:
            axes.axvline(end - start - 0.5, color=INK, linewidth=1.2, linestyle="--")
    figure.suptitle(heading + cut_note(count, total), fontsize=10, x=0.01, ha="left")
    _legend(figure, [trace.table[place] for place in trace.table.darkest_first(actions)])
    save(figure, path)


def _draw_line(axes: Axes, actions: Tensor, cost: Tensor, width: int, table: ActionTable) -> None:
    """One line of the text: actions uint8 [T, L] and cost float32 [T], with room for `width` tokens."""
    count, layers = actions.shape
    done = torch.zeros(count, dtype=torch.int64)
    for place in table.darkest_first(actions):
        if table[place].runs:
            ran = (actions == place).sum(dim=1)
            axes.bar(range(count), ran.numpy(), width=0.86, bottom=done.numpy(), color=table[place].colour)
            done += ran
    axes.stairs((cost * layers).numpy(), [i - 0.5 for i in range(count + 1)], color="#c1440e", linewidth=1.4, baseline=None)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(0, max(layers, float(cost.max()) * layers) * 1.04)
    axes.set_yticks([0, layers / 2, layers], ["0", f"{layers / 2:g}", str(layers)])
    axes.set_ylabel("layers", fontsize=8)
    bare(axes)
    share = axes.twinx()
    share.set_ylim(0, axes.get_ylim()[1] / layers)
    share.set_yticks([0, 0.5, 1])
    share.set_ylabel("cost", fontsize=8)
    share.spines[["top", "right"]].set_visible(False)


def _legend(figure: pyplot.Figure, taken: Sequence[Action]) -> None:
    handles: list[Artist] = [Patch(color=action.colour, label=action.meaning) for action in taken if action.runs]
    handles += [
        Line2D([], [], color="#c1440e", linewidth=1.4, label="cost, share of the model"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, fontsize=8, frameon=False)
