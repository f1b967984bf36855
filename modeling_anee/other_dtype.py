"""An artifact over a base in another dtype than the one that it was fitted over: what its budgets are there.

Costs are shares of the base's own bytes, so those of rounded weights grow as the base shrinks: all of SmolLM2-135M in 4 bits is
0.16 of it in float32, 0.31 in bfloat16. What runs in full has the same share in any dtype.
"""

import math
from typing import Any

import torch
from transformers.utils import logging

from .actions import FULL
from .configuration_anee import AneeConfig
from .costs import CostTable


logger = logging.get_logger("transformers.anee")  # follows the verbosity of transformers


def growth(fitted: str | None, now: torch.dtype | None) -> float:
    """How many times as large the share of rounded weights is as it was in the dtype of the fit; 1.0 where one is not known."""
    if fitted is None or now is None:
        return 1.0
    return getattr(torch, fitted).itemsize / now.itemsize


def growth_of(config: AneeConfig, costs: CostTable) -> float:
    """The same of an artifact; 1.0 where nothing is rounded, or costs are not in bytes."""
    if costs.unit != "bytes" or config.table.variants == {FULL}:
        return 1.0
    return growth(config.base_dtype, costs.dtype)


def grown_dial(calibration: dict[str, Any] | None, growth: float) -> dict[str, Any] | None:
    """The calibration of a `routed` controller, whose settings are logarithms of a price per unit of cost."""
    if calibration is None or "settings" not in calibration or growth == 1.0:
        return calibration
    return {
        "budgets": [budget * growth for budget in calibration["budgets"]],
        "settings": [setting - math.log(growth) for setting in calibration["settings"]],
    }


def check_dial(config: AneeConfig, costs: CostTable) -> None:
    """Warn where a calibration was measured over a base in another dtype, and can't be read in terms of this one."""
    table = config.calibration
    if config.controller == "routed" or table is None or "settings" not in table or growth_of(config, costs) == 1.0:
        return
    logger.warning_once(
        f"this {config.controller!r} controller was calibrated over a base in {config.base_dtype}, and costs are shares "
        f"of the base's bytes: over one in {costs.dtype} it will miss its budgets where weights are rounded"
    )
