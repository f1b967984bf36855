"""One token alone through a stack with a gate in every layer: dot products, compared as plain numbers.

Asking the controller by way of tensors takes longer than running a layer of a small base, so here the same decisions are made
without: `GatedController.decide` says what they are.

Shapes: D hidden size; a hidden state is a row [D].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .actions import NONE
from .base_block import Block
from .bridges import Bridge, Bridges, inverse_rms
from .budget import TOLERANCE
from .controller_gated import GatedController
from .gate_account import choose
from .gates import GateBank
from .layer_runner import LayerRunner
from .ledger import Ledger
from .plan_runner import Half, attention_run, feed_forward_run
from .step import Step


KEPT = 64  # budgets whose thresholds are kept as numbers


@dataclass
class Way:
    """How far a token is.

    Args:
        row: what enters the next layer, [D].
        budget: what it may cost.
        spent: what it has cost, with the head.
        limits: thresholds of each layer's router, dearest variant first.
        exits: thresholds of the exit gates.
        shares: of feed-forwards that each layer is to run; empty where nobody counts.
        account: what each layer has run too many; with this token, once it has been decided about.
        actions: of the layers so far.
    """

    row: Tensor
    budget: float
    spent: float
    limits: Sequence[Sequence[float]]
    exits: Sequence[float]
    shares: Sequence[float]
    account: list[float]
    actions: list[int] = field(default_factory=list)


class GatedRunner:
    """Runs one token through all layers, for budgets at which routers and gates are asked.

    Args:
        controller: whose decisions these are.
        layers: what runs those that have no straight list of kernels, or that a token has left.
        bridges: what stands in for feed-forwards.
    """

    def __init__(self, controller: GatedController, layers: LayerRunner, bridges: Bridges) -> None:
        self._controller, self._any_layer, blocks = controller, layers.alike, layers.blocks
        self._choices, self._costs = controller.choices.tolist(), controller.costs.tolist()
        self._attention = [
            [attention_run(blocks[attention][layer]) for attention in controller.attentions]
            for layer in range(controller.num_layers)
        ]
        self._halves = [
            [_half(variant, blocks, layer, bridges.of_skip_ffn(layer)) for variant in controller.variants]
            for layer in range(controller.num_layers)
        ]
        self._gated = [layer in controller.gated_layers for layer in range(controller.num_layers)]
        self._routers, self._gates = Rows(controller.routers), Rows(controller.gates)
        self._known: dict[float, tuple[list, list, list]] = {}
        self._dial = controller.dial

    def takes(self, step: Step) -> bool:
        """Whether the one token of a step is for routers and gates to decide about."""
        controller, weight = self._controller, self._controller.routers.weight
        return (
            controller.decides
            and weight.is_cpu  # neither offloaded nor on another device
            and weight.dtype == torch.float32
            and step.real_tokens == 1
            and step.budget.item() < min(controller.top, 1.0) - TOLERANCE
            and int(step.places.index) >= controller.keep_first
        )

    def run(self, hidden: Tensor, step: Step, ledger: Ledger) -> Tensor:
        """Hidden states [1, 1, D] that enter the first layer -> those that leave the last; written down in the ledger.

        Args:
            hidden: [1, 1, D], float32, on the CPU.
            step: the token; its cache is an `AneeCache`.
            ledger: takes what is decided and spent.
        """
        controller = self._controller
        budget = step.budget.item()
        self._routers.refresh()
        self._gates.refresh()
        account = [0.0] * controller.num_layers if isinstance(step.account, float) else step.account.flatten().tolist()
        way = Way(hidden.view(-1), budget, controller.head_cost, *self._thresholds(budget), account)
        with torch.inference_mode():  # as `Executor` does for fixed plans
            for layer in range(controller.num_layers):
                choice = self._choose(layer, way)
                if choice is None:
                    self._leave(layer, way, step)
                    break
                self._run_layer(layer, choice, way, step)
        ledger.actions.view(-1).copy_(torch.tensor(way.actions, dtype=torch.uint8, device="cpu"))
        ledger.spent.fill_(way.spent)
        if controller.counts_runs:
            ledger.account = torch.tensor([[way.account]], dtype=torch.float64, device="cpu")
        if controller.head:
            ledger.head = torch.full_like(ledger.actions[..., 0], controller.head)
        ledger.decided = True
        return way.row.view(1, 1, -1).clone()  # an ordinary tensor again

    def _thresholds(self, budget: float) -> tuple[list, list, list]:
        """Of routers, by layer, and of exit gates, and the shares of the layers, for a budget."""
        if self._dial is not self._controller.dial or len(self._known) > KEPT:
            self._known, self._dial = {}, self._controller.dial
        if budget not in self._known:
            asked = torch.tensor([budget], dtype=torch.float64, device="cpu")
            routers, exits = self._dial.thresholds(asked)
            shares = self._dial.shares_at(asked)[0].tolist() if self._controller.counts_runs else []
            self._known[budget] = routers[0].T.tolist(), exits[0].tolist(), shares
        return self._known[budget]

    def _choose(self, layer: int, way: Way) -> int | None:
        """Which of the variants the feed-forward runs in, None where the token leaves; what asking costs is spent."""
        controller = self._controller
        gate = controller.asked_exits.get(layer)
        if gate is None and not self._gated[layer]:
            return 0
        row = way.row
        scale = inverse_rms(row)
        if gate is not None:
            way.spent += controller.gate_cost
            if self._gates.score(gate, row, scale) <= way.exits[gate]:
                return None
        if not self._gated[layer]:
            return 0
        way.spent += controller.router_cost
        score = self._routers.score(layer, row, scale)
        choice = choose(score, way.limits[layer], way.account[layer] if way.shares else 0.0)
        if way.shares:
            way.account[layer] += controller.counts_as[choice] - way.shares[layer]
        return self._affordable(layer, choice, way) if controller.strict else choice

    def _affordable(self, layer: int, choice: int, way: Way) -> int:
        """The dearest choice from the wanted one on that leaves enough for the cheapest way on, else the cheapest."""
        costs = self._costs[layer]
        left = way.budget - way.spent - self._controller.rest[layer + 1] + TOLERANCE
        fitting = (one for one in range(choice, len(costs)) if costs[one] <= left)
        return next(fitting, costs.index(min(costs)))

    def _run_layer(self, layer: int, choice: int, way: Way, step: Any) -> None:
        attention, half, action = self._attention[layer][choice], self._halves[layer][choice], self._choices[choice]
        way.spent += self._costs[layer][choice]
        way.actions.append(action)
        if attention is None or half is None:
            way.row = self._any_layer(layer, way.row.view(1, 1, -1), step, action).view(-1)
        else:
            way.row = half(attention(way.row, step.rotations[layer], step.cache.layers[layer]))

    def _leave(self, layer: int, way: Way, step: Step) -> None:
        """Keys and values of the layers from one on are due; nothing else is."""
        controller, hidden = self._controller, way.row.view(1, 1, -1)
        for rest in range(layer, controller.num_layers):
            self._any_layer(rest, hidden, step, controller.leave)
        way.actions += [controller.leave] * (controller.num_layers - layer)
        way.spent += controller.leaving[layer]


class Rows:
    """The gates of a bank, one by one, as they are now."""

    def __init__(self, bank: GateBank) -> None:
        self._bank, self._place = bank, 0
        self._weights: list[Tensor] = []
        self._biases: list[float] = []

    def refresh(self) -> None:
        """Take the weights anew where they have moved; biases are numbers, so always."""
        weight = self._bank.weight
        if weight.data_ptr() != self._place:
            self._place, self._weights = weight.data_ptr(), list(weight.detach().unbind(0))
        self._biases = self._bank.bias.tolist()

    def score(self, number: int, row: Tensor, scale: float) -> float:
        """What a gate says of a row [D], whose root mean square is 1 over the scale."""
        return torch.dot(self._weights[number], row).item() * scale + self._biases[number]


def _half(variant: str, blocks: Mapping[str, Sequence[Block]], layer: int, bridge: Bridge | None) -> Half | None:
    """The second half of a layer for one row."""
    if variant != NONE:
        return feed_forward_run(blocks[variant][layer])
    return _same if bridge is None else bridge.row


def _same(row: Tensor) -> Tensor:
    return row
