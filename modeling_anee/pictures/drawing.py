"""What all pictures share: matplotlib without a screen, axes, labels of tokens, files written whole."""

import os
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..data.files import write_file
from ..trace import ExecutionTrace


DPI = 110
INK = "#333333"


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure in the format that the ending says, whole or not at all, and close it.

    Raises:
        ValueError: an ending that no picture has.
    """
    buffer = BytesIO()
    try:
        check_ending(path)
        figure.savefig(buffer, format=Path(path).suffix[1:].lower(), dpi=DPI)
    finally:
        pyplot.close(figure)
    write_file(path, buffer.getvalue())


def check_ending(path: str | os.PathLike) -> None:
    """Notice a picture of an unknown format.

    Raises:
        ValueError: the path does not end as a picture does.
    """
    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    if Path(path).suffix[1:].lower() not in known:
        raise ValueError(f"{os.fspath(path)} is not the name of a picture: it must end with one of .{', .'.join(known)}")


def bare(*axes: Axes) -> None:
    """Only the left and the lower line of a frame."""
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)


def labels_of(trace: ExecutionTrace, tokens: Sequence[str], row: int) -> list[str]:
    """A label for each token of a row that is not padding.

    Args:
        trace: what was done.
        tokens: text of each token, padding included. The last token of `generate`, which was not run, may be among them.
        row: which row of the batch.

    Raises:
        ValueError: a number of tokens that is not the trace's.
    """
    valid = trace.valid[row].tolist()
    if len(tokens) - len(valid) not in (0, 1):
        raise ValueError(f"tokens has {len(tokens)} entries, but the trace has {len(valid)} tokens")
    return [token_label(text) for text, is_real in zip(tokens, valid, strict=False) if is_real]


def token_label(text: str) -> str:
    """A token as a tick label: visible spaces and line ends, no maths mode."""
    text = text.replace("\n", "⏎").replace("\t", "⇥").replace("$", r"\$")
    text = (text[:14] + "…" if len(text) > 15 else text) or "∅"
    return "␣" * len(text) if text.isspace() else text


def count_valid(trace: ExecutionTrace, row: int, limit: int | None) -> int:
    """How many of the first `limit` tokens of a row are not padding; None is all."""
    return int(trace.valid[row][:limit].sum())


def cut_note(shown: int, total: int) -> str:
    """What a title says of a text that is too long for its picture."""
    return "" if shown == total else f" (first {shown} of {total} tokens)"


def token_ticks(axes: Axes, labels: Iterable[str]) -> None:
    """Write tokens along the lower edge, upright."""
    labels = list(labels)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7.5)
    axes.tick_params(axis="x", length=2, pad=2)
