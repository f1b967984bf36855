"""Fixed plans, sorted by what they cost: one action a layer."""

from collections.abc import Collection, Iterable, Sequence
from itertools import compress

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

    Args:
        plans: places of actions, one a layer.
        costs: what they cost.
        strict: see above.
        heads: place of the variant of each plan's head; default: full.
        first: the layer that plans begin with.
    """

    def __init__(
        self,
        plans: list[list[int]],
        costs: CostTable,
        strict: bool = False,
        heads: list[int] | None = None,
        first: int = 0,
    ) -> None:
        actions = torch.tensor(plans, dtype=torch.uint8, device="cpu")
        of_heads = torch.tensor(heads or [0] * len(plans), dtype=torch.uint8, device="cpu")
        cost = costs.of_actions(actions, first) + costs.of_heads(of_heads)
        order = cost.argsort(stable=True)
        self.actions, self.heads, self.costs = actions[order], of_heads[order], cost[order]
        self.strict = strict

    @property
    def floor(self) -> float:
        """Cost of the cheapest plan."""
        return float(self.costs[0])

    def places(self, budget: Tensor, index: Tensor) -> Tensor:
        """Plans int64 [N] for budgets float64 [N] and token indices int64 [N]."""
        low = self.within(budget)
        if self.strict:
            return low
        high = (low + 1).clamp(max=len(self.costs) - 1)
        gap = (self.costs[high] - self.costs[low]).clamp(min=TOLERANCE)
        share = (budget - self.costs[low]) / gap
        dear = (index + 1).double() * GOLDEN_RATIO % 1.0 < share - TOLERANCE
        return torch.where(dear, high, low)

    def within(self, budget: Tensor) -> Tensor:
        """The dearest plan within each budget float64 [N], or the cheapest of all, int64 [N]."""
        return (torch.searchsorted(self.costs, budget + TOLERANCE, right=True) - 1).clamp(min=0)

    def choose(self, budget: Tensor, index: Tensor) -> Tensor:
        """The same as actions [N, L]."""
        return self.actions[self.places(budget, index)]


def plan_table(
    config: AneeConfig, costs: CostTable, strict: bool = False, more: Sequence[tuple[list[int], int]] = ()
) -> PlanTable:
    """The plans of a configuration, with everything processed as the dearest; those that need dropped weights left out.

    `more`: plans beside these, and their heads.
    """
    plans, heads = listed_plans(config)
    plans, heads = [*plans, [PROCESS] * config.num_layers], [*heads, 0]
    for plan, head in more:
        plans, heads = [*plans, plan], [*heads, head]
    if costs.gone:
        table, gone = config.table, need(config, plans, costs.gone)
        runs = [not one and table.heads[head] not in costs.gone_heads for one, head in zip(gone, heads, strict=True)]
        plans, heads = list(compress(plans, runs)), list(compress(heads, runs))
    return PlanTable(plans, costs, strict, heads)


def listed_plans(config: AneeConfig) -> tuple[list[list[int]], list[int]]:
    """The plans of a configuration, or the default ones, and their heads."""
    if not config.plans:
        return default_plans(config)
    table = config.table
    return [table.plan(plan, config.num_layers) for plan in config.plans], [table.head_of(plan) for plan in config.plans]


def need(config: AneeConfig, plans: list[list[int]], variants: Collection[str]) -> list[bool]:
    """Whether each plan runs anything of a layer in one of these variants."""
    return config.table.needing(variants)[torch.tensor(plans, device="cpu")].any(dim=1).tolist()


def default_plans(config: AneeConfig) -> tuple[list[list[int]], list[int]]:
    """Plans, each cheaper than the one before by one step, and their heads.

    First everything in cheaper precisions, layers from the middle outwards, see `precision_plans`. Then layers are left out,
    see `plans_of_order`.
    """
    layers = config.num_layers
    plans, heads = precision_plans(config, from_the_middle(range(layers), layers))
    skipped = plans_of_order(config, plans[-1] if plans else None)
    return [*plans, *skipped], [*heads, *(heads[-1:] or [0]) * len(skipped)]


def precision_plans(config: AneeConfig, order: Iterable[int]) -> tuple[list[list[int]], list[int]]:
    """Plans from everything in full to everything in the cheapest precision, each cheaper by one step, and their heads.

    The precisions of the configuration come one after the other: the head (in the first of them only, since it is what
    rounding hurts most), then the layers in an order.
    """
    table, order = config.table, list(order)
    if not config.precisions:
        return [], []
    plans = [[PROCESS] * config.num_layers]
    for variant in config.precisions:
        plans += one_by_one(plans[-1], table.place_of(variant, variant), order)
    return plans, [table.heads.index(config.precisions[0])] * len(plans)


def plans_of_order(config: AneeConfig, start: list[int] | None = None) -> list[list[int]]:
    """One plan per number of skipped layers, in the order of `config.skip_order`.

    The default gives up the layers nearest to 60% of the depth first: the middle and later-middle layers change the
    hidden state least (ShortGPT, arXiv:2403.03853).

    Args:
        config: says which layers may be given up.
        start: the plan before any is; default: everything processed.
    """
    table, layers = config.table, config.num_layers
    order = config.skip_order
    if order is None:
        order = from_the_middle(range(config.min_layers, layers - config.keep_last_layers), layers)
    skip = table.skip if start is None else table.skip_with(table[start[0]].keys_values)
    return one_by_one(start or [PROCESS] * layers, skip, order)


def one_by_one(plan: list[int], action: int, order: Iterable[int]) -> list[list[int]]:
    """A plan with one layer after the other, in an order, in another action; without the plan itself."""
    plans = []
    for layer in order:
        plan = [*plan[:layer], action, *plan[layer + 1 :]]
        plans.append(plan)
    return plans


def from_the_middle(chosen: range, layers: int) -> list[int]:
    """Layers, those nearest to 60% of the depth first."""
    return sorted(chosen, key=lambda layer: (abs(layer - 0.6 * (layers - 1)), layer))
