"""The `budget` controller: as much of every layer as the budget affords, segment by segment."""

import torch
from torch import Tensor

from .actions import FULL, PROCESS, ActionTable
from .configuration_anee import AneeConfig
from .controller import Controller, Decision, Observation
from .costs import CostTable
from .plans import PlanTable, one_by_one, precision_plans


class BudgetController(Controller):
    """The heuristic of ANEE v0: process from the bottom while budget remains, then skip or exit.

    The first `min_layers` always run, and so do the last `keep_last_layers` of tokens that do not exit.
    With an `exit_budget_threshold`, tokens whose budget is at or below it, or too low for the layers that skipping keeps,
    exit when their budget is used up; all others skip.

    With `precisions` there is one decision for every `decision_interval` layers, from what is left of the budget: it runs
    as many layers, from the bottom, in the dearest variant that still affords the rest of the stack in the next cheaper one.
    Only what the cheapest of them can't afford is skipped. The head runs in the first of them, or in full where
    the budget affords that after all layers.
    """

    needs_hidden = False

    def __init__(self, config: AneeConfig) -> None:
        super().__init__(config)
        length = config.decision_interval if config.precisions else self.num_layers
        starts = range(0, self.num_layers, length)
        self.segments = [(start, min(start + length, self.num_layers)) for start in starts]
        self.threshold = config.exit_budget_threshold
        self._config = config
        table, cheapest = config.table, (config.precisions or [FULL])[-1]
        self._skip = table.skip_with(cheapest) if config.precisions else table.skip
        self._exit = table.exit_with(cheapest) if config.precisions else table.exit

    def bind(self, costs: CostTable) -> None:
        """List what can be afforded from each segment on, with and without exit."""
        layers, config = self.num_layers, self._config
        downwards = range(layers - 1, -1, -1)
        plans, heads = precision_plans(config, downwards)
        plans, heads = [[PROCESS] * layers, *plans], [0, *heads]
        skipped = one_by_one(plans[-1], self._skip, range(layers - config.keep_last_layers - 1, config.min_layers - 1, -1))
        left = one_by_one(plans[-1], self._exit, range(layers - 1, config.min_layers - 1, -1))
        self._skipping = self._rests([*plans, *skipped], [*heads, *heads[-1:] * len(skipped)], costs)
        self._exiting = self._rests([*plans, *left], [*heads, *heads[-1:] * len(left)], costs)
        self.floor = (self._exiting if self.threshold else self._skipping)[0].floor
        self._exit_below = max(self.threshold, self._skipping[0].floor)
        self._head = heads[-1]
        cheap = float(costs.of_heads(torch.tensor(self._head, device="cpu")))
        self._paid = [costs.head if start == 0 else cheap for start, _ in self.segments]  # for the head, before each decision

    def _rests(self, plans: list[list[int]], heads: list[int], costs: CostTable) -> list["Rest"]:
        return [Rest(plans, heads, segment, costs, self._config.table, self.strict) for segment in self.segments]

    def decide(self, segment: int, seen: Observation) -> Decision:
        """The dearest way through the segment that each token's budget affords, with what has to follow it."""
        left = seen.budget - (seen.spent - self._paid[segment])
        actions, heads = self._skipping[segment].choose_now(left, seen.index)
        if self.threshold:
            exits = seen.budget <= self._exit_below
            exiting, exiting_heads = self._exiting[segment].choose_now(left, seen.index)
            actions = torch.where(exits.unsqueeze(-1), exiting, actions)
            heads = torch.where(exits, exiting_heads, heads)
        if not self._config.precisions:
            return Decision(actions)
        if segment == len(self.segments) - 1:
            return Decision(actions, head=heads)
        return Decision(actions, head=torch.full_like(heads, self._head) if segment == 0 else None)

    def plan_budgets(self) -> list[float]:
        """The costs of all ways through the stack."""
        return (self._exiting if self.threshold else self._skipping)[0].costs.tolist()


class Rest(PlanTable):
    """Ways from a segment on to the end: the tails of plans, whose costs are those of their layers and of the head.

    A budget between two of them is given to the dearer and the cheaper in turn (see `PlanTable`) where this can't be left to
    a later segment: in the last one, and where the cheaper one leaves the stack.
    """

    def __init__(
        self,
        plans: list[list[int]],
        heads: list[int],
        segment: tuple[int, int],
        costs: CostTable,
        table: ActionTable,
        strict: bool,
    ) -> None:
        start, stop = segment
        super().__init__([plan[start:] for plan in plans], costs, strict, heads, start)
        self._now = self.actions[:, : stop - start]
        is_last = stop == len(plans[0])
        self._settles = table.leaving[self._now[:, -1].long()] | is_last
        self._defers = strict or not bool(self._settles.any())

    def choose_now(self, left: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Actions uint8 [N, n] of the segment's layers, and heads uint8 [N], for what is left, float64 [N]."""
        chosen = self.within(left)
        if not self._defers:
            chosen = torch.where(self._settles[chosen], self.places(left, index), chosen)
        return self._now[chosen], self.heads[chosen]
