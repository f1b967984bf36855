"""Dials beside controls at equal milliseconds a token: what no slower control does better, and what the dial has at its time.

It measures nothing: points come from `decode_time.py` and `perplexity.py`.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple


class Point(NamedTuple):
    """One way to run a model: what it is called, milliseconds of a token, and loss of a token in nats."""

    name: str
    milliseconds: float
    loss: float


def best_within(points: Iterable[Point], milliseconds: float) -> Point | None:
    """The point of least loss, then least time, among those that take at most so long; None if none does."""
    within = [point for point in points if point.milliseconds <= milliseconds]
    return min(within, key=lambda point: (point.loss, point.milliseconds), default=None)


def loss_at(dial: Iterable[Point], milliseconds: float) -> float | None:
    """Loss of a dial at a time, on the line between its nearest points on both sides; None beyond its ends.

    Where several points take equally long, the best of them counts.
    """
    best: dict[float, float] = {}
    for point in dial:
        best[point.milliseconds] = min(point.loss, best.get(point.milliseconds, math.inf))
    if milliseconds in best:
        return best[milliseconds]
    for low, high in pairwise(sorted(best)):
        if low < milliseconds < high:
            share = (milliseconds - low) / (high - low)
            return best[low] * (1.0 - share) + best[high] * share
    return None


def compare_times(rows: Sequence[dict[str, Any]], dials: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What timed rows of a comparison say at equal milliseconds, ready for JSON.

    Args:
        rows: of `comparison.compare`, the base first; those without milliseconds are left out.
        dials: names of those that are dials, all of which begin at the base. The rest are controls, the base among them.

    Returns:
        `dials`: of each of their points the best control that is no slower, and the ratio of perplexities, point / control;
        `controls`: of each the dials that are timed on both sides of it, and the same ratio at the control's own time.
    """
    timed = [row for row in rows if row["milliseconds"] is not None]
    base, controls = point_of(timed[0]), [point_of(row) for row in timed[1:] if row["name"] not in dials]
    own = {name: [point_of(row) for row in timed[1:] if row["name"] == name] for name in dials}
    beside = [_beside(point, best_within([base, *controls], point.milliseconds)) for points in own.values() for point in points]
    return {"dials": beside, "controls": [entry for control in controls for entry in _under(control, base, own)]}


def point_of(row: dict[str, Any]) -> Point:
    """A row of a comparison as a point; its loss is what it has above the base's."""
    budget = "" if row.get("fixed") else f" at {row['budget']:g}"
    return Point(row["name"] + budget, row["milliseconds"], math.log(row["ratio"]))


def _beside(point: Point, control: Point | None) -> dict[str, Any]:
    return {
        "name": point.name,
        "milliseconds": point.milliseconds,
        "control": control and control.name,
        "control_milliseconds": control and control.milliseconds,
        "ratio": control and math.exp(point.loss - control.loss),
    }


def _under(control: Point, base: Point, dials: dict[str, list[Point]]) -> Iterator[dict[str, Any]]:
    for name, points in dials.items():
        loss = loss_at([base, *points], control.milliseconds)
        if loss is not None:
            ratio = math.exp(loss - control.loss)
            yield {"name": control.name, "milliseconds": control.milliseconds, "dial": name, "ratio": ratio}


def as_text(found: dict[str, list[dict[str, Any]]]) -> str:
    """The same as two Markdown tables."""
    lines = ["| dial | ms/token | best control that is no slower | ms/token | perplexity, dial / control |", "|---" * 5 + "|"]
    for entry in found["dials"]:
        control = "none |  |  |"
        if entry["control"] is not None:
            control = f"{entry['control']} | {entry['control_milliseconds']:.2f} | {entry['ratio']:.3f} |"
        lines.append(f"| {entry['name']} | {entry['milliseconds']:.2f} | {control}")
    lines += ["", "| control | ms/token | dial | perplexity at the control's time, dial / control |", "|---" * 4 + "|"]
    for entry in found["controls"]:
        lines.append(f"| {entry['name']} | {entry['milliseconds']:.2f} | {entry['dial']} | {entry['ratio']:.3f} |")
    return "\n".join(lines)
