"""Which budgets of a model are worth showing where nobody names any."""

from ..actions import FULL
from ..configuration_anee import AneeConfig


OF_LAYERS = (1.0, 0.8, 0.6, 0.5, 0.3)
OF_PRECISIONS = (1.0, 0.5, 0.26, 0.18, 0.12)  # half in 8 bits, all of it, all in 4 bits, and then layers left out


def budgets_to_show(config: AneeConfig) -> tuple[float, ...]:
    """Budgets that fit a model's actions, highest first: with cheaper variants, lower ones before anything is left out."""
    return OF_PRECISIONS if config.table.variants - {FULL} else OF_LAYERS
