"""The field `calibration`: columns of numbers, a row for each budget that was calibrated."""

from typing import Any

from .checks import is_number
from .configuration_gated import check_thresholds


COLUMNS = ("budgets", "settings", "cost", "perplexity_ratio", "standard_error")
THRESHOLDS = ("thresholds", "exit_thresholds", "shares")  # columns of a `gated` one


def check_calibration(table: Any) -> None:
    """Check the names of the columns, and those that every kind has.

    Raises:
        ValueError: no dict of lists of equal length, budgets that don't ascend between 0 and 1, or settings in no order.
    """
    if table is None:
        return
    columns = (*COLUMNS, *THRESHOLDS)
    if not isinstance(table, dict) or not set(table) <= set(columns) or not isinstance(table.get("budgets"), list | tuple):
        raise ValueError(
            f"calibration={table!r} is not allowed: it must be a dict of lists, 'budgets' and some of {columns[1:]}"
        )
    for name in set(table) & set(COLUMNS):
        column = table[name]
        if not isinstance(column, list | tuple) or len(column) != len(table["budgets"]) or not all(map(is_number, column)):
            raise ValueError(
                f"calibration has {name}={column!r}, which is not allowed: it must be a list of numbers, as many as budgets"
            )
    budgets, settings = list(table["budgets"]), list(table.get("settings", ()))
    if not budgets or budgets != sorted(set(budgets)) or budgets[0] < 0 or budgets[-1] > 1:
        raise ValueError(
            f"calibration has budgets={budgets}, which is not allowed: they must be ascending numbers between 0 and 1"
        )
    if settings not in (sorted(settings), sorted(settings, reverse=True)):
        raise ValueError(f"calibration has settings={settings}, which is not allowed: they must be monotone")


def check_columns(table: dict | None, layers: int, boundaries: int, exits: int) -> None:
    """Check the columns of a `gated` controller in a checked calibration.

    Args:
        table: the calibration.
        layers: number of layers.
        boundaries: between variants of the feed-forward.
        exits: number of exit gates.

    Raises:
        ValueError: capacities that don't ascend, or columns of another shape.
    """
    if table is None or "thresholds" not in table:
        return
    settings = table.get("settings")
    if not isinstance(settings, list | tuple) or list(settings) != sorted(set(settings)):
        raise ValueError(f"calibration has settings={settings}, which is not allowed: capacities must be ascending")
    for name, shape in zip(THRESHOLDS, ((boundaries, layers), (exits,), (layers,)), strict=True):
        if name in table:
            check_thresholds(name, table[name], len(table["budgets"]), shape)
