"""Which budgets of a model are worth showing where nobody names any."""

import torch

from ..actions import FULL
from ..configuration_anee import AneeConfig


OF_LAYERS = (1.0, 0.8, 0.6, 0.5, 0.3)
# Half in 8 bits, all of it, all in 4 bits, and then layers left out. Rounded weights are twice the share of a base in half
# precision.
OF_PRECISIONS = (1.0, 0.5, 0.26, 0.18, 0.12)
OF_PRECISIONS_IN_HALF = (1.0, 0.75, 0.51, 0.36, 0.24)


def budgets_to_show(config: AneeConfig, dtype: torch.dtype = torch.float32) -> tuple[float, ...]:
    """Budgets that fit a model's actions and the dtype of its base, highest first.

    With cheaper variants, lower ones before anything is left out.
    """
    if not config.table.variants - {FULL}:
        return OF_LAYERS
    return OF_PRECISIONS_IN_HALF if dtype.itemsize < torch.float32.itemsize else OF_PRECISIONS
