"""An artifact whose base has lost its full weights: whether that is possible, and what budgets are left."""

import math
from itertools import compress

import torch
from torch import Tensor
from transformers.utils import logging

from .actions import FULL
from .base_dropped import Drop
from .budget import TOLERANCE
from .configuration_anee import AneeConfig
from .controller import Controller
from .plans import listed_plans, need


logger = logging.get_logger("transformers.anee")  # follows the verbosity of transformers


def what_to_drop(config: AneeConfig, controller: Controller) -> Drop:
    """What is kept when the full weights go: what those plans run in that don't need them.

    Raises:
        ValueError: the controller, or every plan, needs the full weights.
    """
    if not controller.runs_without_full:
        raise ValueError(
            f"drop_full=True is not possible with controller={config.controller!r}, which processes tokens in full: it must be "
            "'plan' or 'routed', with precisions=['int8'] for example"
        )
    table, (plans, heads) = config.table, listed_plans(config)
    runs = [not needed for needed in need(config, plans, [FULL])]
    if not any(runs):
        raise ValueError(
            "drop_full=True is not possible: every plan runs layers, or their keys and values, in full; give "
            "precisions=['int8'] for example, or plans of INT8, SKIP_INT8, INT8_SKIP_FFN, ..."
        )
    if controller.keeps_routes:
        _check_routes(config, plans, runs)
    layers = {variant for plan in compress(plans, runs) for action in plan for variant in table[action].variants}
    return Drop(
        variants=tuple(sorted(table.variants - {FULL})),
        layers=frozenset(layers),
        heads=frozenset(table.heads[head] for head in compress(heads, runs)),
    )


def _check_routes(config: AneeConfig, plans: list[list[int]], runs: list[bool]) -> None:
    """Check that plans which leave something out, and one that leaves nothing out, are among those that still run.

    Raises:
        ValueError: one that leaves something out, or each that doesn't, needs the full weights.
    """
    table, where = config.table, f"drop_full=True is not possible with controller={config.controller!r}"
    whole = table.complete[torch.tensor(plans, device="cpu")].all(dim=1).tolist()
    for plan, leaves_nothing_out, left in zip(plans, whole, runs, strict=True):
        if not (leaves_nothing_out or left):
            raise ValueError(
                f"{where}: it chooses among plans, and {table.text(plan)!r} runs layers, or their keys and values, in full; "
                "controller='plan' does without it"
            )
    if not any(one and left for one, left in zip(whole, runs, strict=True)):
        raise ValueError(
            f"{where}: every plan that leaves nothing out runs layers in full; give one such as '{config.num_layers}*INT8', or "
            "controller='plan'"
        )


def check_ceiling(budget: Tensor, ceiling: float, name: str = "energy_budget") -> None:
    """Check budgets against the largest there is.

    Raises:
        ValueError: one is above it.
    """
    highest = float(budget.max()) if budget.numel() else 0.0
    if highest > ceiling + TOLERANCE:
        raise ValueError(
            f"{name}={highest:.4g} is not possible: it needs the base's full weights, which were dropped (drop_full=True); it "
            f"must be at most {_rounded_down(ceiling)}"
        )


def default_budget(budget: float, ceiling: float) -> float:
    """The budget of a configuration, or the largest there is, with a warning."""
    if budget <= ceiling + TOLERANCE:
        return budget
    logger.warning_once(
        f"the default energy_budget={budget:g} needs the base's full weights, which were dropped (drop_full=True): "
        f"{_rounded_down(ceiling)}, the largest that is left, takes its place"
    )
    return ceiling


def _rounded_down(value: float) -> float:
    return math.floor(value * 1e4) / 1e4
