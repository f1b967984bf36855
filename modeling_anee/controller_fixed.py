"""What a budget affords without leaving anything out: fixed plans, for kinds that look at tokens only below them."""

from torch import Tensor

from .budget import TOLERANCE
from .controller import Decision, Observation
from .plans import PlanTable


class WholePlans:
    """The plans of a table from one that leaves nothing out upwards; budgets below it are somebody else's to decide.

    Fewer bits lose next to nothing, and the same on every token, so nobody need look at one for this.

    Args:
        table: the plans.
        place: where in it the cheapest one that is fixed is.
    """

    def __init__(self, table: PlanTable, place: int) -> None:
        self.table, self.place = table, place
        self.top = float(table.costs[place])  # budget from which on plans are fixed
        self.actions, self.head = table.actions[place], table.heads[place]  # of the cheapest, uint8 [L] and []

    @property
    def budgets(self) -> list[float]:
        """What the plans cost, ascending."""
        return self.table.costs[self.place :].tolist()

    def affords(self, budget: Tensor) -> Tensor:
        """Which budgets float64 [N] have a plan, bool [N]."""
        return budget >= self.top - TOLERANCE

    def decide(self, seen: Observation, keep_first: int) -> Decision:
        """The plans of N tokens. Those that have none begin with the cheapest, and only they are asked about later.

        Args:
            seen: the tokens.
            keep_first: first tokens of a sequence that keep this plan, whatever their budget.
        """
        affords = self.affords(seen.budget)
        places = self.table.places(seen.budget, seen.index).masked_fill_(~affords, self.place)
        settled = affords | (seen.index < keep_first)
        return Decision(self.table.actions[places], head=self.table.heads[places], settled=settled)


def cheapest_whole(table: PlanTable, complete: Tensor) -> int:
    """Place of the cheapest plan that leaves nothing out: there is one, whatever weights are gone.

    Args:
        table: the plans.
        complete: which actions leave nothing out, bool [actions].
    """
    return int(complete[table.actions.long()].all(dim=1).int().argmax())
