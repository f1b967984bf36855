"""Perplexity against cost as a picture: one point for each budget, with error bars."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import LogLocator, ScalarFormatter


COLOUR, INK = "#2a6f97", "#333333"


def draw_perplexity_curve(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike, title: str | None = None) -> None:
    """Draw perplexity against realised cost, written whole or not at all.

    The dashed line is the perplexity of the dearest row. The scale is logarithmic when the perplexities span more than
    a factor of 3.

    Args:
        rows: each with `budget`, `mean_cost`, `perplexity` and `standard_error` (nan or None: no bar), as `anee perplexity`
            writes them.
        path: picture to write; its ending says the format.
        title: text above.

    Raises:
        ValueError: no rows, or an ending that no picture has.
    """
    if not rows:
        raise ValueError("rows is empty: there is nothing to draw")
    check_picture(path)
    points = sorted(rows, key=lambda row: row["mean_cost"])
    costs, values = ([row[name] for row in points] for name in ("mean_cost", "perplexity"))
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.errorbar(costs, values, yerr=[row["standard_error"] or 0.0 for row in points], color=COLOUR, marker="o", capsize=3)
    axes.axhline(values[-1], color=INK, linewidth=0.8, linestyle="--")
    for row in points:
        place = (row["mean_cost"], row["perplexity"])
        axes.annotate(f"{row['budget']:g}", place, xytext=(5, 5), textcoords="offset points", fontsize=8, color=INK)
    if max(values) > 3 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("mean cost of a token, share of the decoder stack")
    axes.set_ylabel("perplexity")
    axes.set_title(title or "perplexity at each energy budget", fontsize=10, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    beside = Path(path).with_name(f".{os.getpid()}.{Path(path).name}")
    try:
        figure.savefig(beside, dpi=120)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
        pyplot.close(figure)


def check_picture(path: str | os.PathLike) -> None:
    """Notice a picture of an unknown format before the work for it is done.

    Raises:
        ValueError: the path does not end as a picture does.
    """
    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    if Path(path).suffix[1:].lower() not in known:
        raise ValueError(f"{os.fspath(path)} is not the name of a picture: it must end with one of .{', .'.join(known)}")
