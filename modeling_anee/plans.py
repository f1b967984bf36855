"""Fixed plans, and the two controllers that are made of them: `plan` and `budget`."""

import torch
from torch import Tensor

from .actions import PROCESS
from .configuration_anee import AneeConfig
from .controller import TOLERANCE, Controller, Decision, Observation
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


class PlanController(Controller):
    """Fixed plans: the static control that every other kind must beat."""

    needs_hidden = False

    def __init__(self, config: AneeConfig) -> None:
        super().__init__(config)
        self.segments = [(0, self.num_layers)]
        self._config = config

    def bind(self, costs: CostTable) -> None:
        """Sort the plans by what they cost on this base."""
        self._table = plan_table(self._config, costs, self.strict)
        self.floor = self._table.floor

    def decide(self, segment: int, seen: Observation) -> Decision:
        """The plans nearest to each token's budget."""
        return Decision(self._table.choose(seen.budget, seen.index))


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


class BudgetController(Controller):
    """The heuristic of ANEE v0: process from the bottom while budget remains, then skip or exit.

    The first `min_layers` are always processed, and so are the last `keep_last_layers` of tokens that do not exit.
    With an `exit_budget_threshold`, tokens whose budget is at or below it, or too low for the layers that skipping keeps,
    exit when their budget is used up; all others skip.
    """

    needs_hidden = False

    def __init__(self, config: AneeConfig) -> None:
        super().__init__(config)
        self.segments = [(0, self.num_layers)]
        self.threshold = config.exit_budget_threshold
        self.min_layers = config.min_layers
        self.keep_last = config.keep_last_layers
        self._skip, self._exit = config.table.skip, config.table.exit

    def bind(self, costs: CostTable) -> None:
        """List what can be afforded: one plan per number of processed layers, with and without exit."""
        everything = self.num_layers
        skipping = [self._skip_after(count) for count in range(self.min_layers, everything - self.keep_last + 1)]
        exiting = [self._exit_after(count) for count in range(self.min_layers, everything + 1)]
        process = [PROCESS] * everything
        self._skipping = PlanTable([*skipping, process], costs, self.strict)
        self._exiting = PlanTable(exiting, costs, self.strict)
        self.floor = self._exiting.floor if self.threshold else self._skipping.floor
        self._exit_below = max(self.threshold, self._skipping.floor) if self.threshold else -1.0

    def decide(self, segment: int, seen: Observation) -> Decision:
        """As many layers as each token's budget affords."""
        exits = (seen.budget <= self._exit_below).unsqueeze(-1)
        skipping, exiting = (table.choose(seen.budget, seen.index) for table in (self._skipping, self._exiting))
        return Decision(torch.where(exits, exiting, skipping))

    def _skip_after(self, count: int) -> list[int]:
        skipped = self.num_layers - self.keep_last - count
        return [PROCESS] * count + [self._skip] * skipped + [PROCESS] * self.keep_last

    def _exit_after(self, count: int) -> list[int]:
        return [PROCESS] * count + [self._exit] * (self.num_layers - count)
