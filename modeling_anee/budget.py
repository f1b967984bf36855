"""Budgets as numbers: what is allowed, one for each row; how they follow what was spent; what is spent above them; the dial."""

from typing import Any

import torch
from torch import Tensor

from .checks import check_budget
from .step import Step


TOLERANCE = 1e-9  # of budgets and costs, which are sums of float64 shares


def budget_tensor(value: Any, rows: int, name: str = "energy_budget") -> Tensor:
    """Budgets as a float64 tensor [B] or [B, T] on the CPU, from one number, one per row or one per token.

    Raises:
        ValueError: out of [0, 1], or not one per row.
    """
    if callable(value):
        raise ValueError(f"{name}={value!r} is not allowed here: only energy_budget of generate may be asked for each token")
    if isinstance(value, bool | int | float):
        return torch.full((rows,), check_budget(value, name), dtype=torch.float64, device="cpu")
    try:
        budget = torch.as_tensor(value, dtype=torch.float64, device="cpu")  # a list in float32 would not be its numbers
    except (TypeError, ValueError, RuntimeError) as error:
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


def account_after(step: Step, spent: Tensor, floor: float) -> Tensor:
    """What every sequence has spent above its budgets, or the floor, up to and with each token, float64 [B, T]."""
    return step.account + step.places.running_sum((spent - step.budget.clamp(min=floor)) * step.valid)


def account_without(step: Step, asked: Tensor, cost: Tensor, floor: float) -> Tensor:
    """The same before each token, the tokens in a mask [B, T] left out; all others will have cost so much, float64 [B, T]."""
    above = (cost - step.budget.clamp(min=floor)) * (step.valid & ~asked)
    return step.account + step.places.running_sum(above) - above


class Dial:
    """From a budget to the number that a controller must be set to so that its mean cost is that budget.

    Measured on held-out text when an artifact is made (`training/stages/calibration.py`), and kept in its config.
    Piecewise linear and monotone between calibrated budgets; outside of them, as at the nearest.

    Args:
        calibration: `AneeConfig.calibration`: lists `budgets` (ascending) and `settings`, or None for uncalibrated.
        neutral: setting where there is no calibration.
    """

    def __init__(self, calibration: dict | None, neutral: float) -> None:
        self.calibrated = calibration is not None and "settings" in calibration
        table = calibration if calibration is not None and self.calibrated else {"budgets": [0.0], "settings": [neutral]}
        # Named, since models are loaded with the meta device as the default.
        self.budgets = torch.tensor(table["budgets"], dtype=torch.float64, device="cpu")
        self.settings = torch.tensor(table["settings"], dtype=torch.float64, device="cpu")

    def setting(self, budget: Tensor) -> Tensor:
        """Settings for budgets, float64 [N] -> float64 [N], on the CPU."""
        return self.between(budget, self.settings)

    def between(self, budget: Tensor, column: Tensor) -> Tensor:
        """A column [K, ...] of the calibration at budgets float64 [N], float64 [N, ...]."""
        if len(self.budgets) == 1:
            return column.expand(len(budget), *column.shape[1:])
        high = torch.searchsorted(self.budgets, budget.contiguous()).clamp(1, len(self.budgets) - 1)
        below, above = self.budgets[high - 1], self.budgets[high]
        share = ((budget - below) / (above - below)).clamp(0.0, 1.0)
        return column[high - 1].lerp(column[high], share.view(-1, *[1] * (column.dim() - 1)))
