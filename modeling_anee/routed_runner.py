"""One token alone under a `routed` controller: two straight lists of kernels, and between them its plan, in plain numbers.

Asking the controller by way of tensors takes about 200 small kernels, and Python around them, for one number that is new: which
plan. What follows from a plan is looked up here. The decisions are the same, bit by bit: `RoutedController.decide` says what
they are.

Shapes: K plans, L layers, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .controller_routed import RoutedController
from .layer_runner import LayerRunner
from .ledger import Ledger
from .step import Step


KEPT = 64  # budgets whose settings are kept as numbers


@dataclass(frozen=True)
class Ways:
    """What follows from each plan.

    Args:
        before: actions of the layers before the decision.
        after: of each plan, actions of the layers from it on.
        actions: all of them, uint8 [K, 1, 1, L].
        heads: variants of the head, uint8 [K, 1, 1]; None: full.
        spent: what a token costs with each plan, head and decision included.
    """

    before: list[int]
    after: list[list[int]]
    actions: Tensor
    heads: Tensor | None
    spent: list[float]

    @classmethod
    def of(cls, controller: RoutedController, layers: LayerRunner) -> "Ways":
        """Those of a controller that is bound."""
        start = controller.start
        plans = torch.stack([left_once(plan, layers.table.leaving) for plan in controller.plans])
        return cls(
            before=plans[0, :start].tolist(),
            after=plans[:, start:].tolist(),
            actions=plans.view(len(plans), 1, 1, -1),
            heads=controller.heads.view(-1, 1, 1) if controller.has_fixed else None,
            spent=_spent(controller, plans),
        )


class RoutedRunner:
    """Runs one token through all layers, for budgets at which the router is asked.

    Args:
        controller: whose decisions these are.
        layers: what runs them.
    """

    def __init__(self, controller: RoutedController, layers: LayerRunner) -> None:
        self._controller, self._layers = controller, layers
        self._dial, self._ways = controller.dial, Ways.of(controller, layers)
        self._settings: dict[float, float] = {}

    def takes(self, step: Step) -> bool:
        """Whether the one token of a step is for the router to decide about."""
        controller = self._controller
        return (
            controller.start < controller.num_layers
            and controller.dial.calibrated
            and not controller.strict
            and step.real_tokens == 1
            and step.budget.item() < controller.limit
            and step.places.index.item() >= controller.keep_first
        )

    def run(self, hidden: Tensor, step: Step, ledger: Ledger) -> Tensor:
        """Hidden states [1, 1, D] that enter the first layer -> those that leave the last; written down in the ledger.

        Args:
            hidden: [1, 1, D], float32, on the CPU.
            step: the token; its cache is an `AneeCache`.
            ledger: takes what is decided and spent.
        """
        controller, layers = self._controller, self._layers
        if controller.dial is not self._dial:  # bound anew, or calibrated
            self._dial, self._ways, self._settings = controller.dial, Ways.of(controller, layers), {}
        ways, start = self._ways, controller.start
        budget = step.budget.item()
        account = step.account if isinstance(step.account, float) else step.account.item()
        hidden = layers.run_alone(range(start), hidden, step, ways.before)
        losses = controller.losses(hidden[0])[0].tolist()
        plan = controller.best(losses, self._setting(budget), account)
        ledger.actions = ways.actions[plan].clone()
        ledger.spent.fill_(ways.spent[plan])
        ledger.account = torch.full_like(ledger.spent, account + (ways.spent[plan] - max(budget, controller.floor)))
        if ways.heads is not None:
            ledger.head = ways.heads[plan].clone()
        ledger.decided = True
        return layers.run_alone(range(start, controller.num_layers), hidden, step, ways.after[plan])

    def _setting(self, budget: float) -> float:
        """What the dial says of a budget."""
        if budget not in self._settings:
            if len(self._settings) >= KEPT:
                self._settings = {}
            self._settings[budget] = self._dial.setting(torch.tensor([budget], dtype=torch.float64, device="cpu")).item()
        return self._settings[budget]


def left_once(plan: Tensor, leaving: Tensor) -> Tensor:
    """A plan uint8 [L] in which a token that has left keeps the action that it left by."""
    left = leaving[plan.long()]
    return torch.where(left, plan[left.int().argmax()], plan)


def _spent(controller: RoutedController, plans: Tensor) -> list[float]:
    """What a token costs with each of the plans uint8 [K, L], summed in the order in which the executor does."""
    start, costs = controller.start, controller.costs
    first = Ledger.begin((1, 1, controller.num_layers), costs, controller.dearest)
    found = []
    for plan, head in zip(plans.view(len(plans), 1, 1, -1), controller.heads.view(-1, 1, 1), strict=True):
        spent = first.spent
        if controller.has_fixed:
            begun = torch.zeros_like(head) if first.head is None else first.head
            spent = spent + costs.of_heads(controller.heads[:1]) - costs.of_heads(begun)
        if start:
            spent = spent + costs.of_actions(plan[..., :start])
        if controller.has_fixed:
            spent = spent + costs.of_heads(head) - costs.of_heads(controller.heads[:1])
        spent = spent + controller.own_cost + costs.of_actions(plan[..., start:], start)
        found.append(spent.item())
    return found
