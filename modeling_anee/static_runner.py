"""One token alone under a `plan` controller: its plan looked up in plain numbers, then one straight list of kernels.

The decisions are those of `PlanController.decide`, bit by bit.
"""

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from .budget import TOLERANCE
from .controller_plan import PlanController
from .layer_runner import LayerRunner
from .ledger import Ledger
from .plans import GOLDEN_RATIO, PlanTable
from .routed_runner import left_once
from .step import Step


@dataclass(frozen=True)
class Listed:
    """A table of plans in plain numbers.

    Args:
        table: what it was made of.
        costs: of each plan.
        plans: actions of each, one a layer.
        actions: the same as uint8 [K, 1, 1, L].
        heads: variants of the head, uint8 [K, 1, 1].
        spent: what a token costs with each plan, summed as the executor does.
    """

    table: PlanTable
    costs: list[float]
    plans: list[list[int]]
    actions: Tensor
    heads: Tensor
    spent: list[float]

    @classmethod
    def of(cls, controller: PlanController, layers: LayerRunner) -> "Listed":
        """That of a controller that is bound."""
        table, costs = controller.table, layers.costs
        plans = torch.stack([left_once(plan, layers.table.leaving) for plan in table.actions])
        first = Ledger.begin((1, 1, controller.num_layers), costs, controller.dearest)
        begun = torch.zeros_like(table.heads) if first.head is None else first.head.view(1)
        spent = first.spent.view(1) + costs.of_heads(table.heads) - costs.of_heads(begun)
        return cls(
            table=table,
            costs=table.costs.tolist(),
            plans=plans.tolist(),
            actions=plans.view(len(plans), 1, 1, -1),
            heads=table.heads.view(-1, 1, 1),
            spent=(spent + costs.of_actions(plans)).tolist(),
        )

    def place(self, budget: float, index: int) -> int:
        """The plan for a budget and a token's index, as `PlanTable.places` says."""
        low = max(bisect_right(self.costs, budget + TOLERANCE) - 1, 0)
        if self.table.strict:
            return low
        high = min(low + 1, len(self.costs) - 1)
        share = (budget - self.costs[low]) / max(self.costs[high] - self.costs[low], TOLERANCE)
        return high if (index + 1) * GOLDEN_RATIO % 1.0 < share - TOLERANCE else low


class StaticRunner:
    """Runs one token through all layers, where its budget is below 1.

    Args:
        controller: whose decisions these are.
        layers: what runs them.
    """

    def __init__(self, controller: PlanController, layers: LayerRunner) -> None:
        self._controller, self._layers = controller, layers
        self._listed: Listed | None = None

    def takes(self, step: Step) -> bool:
        """Whether the one token of a step has a limit, and is none of the kept first ones."""
        return step.real_tokens == 1 and step.budget.item() < 1.0 and step.places.index.item() >= self._controller.keep_first

    def run(self, hidden: Tensor, step: Step, ledger: Ledger) -> Tensor:
        """Hidden states [1, 1, D] that enter the first layer -> those that leave the last; written down in the ledger.

        Args:
            hidden: [1, 1, D], float32, on the CPU.
            step: the token; its cache is an `AneeCache`.
            ledger: takes what is decided and spent.
        """
        if self._listed is None or self._listed.table is not self._controller.table:
            self._listed = Listed.of(self._controller, self._layers)
        listed = self._listed
        plan = listed.place(step.budget.item(), int(step.places.index.item()))
        ledger.actions, ledger.head = listed.actions[plan].clone(), listed.heads[plan].clone()
        ledger.spent.fill_(listed.spent[plan])
        ledger.decided = True
        return self._layers.run_alone(range(self._controller.num_layers), hidden, step, listed.plans[plan])
