"""Fixed plans, sorted by what they cost: one action a layer."""

import torch
from torch import Tensor

from .actions import PROCESS
from .budget import TOLERANCE
from .configuration_anee import AneeConfig
from .costs import CostTable


GOLDEN_RATIO = 0.6180339887498949


class PlanTable:
    """Fixed plans sorted by cost. A budget between two plans is met by giving some tokens one, some the other.

    Which tokens is decided by the golden-ratio sequence over their index, so every stretch of a text is near the
    budget, whatever the number of layers, and a token never costs more when its budget is lowered. A `strict` table
    gives every token the dearest plan within its budget.
    """

    def __init__(self, plans: list[list[int]], costs: CostTable, strict: bool = False) -> None:
        actions = torch.tensor(plans, dtype=torch.uint8, device="cpu")
        cost = costs.of_plans(actions)
        order = cost.argsort(stable=True)
        self.actions, self.costs = actions[order], cost[order]
        self.strict = strict

    @property
    def floor(self) -> float:
        """Cost of the cheapest plan."""
        return float(self.costs[0])

    def choose(self, budget: Tensor, index: Tensor) -> Tensor:
        """Actions [N, L] for budgets float64 [N] and token indices int64 [N]."""
        low = (torch.searchsorted(self.costs, budget + TOLERANCE, right=True) - 1).clamp(min=0)
        if self.strict:
            return self.actions[low]
        high = (low + 1).clamp(max=len(self.costs) - 1)
        gap = (self.costs[high] - self.costs[low]).clamp(min=TOLERANCE)
        share = (budget - self.costs[low]) / gap
        dear = (index + 1).double() * GOLDEN_RATIO % 1.0 < share - TOLERANCE
        return self.actions[torch.where(dear, high, low)]


def plan_table(config: AneeConfig, costs: CostTable, strict: bool = False) -> PlanTable:
    """The plans of a configuration, with everything processed as the dearest."""
    layers = config.num_layers
    plans = [config.table.plan(plan, layers) for plan in config.plans] if config.plans else plans_of_order(config)
    return PlanTable([*plans, [PROCESS] * layers], costs, strict)


def plans_of_order(config: AneeConfig) -> list[list[int]]:
    """One plan per number of skipped layers, in the order of `config.skip_order`.

    The default gives up the layers nearest to 60% of the depth first: the middle and later-middle layers change the
    hidden state least (ShortGPT, arXiv:2403.03853).
    """
    layers = range(config.min_layers, config.num_layers - config.keep_last_layers)
    order = config.skip_order
    if order is None:
        order = sorted(layers, key=lambda layer: (abs(layer - 0.6 * (config.num_layers - 1)), layer))
    plan, plans = [PROCESS] * config.num_layers, []
    for layer in order:
        plan = [*plan[:layer], config.table.skip, *plan[layer + 1 :]]
        plans.append(plan)
    return plans
