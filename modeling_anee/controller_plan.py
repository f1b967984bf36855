"""The `plan` controller: fixed plans, the static control that every other kind must beat."""

from .configuration_anee import AneeConfig
from .controller import Controller, Decision, Observation
from .costs import CostTable
from .plans import plan_table


class PlanController(Controller):
    """Of the plans of the configuration, those nearest to each token's budget."""

    needs_hidden = False
    runs_without_full = True

    def __init__(self, config: AneeConfig) -> None:
        super().__init__(config)
        self.segments = [(0, self.num_layers)]
        self._config = config

    def bind(self, costs: CostTable) -> None:
        """Sort the plans by what they cost on this base."""
        self.table = plan_table(self._config, costs, self.strict)
        self.floor = self.table.floor
        if costs.gone:
            self.end_at(self.table)

    def decide(self, segment: int, seen: Observation) -> Decision:
        """The plans nearest to each token's budget."""
        chosen = self.table.places(seen.budget, seen.index)
        return Decision(self.table.actions[chosen], head=self.table.heads[chosen])

    def plan_budgets(self) -> list[float]:
        """The costs of all plans."""
        return self.table.costs.tolist()
