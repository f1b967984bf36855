"""The `learned` controller: a small policy over the signals, an action for each layer of a segment.

The policy prefers; the dial decides how much a preference must be worth: every action pays its cost times a price that
falls as the budget rises. With the price of a calibrated budget, the mean cost of a text is that budget.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .actions import NONE, PROCESS, Action
from .budget import TOLERANCE, Dial
from .configuration_anee import AneeConfig
from .controller import Controller, Decision, Observation
from .costs import CostTable
from .plans import plan_table
from .signals import SIGNALS, SignalProbe, state_vector


FORBIDDEN = -1e9  # preference for an action that a layer does not have


class LearnedController(Controller):
    """One probe and one policy (an MLP) per segment of `decision_interval` layers.

    Untrained it always answers PROCESS. Its cost is charged at every decision. With `precisions` the head runs in the variant
    that the static plan of the token's budget gives it, whatever the policy.
    """

    probes: Any  # a ModuleList, whose items have no type
    policies: Any

    def __init__(self, config: AneeConfig) -> None:
        super().__init__(config)
        self.segments = segments_of(config)
        self._actions, self.exit_action = len(config.table), leaving_action(config)
        lengths = [stop - start for start, stop in self.segments]
        size = config.text_config.hidden_size
        self.probes = nn.ModuleList([SignalProbe(size, length) for length in lengths])
        self.policies = nn.ModuleList(
            [_policy(length, config.controller_hidden_sizes or (), self._actions) for length in lengths]
        )
        self._allowed = allowed_actions(config)  # bool, on the CPU: a buffer would be made on the meta device
        self._config = config
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to always PROCESS, whatever the signals."""
        super().reset_parameters()
        for probe in self.probes:
            probe.reset_parameters()
        for policy in self.policies:
            for layer in policy:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()
            last = policy[-1]
            nn.init.zeros_(last.weight)
            with torch.no_grad():
                last.bias.zero_().view(-1, self._actions)[:, PROCESS] = 1.0

    def bind(self, costs: CostTable) -> None:
        """Cost of each decision and action; the floor takes the cheapest way through every layer."""
        self._own = [costs.of_module(nn.ModuleList(pair)) for pair in zip(self.probes, self.policies, strict=True)]
        self.dial = Dial(self._config.calibration, neutral=0.0)
        self._costs, self._of_heads = costs.layers, costs.of_heads
        self._plans = plan_table(self._config, costs, self.strict) if self._config.precisions and self.segments else None
        heads = torch.zeros(1, dtype=torch.uint8, device="cpu") if self._plans is None else self._plans.heads
        self._least_head = heads[costs.of_heads(heads).argmin()]
        allowed = torch.tensor(self._allowed, device="cpu")
        self._blocked = torch.where(allowed, 0.0, FORBIDDEN)
        stays = costs.layers.masked_fill(~allowed, torch.inf)
        stays[:, self.exit_action] = torch.inf
        self._cheapest = stays.argmin(dim=1)  # action of each layer, short of leaving
        self._find_floor(stays.amin(dim=1), costs.layers[:, self.exit_action])

    def _find_floor(self, staying: Tensor, leaving: Tensor) -> None:
        """The cheapest way through each segment and what follows it, from the last segment to the first.

        Args:
            staying: cost of each layer's cheapest action short of EXIT, float64 [L].
            leaving: cost of each layer once a token has left, float64 [L].
        """
        end = self.segments[-1][1] if self.segments else 0
        self._left = [float(leaving[stop:].sum()) for _, stop in self.segments]  # after each segment, for tokens that left
        self._rest = [float(staying[end:].sum())]  # at least, from each segment on, decisions included; last: after them all
        self._least: list[Tensor] = []  # actions [n] of that way
        for (start, stop), own in zip(reversed(self.segments), reversed(self._own), strict=True):
            ways = {stop: float(staying[start:stop].sum()) + self._rest[0]}
            for layer in range(start, stop):
                if self._allowed[layer][self.exit_action]:
                    ways[layer] = float(staying[start:layer].sum() + leaving[layer:].sum())
            exit_layer = min(ways, key=lambda layer: ways[layer])
            least = self._cheapest[start:stop].clone()
            least[exit_layer - start :] = self.exit_action
            self._least.insert(0, least)
            self._rest.insert(0, ways[exit_layer] + own)
        first = self.segments[0][0] if self.segments else 0
        self._rest_of_all = float(staying[:first].sum()) + self._rest[0]
        self.floor = float(self._of_heads(self._least_head)) + self._rest_of_all

    def cost_before(self, segment: int) -> float:
        """Cost of the decisions before a segment."""
        return sum(self._own[:segment])

    def heads(self, budget: Tensor, index: Tensor) -> Tensor:
        """Variants of the head, uint8 [N], for budgets float64 [N] and token indices int64 [N]."""
        if self._plans is None:
            return torch.zeros_like(index, dtype=torch.uint8)
        heads = self._plans.heads[self._plans.places(budget, index)]
        if not self.strict:
            return heads
        affords = self._of_heads(heads) + self._rest_of_all <= budget + TOLERANCE
        return torch.where(affords, heads, self._least_head)

    def logits(self, segment: int, seen: Observation) -> Tensor:
        """Preferences [N, n, actions] for the n layers of a segment; what training works on."""
        remaining = (seen.budget - seen.spent).to(seen.hidden.device, torch.float32)
        depth = self.segments[segment][0] / self.num_layers
        state = state_vector(self.probes[segment], seen.hidden, seen.previous, depth, remaining)
        start, stop = self.segments[segment]
        policy = self.policies[segment]
        preferences = policy(state.to(policy[-1].weight.dtype)).unflatten(-1, (stop - start, self._actions))
        return preferences + self._blocked[start:stop].to(preferences)

    def decide(self, segment: int, seen: Observation) -> Decision:
        """The action of each token and layer that is preferred most, its cost at the dial's price taken off."""
        seen, heads = self._with_head(segment, seen)
        worth = self._worth(segment, seen)
        actions = worth.argmax(dim=-1)
        own = self._own[segment]
        if self.strict:
            actions = self._affordable(segment, actions, worth, seen.budget - seen.spent - own)
        return Decision(actions.to(torch.uint8), own, heads)

    def probabilities(self, segment: int, seen: Observation) -> Tensor:
        """Of the actions of each layer, as reinforcement draws them, float64 [N, n, actions] on the CPU."""
        return self._worth(segment, self._with_head(segment, seen)[0]).softmax(dim=-1)

    def _with_head(self, segment: int, seen: Observation) -> tuple[Observation, Tensor | None]:
        """What is seen, and the heads, where this decision sets them: what is spent has the head in full until then."""
        if segment > 0 or self._plans is None:
            return seen, None
        heads = self.heads(seen.budget, seen.index)
        spent = seen.spent - self._of_heads(torch.zeros_like(heads)) + self._of_heads(heads)
        return replace(seen, spent=spent), heads

    def _worth(self, segment: int, seen: Observation) -> Tensor:
        """Preferences less the price of each action, float64 [N, n, actions] on the CPU."""
        start, stop = self.segments[segment]
        price = self.dial.setting(seen.budget).view(-1, 1, 1)
        return self.logits(segment, seen).double().cpu() - price * self._costs[start:stop]

    def _affordable(self, segment: int, actions: Tensor, worth: Tensor, left: Tensor) -> Tensor:
        """Actions [N, n] that leave enough for the cheapest way on, where any do; `left` float64 [N] is for all layers on."""
        start, stop = self.segments[segment]
        costs = self._costs[start:stop]
        gone = (actions == self.exit_action).cumsum(dim=-1) > 0
        actions = actions.masked_fill(gone, self.exit_action)
        cheapest = self._cheapest[start:stop].masked_fill(gone, self.exit_action)
        after = left.new_tensor([self._rest[segment + 1], self._left[segment]])[gone[:, -1].long()]
        actions = cap(actions, cheapest, worth, costs, left - after)
        spent = costs[torch.arange(stop - start, device="cpu"), actions].sum(dim=-1)
        return torch.where((spent <= left - after + TOLERANCE).unsqueeze(-1), actions, self._least[segment])


def segments_of(config: AneeConfig) -> list[tuple[int, int]]:
    """Layers that each decision covers: (first, the one after the last).

    All layers, where there are actions that run one whole in another variant; else those that may be left out.
    """
    names = config.controller_actions or []
    everywhere = any(action.is_whole and action.name in names for action in config.table)
    first = 0 if everywhere else config.min_layers
    end = config.num_layers if everywhere else config.num_layers - config.keep_last_layers
    starts = range(first, end, config.decision_interval)
    return [(start, min(start + config.decision_interval, end)) for start in starts]


def _policy(layers: int, hidden_sizes: Any, actions: int) -> nn.Sequential:
    sizes = [len(SIGNALS) + layers, *hidden_sizes]
    parts: list[nn.Module] = []
    for width, next_width in zip(sizes[:-1], sizes[1:], strict=True):
        parts += [nn.Linear(width, next_width), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(sizes[-1], layers * actions))


def allowed_actions(config: AneeConfig) -> list[list[bool]]:
    """Which actions each layer has, [L][actions]: the configured ones, each only where it has its bridge, if any layer has.

    Layers that are always processed have those that run them whole, in whatever variant. Of several actions that leave there
    is one, see `leaving_action`.
    """
    leaving = leaving_action(config)
    decided = range(config.min_layers, config.num_layers - config.keep_last_layers)
    names = set(config.controller_actions or [])
    where = [stand_in_layers(action, config) for action in config.table]
    return [
        [
            place == PROCESS
            or (
                action.name in names
                and layer in where[place]
                and (layer in decided or action.is_whole)
                and (place == leaving or not action.leaves)
            )
            for place, action in enumerate(config.table)
        ]
        for layer in range(config.num_layers)
    ]


def leaving_action(config: AneeConfig) -> int:
    """The last of the configured actions that leave.

    They differ in keys and values alone, and those of precisions stand in the table dearest first.
    """
    names = config.controller_actions or []
    places = [place for place, action in enumerate(config.table) if action.leaves and action.name in names]
    return places[-1] if places else config.table.exit


def stand_in_layers(action: Action, config: AneeConfig) -> Sequence[int]:
    """Layers that have what stands in for what an action leaves out; all of them, where no layer has or nothing is left out."""
    if action.leaves:
        rank, layers = config.exit_translator_rank, config.exit_layers
    elif not action.runs:
        rank, layers = config.bridge_rank, config.bridge_layers
    elif action.feed_forward == NONE:
        rank, layers = config.ffn_bridge_rank, config.ffn_bridge_layers
    else:
        rank, layers = 0, None
    return layers if rank and layers is not None else range(config.num_layers)


def cap(actions: Tensor, cheapest: Tensor, worth: Tensor, costs: Tensor, left: Tensor) -> Tensor:
    """Make actions affordable: the least missed ones become the cheapest until the sum fits.

    Args:
        actions: int64 [N, n], as preferred.
        cheapest: int64 [N, n], none dearer than its counterpart in `actions`.
        worth: preferences less their price, float64 [N, n, actions].
        costs: float64 [n, actions].
        left: what may be spent on these layers, float64 [N]; where even the cheapest don't fit, they are taken.
    """
    layers = torch.arange(costs.shape[0], device=costs.device)
    least = costs[layers, cheapest]
    gain = worth.gather(-1, actions.unsqueeze(-1)) - worth.gather(-1, cheapest.unsqueeze(-1))
    order = gain.squeeze(-1).argsort(dim=-1, descending=True, stable=True)
    extra = (costs[layers, actions] - least).gather(-1, order).cumsum(dim=-1)
    fits = extra <= (left - least.sum(dim=-1)).unsqueeze(-1) + TOLERANCE
    return torch.where(torch.zeros_like(fits).scatter(-1, order, fits), actions, cheapest)
