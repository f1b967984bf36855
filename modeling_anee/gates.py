"""Linear gates on hidden states, and the dial that says what their scores must be."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bridges import normalised
from .budget import Dial


UNTRAINED = 10.0  # logarithm of a loss for which nothing is left out


class GateBank(nn.Linear):
    """Linear gates side by side: weights [n, D], biases [n]. Untrained they say that everything is needed."""

    def reset_parameters(self) -> None:
        """Back to the untrained state."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, UNTRAINED)

    def forward(self, hidden: Tensor, number: int = 0) -> Tensor:
        """What one of the gates says of hidden states [..., D], float32 [...]."""
        features = normalised(hidden).to(self.weight.dtype)
        return (F.linear(features, self.weight[number]) + self.bias[number]).float()


class GateDial(Dial):
    """From a budget to thresholds and capacity, and from a capacity to a budget: linear between what was calibrated.

    A calibration has a row for each capacity: `budgets` (its cost, ascending), `settings` (the capacity), `thresholds` of the
    routers, `exit_thresholds` of the gates and `shares` of the feed-forwards that each layer ran. Without one nothing is left
    out.

    Args:
        calibration: `AneeConfig.calibration`, or None.
        layers: number of layers.
        boundaries: between variants of the feed-forward, dearest first.
        exits: number of exit gates.
    """

    def __init__(self, calibration: dict | None, layers: int, boundaries: int, exits: int) -> None:
        super().__init__(calibration, neutral=1.0)
        self.calibrated = self.calibrated and calibration is not None and "thresholds" in calibration
        never = {"thresholds": [[[-torch.inf] * layers] * boundaries], "exit_thresholds": [[-torch.inf] * exits]}
        table = never if calibration is None or not self.calibrated else never | calibration
        self.routers = torch.tensor(table["thresholds"], dtype=torch.float64, device="cpu")  # [K, boundaries, L]
        self.exits = torch.tensor(table["exit_thresholds"], dtype=torch.float64, device="cpu")  # [K, E]
        self.shares: Tensor | None = None  # [K, L]
        if self.calibrated and "shares" in table:
            self.shares = torch.tensor(table["shares"], dtype=torch.float64, device="cpu")

    def thresholds(self, budget: Tensor) -> tuple[Tensor, Tensor]:
        """Of routers float64 [n, boundaries, L] and exit gates [n, E] for budgets float64 [N]; n is N, or 1 for equal ones."""
        same = len(budget) > 0 and bool((budget == budget[0]).all())
        budget = budget[:1] if same else budget
        return self.between(budget, self.routers), self.between(budget, self.exits)

    def shares_at(self, budget: Tensor) -> Tensor:
        """What tokens asked about at each layer are to count as in the mean, float64 [N, L]."""
        assert self.shares is not None
        return self.between(budget, self.shares)

    def budget_of(self, capacity: Tensor) -> Tensor:
        """Budgets float64 [N] of capacities float64 [N]; outside of what was calibrated, as at the nearest."""
        twin = Dial({"budgets": self.settings.tolist(), "settings": self.budgets.tolist()}, neutral=1.0)
        return twin.setting(capacity)
