"""The `budget` controller: as many layers as the budget affords."""

import torch

from .actions import PROCESS
from .configuration_anee import AneeConfig
from .controller import Controller, Decision, Observation
from .costs import CostTable
from .plans import PlanTable


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
