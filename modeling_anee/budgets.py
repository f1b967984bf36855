"""Budgets as numbers: what is allowed, one for each row, and how a budget follows what was spent so far."""

from typing import Any

import torch
from torch import Tensor

from .checks import check_budget


def budget_tensor(value: Any, rows: int, name: str = "energy_budget") -> Tensor:
    """Budgets as a float64 tensor [B] or [B, T] on the CPU, from one number, one per row or one per token.

    Raises:
        ValueError: out of [0, 1], or not one per row.
    """
    if isinstance(value, bool | int | float):
        return torch.full((rows,), check_budget(value, name), dtype=torch.float64, device="cpu")
    try:
        budget = torch.as_tensor(value, dtype=torch.float64, device="cpu")  # a list in float32 would not be its numbers
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={value!r} is not allowed: it must be one number, or one for each row") from error
    if budget.dim() == 0:
        budget = budget.expand(rows)
    if budget.dim() > 2 or budget.shape[0] != rows:
        raise ValueError(
            f"{name} of shape {tuple(budget.shape)} is not allowed: it must be one number, or one for each of the {rows} rows"
        )
    if not bool(((budget >= 0) & (budget <= 1)).all()):
        raise ValueError(f"{name}={value!r} is not allowed: every value must be between 0 and 1")
    return budget


def moved_budget(budget: Tensor, feedback: Tensor, cost: Tensor, tokens: int) -> Tensor:
    """Budgets of the next token, float64 [B]; a budget of 1 stays what it is.

    Args:
        budget: what every token is asked to cost, float64 [B].
        feedback: by how much of what was under- or overspent so far the budget is moved, float64 [B].
        cost: what the tokens so far cost, float64 [B].
        tokens: how many they are.
    """
    moved = (budget + feedback * (tokens * budget - cost)).clamp(0.0, 1.0)
    return torch.where(budget < 1.0, moved, budget)
