"""The dial: from a budget to the number that a controller must be set to so that its mean cost is that budget.

Measured on held-out text when an artifact is made (`training/calibration.py`), and kept in its config.
"""

import torch
from torch import Tensor


class Dial:
    """Piecewise linear and monotone between calibrated budgets; outside of them, as at the nearest.

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
        if len(self.budgets) == 1:
            return self.settings.expand(len(budget))
        high = torch.searchsorted(self.budgets, budget.contiguous()).clamp(1, len(self.budgets) - 1)
        below, above = self.budgets[high - 1], self.budgets[high]
        share = ((budget - below) / (above - below)).clamp(0.0, 1.0)
        return self.settings[high - 1].lerp(self.settings[high], share)
