"""The field `drafts` of a configuration: plans that draft, and how many of their tokens were kept where it was measured."""

from collections.abc import Sequence
from typing import Any

from .actions import ActionTable
from .checks import is_number
from .draft_policy import EDGES


COLUMNS = ("plans", "drafted", "kept")
DEFAULT = ("int8",)  # what drafts run in where a configuration has no precisions


def draft_table(table: ActionTable, precisions: Sequence[str] | None) -> ActionTable:
    """The actions that plans which draft are made of."""
    return table.with_precisions(precisions or DEFAULT)


def check_drafts(drafts: Any, table: ActionTable, layers: int) -> None:
    """Notice what is no measurement of drafts.

    Args:
        drafts: lists of equal length: plans in short, and counts by margin, `len(EDGES) + 1` for each plan.
        table: the actions.
        layers: how many a plan has.

    Raises:
        ValueError: anything else; the message says what is allowed.
    """
    lists = isinstance(drafts, dict) and set(drafts) == set(COLUMNS) and all(isinstance(drafts[name], list) for name in COLUMNS)
    if not lists or not drafts["plans"] or len({len(drafts[name]) for name in COLUMNS}) != 1:
        raise ValueError(f"drafts={drafts!r} is not allowed: it must be a dict of lists of equal length, {', '.join(COLUMNS)}")
    for plan in drafts["plans"]:
        try:
            actions, _ = table.plan(plan, layers), table.head_of(plan)
        except (AttributeError, ValueError) as error:
            raise ValueError(f"drafts has the plan {plan!r}, which is not allowed: {error}") from error
        if any(table[action].leaves for action in actions):
            raise ValueError(f"drafts has the plan {plan!r}, which is not allowed: it leaves the stack early")
    for drafted, kept in zip(drafts["drafted"], drafts["kept"], strict=True):
        counts = isinstance(drafted, list) and isinstance(kept, list) and all(map(is_number, [*drafted, *kept]))
        if not counts or not len(drafted) == len(kept) == len(EDGES) + 1 or any(map(_is_wrong, drafted, kept)):
            raise ValueError(
                f"drafts has drafted={drafted!r}, kept={kept!r}, which is not allowed: both must be lists of {len(EDGES) + 1} "
                "numbers from 0, and no more may be kept than were drafted"
            )


def _is_wrong(drafted: float, kept: float) -> bool:
    return not 0 <= kept <= drafted
