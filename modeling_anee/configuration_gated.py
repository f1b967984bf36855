"""Fields of the `gated` kind: defaults that follow from the base, checks, rows of the table that it needs."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from .actions import FULL, NONE, Action, ActionTable
from .checks import is_number


STRATEGIC = (4, 8, 12, 16, 19)  # layers with exit gates of a stack of 22
STRATEGIC_OF = 22


def strategic_layers(layers: int) -> list[int]:
    """Layers before which tokens may leave, in proportion to the depth; none is the first."""
    chosen = {round(layer * layers / STRATEGIC_OF) for layer in STRATEGIC}
    return sorted(chosen & set(range(1, layers)))


def default_variants(precisions: Sequence[str]) -> list[str]:
    """What the feed-forward of each token may run in: the dearest of the precisions, or not at all."""
    return [precisions[0] if precisions else FULL, NONE]


def check_variants(variants: Any, precisions: Sequence[str]) -> None:
    """Check `gated_variants`, dearest first.

    Raises:
        ValueError: not two or more of what there is, in this order.
    """
    allowed = [FULL, *precisions, NONE]
    listed = isinstance(variants, list | tuple) and all(variant in allowed for variant in variants)
    if not listed or len(variants) < 2 or any(allowed.index(a) >= allowed.index(b) for a, b in pairwise(variants)):
        raise ValueError(
            f"gated_variants={variants!r} is not allowed: it must be a list of at least two of {allowed}, in this order "
            "(precisions names the variants between full and none)"
        )


def check_head(head: Any, precisions: Sequence[str]) -> None:
    """Check `gated_head`.

    Raises:
        ValueError: not a variant that there is.
    """
    allowed = [FULL, *precisions]
    if head is not None and head not in allowed:
        raise ValueError(f"gated_head={head!r} is not allowed: it must be one of {allowed} (precisions names those after full)")


def attention_beside(variants: Sequence[str], feed_forward: str) -> str:
    """The variant that the attention runs in: that of the feed-forward, the cheapest there is beside none."""
    return feed_forward if feed_forward != NONE else variants[-2]


def with_gated_rows(table: ActionTable, variants: Sequence[str]) -> ActionTable:
    """A table with an action for each variant of the feed-forward, and its attention."""
    pairs = [(attention_beside(variants, variant), variant) for variant in variants]
    missing = [pair for pair in pairs if table.find(*pair) is None]
    return ActionTable([*table, *(Action("_".join(pair).upper(), *pair) for pair in missing)])


def check_thresholds(name: str, column: Any, rows: int, shape: tuple[int, ...]) -> None:
    """Check the thresholds of a calibration: for each of its rows, nested lists of numbers of a shape.

    Raises:
        ValueError: anything else.
    """
    if not _has_shape(column, (rows, *shape)):
        sizes = " x ".join(map(str, (rows, *shape)))
        raise ValueError(f"calibration has {name}={column!r}, which is not allowed: it must be nested lists of {sizes} numbers")


def _has_shape(value: Any, shape: tuple[int, ...]) -> bool:
    if not shape:
        return is_number(value)
    return isinstance(value, list | tuple) and len(value) == shape[0] and all(_has_shape(part, shape[1:]) for part in value)
