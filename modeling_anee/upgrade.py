"""Configurations of format version 1, whose costs were shares of the decoder stack, in terms of the whole model.

A cost c of the stack is c * (1 - head) + head of the model, where `head` is the head's share of it.
"""

import math

from .configuration_anee import FORMAT_VERSION, AneeConfig


def upgrade(config: AneeConfig, head: float) -> None:
    """Rewrite what an artifact of version 1 has measured; budgets that a user gives have the new meaning already.

    Args:
        config: changed in place; nothing is done to one of a later version.
        head: share of the whole model's work that the final norm and the head are.
    """
    if config.format_version >= 2:
        return
    stack = 1.0 - head
    if config.router_budgets is not None:
        config.router_budgets = [budget * stack + head for budget in config.router_budgets]
    if config.calibration is not None:
        table = dict(config.calibration)
        for name in ("budgets", "cost"):
            if name in table:
                table[name] = [value * stack + head for value in table[name]]
        if "settings" in table and config.controller == "learned":  # a price per unit of cost, and units have grown
            table["settings"] = [price / stack for price in table["settings"]]
        if "settings" in table and config.controller == "routed":  # its logarithm
            table["settings"] = [price - math.log(stack) for price in table["settings"]]
        config.calibration = table
    config.format_version = FORMAT_VERSION
