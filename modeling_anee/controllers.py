"""Controllers: from what is known of a token to the actions of its next layers.

Every kind answers for many tokens at once and looks at each token alone, so a result depends neither on the batch
nor on how a sequence was cut into steps. Tokens with a budget of 1 are never asked about: they are processed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .actions import Action, parse_plan
from .configuration_anee import FORMAT_VERSION, AneeConfig
from .costs import CostTable
from .signals import SIGNALS, SignalProbe, state_vector


GOLDEN_RATIO = 0.6180339887498949
TOLERANCE = 1e-9  # of budgets and costs, which are sums of float64 shares


@dataclass(frozen=True)
class Observation:
    """What a controller may know of N tokens that enter a decision layer.

    Args:
        hidden: hidden states [N, D], on the model's device.
        previous: hidden states [N, D] at the decision before (the embeddings, at the first).
        budget: float64 [N], on the CPU.
        spent: float64 [N], cost so far, on the CPU.
        index: int64 [N], number of tokens before this one in its sequence, padding left out, on the CPU.
        logits: the base's final norm and head, [n, D] -> [n, V]; its cost is the controller's to charge.
    """

    hidden: Tensor
    previous: Tensor
    budget: Tensor
    spent: Tensor
    index: Tensor
    logits: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Decision:
    """Actions uint8 [N, n] for the n layers of a segment, and what deciding cost, float64 [N] or a float."""

    actions: Tensor
    cost: Tensor | float = 0.0


class Controller(nn.Module):
    """Interface of every kind. `segments` are the decisions: (first layer, layer after the last)."""

    needs_hidden = True

    def __init__(self, config: AneeConfig) -> None:
        super().__init__()
        self.num_layers = config.num_layers
        self.segments: list[tuple[int, int]] = []
        self.floor = 0.0
        # Kinds without parameters need a weights file too, and a foreign file must be noticed.
        self.register_buffer("format_version", torch.tensor(FORMAT_VERSION))

    def bind(self, costs: CostTable) -> None:
        """Take the costs of the attached base; sets `floor`, the lowest mean cost that can be reached."""
        raise NotImplementedError

    def decide(self, segment: int, seen: Observation) -> Decision:
        """Actions of N tokens for the layers of a segment."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Back to the untrained state, in which nothing changes the base."""


class PlanTable:
    """Fixed plans sorted by cost. A budget between two plans is met by giving some tokens one, some the other.

    Which tokens is decided by the golden-ratio sequence over their index, so every stretch of a text is near the
    budget, whatever the number of layers, and a token never costs more when its budget is lowered.
    """

    def __init__(self, plans: list[list[Action]], costs: CostTable) -> None:
        actions = torch.tensor(plans, dtype=torch.uint8)
        cost = costs.of_actions(actions)
        order = cost.argsort(stable=True)
        self.actions, self.costs = actions[order], cost[order]

    @property
    def floor(self) -> float:
        """Cost of the cheapest plan."""
        return float(self.costs[0])

    def choose(self, budget: Tensor, index: Tensor) -> Tensor:
        """Actions [N, L] for budgets float64 [N] and token indices int64 [N]."""
        low = (torch.searchsorted(self.costs, budget + TOLERANCE, right=True) - 1).clamp(min=0)
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
        self._plans = [parse_plan(plan) for plan in config.plans] if config.plans else plans_of_order(config)

    def bind(self, costs: CostTable) -> None:
        """Sort the plans by what they cost on this base."""
        self._table = PlanTable([*self._plans, [Action.PROCESS] * self.num_layers], costs)
        self.floor = self._table.floor

    def decide(self, segment: int, seen: Observation) -> Decision:
        """The plans nearest to each token's budget."""
        return Decision(self._table.choose(seen.budget, seen.index))


def plans_of_order(config: AneeConfig) -> list[list[Action]]:
    """One plan per number of skipped layers, in the order of `config.skip_order`.

    The default gives up the layers nearest to 60% of the depth first: the middle and later-middle layers change the
    hidden state least (ShortGPT, arXiv:2403.03853).
    """
    layers = range(config.min_layers, config.num_layers - config.keep_last_layers)
    order = config.skip_order
    if order is None:
        order = sorted(layers, key=lambda layer: (abs(layer - 0.6 * (config.num_layers - 1)), layer))
    plan, plans = [Action.PROCESS] * config.num_layers, []
    for layer in order:
        plan = [*plan[:layer], Action.SKIP, *plan[layer + 1 :]]
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

    def bind(self, costs: CostTable) -> None:
        """List what can be afforded: one plan per number of processed layers, with and without exit."""
        everything = self.num_layers
        skipping = [self._skip_after(count) for count in range(self.min_layers, everything - self.keep_last + 1)]
        exiting = [self._exit_after(count) for count in range(self.min_layers, everything + 1)]
        process = [Action.PROCESS] * everything
        self._skipping, self._exiting = PlanTable([*skipping, process], costs), PlanTable(exiting, costs)
        self.floor = self._exiting.floor if self.threshold else self._skipping.floor
        self._exit_below = max(self.threshold, self._skipping.floor) if self.threshold else -1.0

    def decide(self, segment: int, seen: Observation) -> Decision:
        """As many layers as each token's budget affords."""
        exits = (seen.budget <= self._exit_below).unsqueeze(-1)
        skipping, exiting = (table.choose(seen.budget, seen.index) for table in (self._skipping, self._exiting))
        return Decision(torch.where(exits, exiting, skipping))

    def _skip_after(self, count: int) -> list[Action]:
        skipped = self.num_layers - self.keep_last - count
        return [Action.PROCESS] * count + [Action.SKIP] * skipped + [Action.PROCESS] * self.keep_last

    def _exit_after(self, count: int) -> list[Action]:
        return [Action.PROCESS] * count + [Action.EXIT] * (self.num_layers - count)


class ConfidenceController(Controller):
    """Exit where the base, asked through its final norm and head, is sure of the next token (CALM, arXiv:2207.07061).

    The budget is a cap: a token also exits, without asking, where it cannot afford to go on to the next decision.
    Each question costs a head call, which is charged.
    """

    def __init__(self, config: AneeConfig) -> None:
        super().__init__(config)
        default = {max(config.min_layers, self.num_layers * quarters // 4) for quarters in (2, 3)}
        layers = default if config.exit_layers is None else config.exit_layers
        starts = sorted(layer for layer in layers if layer < self.num_layers)
        self.segments = list(zip(starts, [*starts, self.num_layers][1:], strict=True))
        self.metric, self.threshold = config.confidence_metric, config.confidence_threshold

    def bind(self, costs: CostTable) -> None:
        """Cost of going on from each decision to the next, everything later skipped, and of exiting there."""
        process, leave = costs.layers[:, Action.PROCESS], costs.layers[:, Action.EXIT]
        self._head = costs.head
        self._go_on = [float(process[a:b].sum() + leave[b:].sum()) + self._head for a, b in self.segments]
        first = self.segments[0][0] if self.segments else self.num_layers
        self.floor = float(process[:first].sum() + leave[first:].sum())

    def decide(self, segment: int, seen: Observation) -> Decision:
        """PROCESS up to the next decision, or EXIT."""
        start, stop = self.segments[segment]
        affords = seen.spent + self._go_on[segment] <= seen.budget + TOLERANCE
        leaves = torch.ones_like(affords)
        if affords.any():
            logits = seen.logits(seen.hidden[affords.to(seen.hidden.device)])
            leaves[affords] = self._is_sure(logits.float()).cpu()
        action = torch.where(leaves, Action.EXIT, Action.PROCESS).to(torch.uint8)
        return Decision(action.unsqueeze(-1).expand(-1, stop - start), affords.double() * self._head)

    def _is_sure(self, logits: Tensor) -> Tensor:
        """Logits [n, V] -> bool [n]."""
        log_probabilities = logits.log_softmax(dim=-1)
        if self.metric == "max_probability":
            return log_probabilities.amax(dim=-1).exp() > self.threshold
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
        return entropy / math.log(logits.shape[-1]) < self.threshold


class LearnedController(Controller):
    """An MLP over the seven signals, one answer per decision for all layers of its segment.

    Untrained it always answers PROCESS. Its cost is charged at every decision.
    """

    def __init__(self, config: AneeConfig) -> None:
        super().__init__(config)
        starts = range(config.min_layers, self.num_layers - config.keep_last_layers, config.decision_interval)
        end = self.num_layers - config.keep_last_layers
        self.segments = [(start, min(start + config.decision_interval, end)) for start in starts]
        self.probe = SignalProbe(config.text_config.hidden_size)
        sizes = [len(SIGNALS), *(config.controller_hidden_sizes or ())]
        layers: list[nn.Module] = []
        for width, next_width in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(width, next_width), nn.ReLU()]
        self.policy = nn.Sequential(*layers, nn.Linear(sizes[-1], len(Action)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to always PROCESS, whatever the signals."""
        self.probe.reset_parameters()
        for layer in self.policy:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        last: Any = self.policy[-1]
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.zero_()[Action.PROCESS] = 1.0

    def bind(self, costs: CostTable) -> None:
        """Cost of one decision; the floor skips every layer that it decides on."""
        self._cost = costs.of_module(self)
        actions = torch.full((self.num_layers,), Action.PROCESS, dtype=torch.uint8)
        for start, stop in self.segments:
            actions[start:stop] = Action.SKIP
        exits = torch.where(torch.arange(self.num_layers) < self._first, Action.PROCESS, Action.EXIT)
        exit_cost = float(costs.of_actions(exits)) + self._cost
        self.floor = min(exit_cost, float(costs.of_actions(actions)) + len(self.segments) * self._cost)

    @property
    def _first(self) -> int:
        return self.segments[0][0] if self.segments else self.num_layers

    def logits(self, segment: int, seen: Observation) -> Tensor:
        """Unnormalised preferences [N, actions]; what training works on."""
        remaining = (seen.budget - seen.spent).to(seen.hidden.device, torch.float32)
        depth = self.segments[segment][0] / self.num_layers
        state = state_vector(self.probe, seen.hidden, seen.previous, depth, remaining)
        return self.policy(state.to(next(self.policy.parameters()).dtype))

    def decide(self, segment: int, seen: Observation) -> Decision:
        """The preferred action of each token, for all layers of the segment."""
        start, stop = self.segments[segment]
        action = self.logits(segment, seen).argmax(dim=-1).to(torch.uint8).cpu()
        return Decision(action.unsqueeze(-1).expand(-1, stop - start), self._cost)


CONTROLLER_CLASSES: dict[str, type[Controller]] = {
    "budget": BudgetController,
    "confidence": ConfidenceController,
    "learned": LearnedController,
    "plan": PlanController,
}


def build_controller(config: AneeConfig) -> Controller:
    """The controller that a configuration names."""
    return CONTROLLER_CLASSES[config.controller](config)
