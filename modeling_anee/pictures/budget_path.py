"""The way of the budget while deadlines are kept, and tokens against time, beside those at a fixed budget."""

import os
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes

from ..evaluation.deadlines import FIXED, FOLLOWS, SAME_THREADS
from .drawing import INK, bare, save


SHOWN = 2.0  # deadlines: who takes longer leaves the picture
COLOURS = {FOLLOWS: "#1b6ca8", SAME_THREADS: "#7a8b99", FIXED: "#c1440e"}


def draw_budget_path(report: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a picture with three panels, against time: budgets of all prompts, their threads, how many tokens had come.

    Args:
        report: figures of `evaluation/deadlines.py`.
        path: file to write.

    Raises:
        ValueError: the path does not end as a picture does.
    """
    heights = {"height_ratios": (4, 1, 4)}
    figure, (above, middle, below) = pyplot.subplots(
        3, 1, figsize=(8.0, 6.4), sharex=True, layout="constrained", gridspec_kw=heights
    )
    rows: Sequence[dict[str, Any]] = report["rows"]
    for row in rows:
        colour, shown = COLOURS[row["way"]], {"linewidth": 1.0, "alpha": 0.35}
        times = [0.0, *row["times"]]
        if row["way"] != FIXED:  # each budget holds until its token has come
            above.step(times, [row["budgets"][0], *row["budgets"]], where="pre", color=colour, **shown)
        if row["way"] == FOLLOWS:
            middle.step(times, [row["threads"][0], *row["threads"]], where="pre", color=colour, **shown)
        below.plot(times, range(len(times)), color=colour, **shown)
    for way in report["ways"]:
        kept = f"{way['way']}: {way['kept']} of {way['of']} within 5%, mean cost {way['cost']:.2f}"
        below.plot([], [], color=COLOURS[way["way"]], label=kept)
    _mark((above, middle, below), report["deadline"], [row["disturbed"] for row in rows if row["disturbed"] is not None])
    above.set_ylabel("budget of the next token")
    above.set_ylim(0.0, 1.04)
    middle.set_ylabel("threads")
    middle.set_ylim(0, report["threads"] + 0.5)
    middle.set_yticks([0, report["threads"]])
    below.set_ylabel("new tokens")
    below.set_ylim(0, report["new_tokens"] * 1.04)
    below.set_xlabel("seconds since the call of generate")
    longest = max(report["deadline"], *(row["seconds"] for row in rows))
    below.set_xlim(0.0, min(SHOWN * report["deadline"], 1.12 * longest))
    below.legend(loc="lower right", frameon=False, fontsize=8)
    bare(above, middle, below)
    prompts = len({row["prompt"] for row in rows})
    figure.suptitle(f"{prompts} prompts against a deadline of {report['deadline']:.2f} s", fontsize=10, x=0.01, ha="left")
    save(figure, path)


def _mark(panels: Sequence[Axes], deadline: float, disturbed: Sequence[float]) -> None:
    """The deadline, and where others begin to take processors."""
    for axes in panels:
        axes.axvline(deadline, color=INK, linewidth=1.2)
        if disturbed:
            axes.axvline(statistics.median(disturbed), color=INK, linewidth=1.0, linestyle="--")
    if disturbed:
        panels[0].text(statistics.median(disturbed), 0.06, "others begin ", fontsize=8, color=INK, ha="right")
    panels[0].text(deadline, 0.06, " deadline", fontsize=8, color=INK)
