"""`capacity` beside `energy_budget`: the share of the feed-forwards that a `gated` controller runs, as the budget of that."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .budget import TOLERANCE, budget_tensor
from .checks import is_number
from .controller import Controller
from .controller_gated import GatedController


logger = logging.get_logger("transformers.anee")  # follows the verbosity of transformers

LOWEST = 0.1
CLOSE = 0.02  # of a capacity: nobody need be warned of less
CAPACITY, BUDGET = "capacity", "energy_budget"


def budgets_of(controller: Controller, kind: str, capacity: Any, rows: int) -> Tensor:
    """Budgets float64 [B] or [B, T] of capacities: one number, one per row or one per token; at 1 nothing is left out.

    Args:
        controller: whose.
        kind: its name.
        capacity: between 0.1 and 1; below what was calibrated, the lowest that was is taken, with a warning.
        rows: how many there are, B.

    Raises:
        ValueError: a kind without capacities, a value out of the range, or not one per row.
    """
    if not isinstance(controller, GatedController):
        raise ValueError(
            f"capacity={capacity!r} is not possible with controller={kind!r}: only 'gated' has capacities; give energy_budget"
        )
    values = _checked(capacity, rows)
    dial = controller.dial
    whole = values >= 1.0 - TOLERANCE
    if not dial.calibrated and not bool(whole.all()):
        logger.warning_once(f"capacity={capacity} leaves nothing out: this artifact has no calibration for it")
        whole = torch.ones_like(whole)
    lowest, asked = float(dial.settings[0]), float(values.min())
    if dial.calibrated and asked < lowest - CLOSE:
        logger.warning_once(f"capacity={asked:.3g} is below what was calibrated: the lowest, {lowest:.3g}, takes its place")
    budgets = dial.budget_of(values.flatten()).view_as(values)
    return torch.where(whole, controller.top, budgets)


def _checked(capacity: Any, rows: int) -> Tensor:
    """Capacities as numbers, float64 [B] or [B, T]."""
    if isinstance(capacity, bool | int | float):
        check_capacity(capacity)
    values = budget_tensor(capacity, rows, CAPACITY)
    if values.numel() and float(values.min()) < LOWEST - TOLERANCE:
        raise ValueError(f"capacity={capacity!r} is not allowed: every value must be between {LOWEST} and 1")
    return values


def check_capacity(value: Any, name: str = CAPACITY) -> float:
    """A capacity as a float.

    Raises:
        ValueError: it is not a number from 0.1 to 1.
    """
    if not is_number(value) or not LOWEST <= value <= 1.0:
        raise ValueError(f"{name}={value!r} is not allowed: it must be a number between {LOWEST} and 1")
    return float(value)


def check_one(capacity: Any, budget: Any) -> None:
    """Check that not both are given.

    Raises:
        ValueError: they are.
    """
    if capacity is not None and budget is not None:
        raise ValueError(
            f"capacity={capacity!r} and energy_budget={budget!r} say the same in two ways: only one of them is allowed"
        )


def first_given(places: Iterable[Callable[[str], Any]]) -> Any:
    """The capacity of the first place that says a capacity or a budget; None where that is a budget, or none does.

    Raises:
        ValueError: a place says both.
    """
    for place in places:
        capacity, budget = place(CAPACITY), place(BUDGET)
        check_one(capacity, budget)
        if capacity is not None or budget is not None:
            return capacity
    return None
