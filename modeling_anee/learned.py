"""The `learned` controller: a small policy over the signals, an action for each layer of a segment.

The policy prefers; the dial decides how much a preference must be worth: every action pays its cost times a price that
falls as the budget rises. With the price of a calibrated budget, the mean cost of a text is that budget.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .actions import Action
from .configuration_anee import AneeConfig
from .controller import TOLERANCE, Controller, Decision, Observation
from .costs import CostTable
from .dial import Dial
from .signals import SIGNALS, SignalProbe, state_vector


FORBIDDEN = -1e9  # preference for an action that a layer does not have


class LearnedController(Controller):
    """One probe and one policy (an MLP) per segment of `decision_interval` layers.

    Untrained it always answers PROCESS. Its cost is charged at every decision.
    """

    def __init__(self, config: AneeConfig) -> None:
        super().__init__(config)
        self.segments = segments_of(config)
        lengths = [stop - start for start, stop in self.segments]
        size = config.text_config.hidden_size
        self.probes = nn.ModuleList([SignalProbe(size, length) for length in lengths])
        self.policies = nn.ModuleList([_policy(length, config.controller_hidden_sizes or ()) for length in lengths])
        self._allowed = allowed_actions(config)  # bool, on the CPU: a buffer would be made on the meta device
        self._calibration = config.calibration
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to always PROCESS, whatever the signals."""
        for probe in self.probes:
            probe.reset_parameters()
        for policy in self.policies:
            for layer in policy:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()
            last: Any = policy[-1]
            nn.init.zeros_(last.weight)
            with torch.no_grad():
                last.bias.zero_().view(-1, len(Action))[:, Action.PROCESS] = 1.0

    def bind(self, costs: CostTable) -> None:
        """Cost of each decision and action; the floor takes the cheapest way through every layer."""
        self._own = [costs.of_module(nn.ModuleList(pair)) for pair in zip(self.probes, self.policies, strict=True)]
        self.dial = Dial(self._calibration, neutral=0.0)
        self._costs = costs.layers
        allowed = torch.tensor(self._allowed)
        self._blocked = torch.where(allowed, 0.0, FORBIDDEN)
        stays = allowed.clone()
        stays[:, Action.EXIT] = False
        cheapest = costs.layers.masked_fill(~stays, torch.inf).amin(dim=1)
        # From the end of each segment on, if every layer takes its cheapest action short of leaving; decisions included.
        self._after = [float(cheapest[stop:].sum()) + sum(self._own[i + 1 :]) for i, (_, stop) in enumerate(self.segments)]
        self.floor = float(cheapest.sum()) + sum(self._own)
        if self.segments and self._allowed[self.segments[0][0]][Action.EXIT]:
            first = self.segments[0][0]
            leaves = float(costs.layers[:first, Action.PROCESS].sum() + costs.layers[first:, Action.EXIT].sum())
            self.floor = min(self.floor, leaves + self._own[0])

    def cost_before(self, segment: int) -> float:
        """Cost of the decisions before a segment."""
        return sum(self._own[:segment])

    def logits(self, segment: int, seen: Observation) -> Tensor:
        """Preferences [N, n, actions] for the n layers of a segment; what training works on."""
        remaining = (seen.budget - seen.spent).to(seen.hidden.device, torch.float32)
        depth = self.segments[segment][0] / self.num_layers
        state = state_vector(self.probes[segment], seen.hidden, seen.previous, depth, remaining)
        start, stop = self.segments[segment]
        preferences = self.policies[segment](state).unflatten(-1, (stop - start, len(Action)))
        return preferences + self._blocked[start:stop].to(preferences)

    def decide(self, segment: int, seen: Observation) -> Decision:
        """The action of each token and layer that is preferred most, its cost at the dial's price taken off."""
        start, stop = self.segments[segment]
        costs = self._costs[start:stop]
        price = self.dial.setting(seen.budget).view(-1, 1, 1)
        worth = self.logits(segment, seen).double().cpu() - price * costs
        actions = worth.argmax(dim=-1)
        own = self._own[segment]
        if self.strict:
            left = seen.budget - seen.spent - own - self._after[segment]
            actions = cap(actions, worth, costs, left)
        return Decision(actions.to(torch.uint8), own)


def segments_of(config: AneeConfig) -> list[tuple[int, int]]:
    """Layers that each decision covers: (first, the one after the last)."""
    end = config.num_layers - config.keep_last_layers
    starts = range(config.min_layers, end, config.decision_interval)
    return [(start, min(start + config.decision_interval, end)) for start in starts]


def _policy(layers: int, hidden_sizes: Any) -> nn.Sequential:
    sizes = [len(SIGNALS) + layers, *hidden_sizes]
    parts: list[nn.Module] = []
    for width, next_width in zip(sizes[:-1], sizes[1:], strict=True):
        parts += [nn.Linear(width, next_width), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(sizes[-1], layers * len(Action)))


def allowed_actions(config: AneeConfig) -> list[list[bool]]:
    """Which actions each layer has, [L][actions]: the configured ones, and a skip only where it has its bridge, if any has."""
    layers = range(config.num_layers)
    bridged = config.bridge_layers if config.bridge_rank and config.bridge_layers is not None else layers
    ffn_bridged = config.ffn_bridge_layers if config.ffn_bridge_rank and config.ffn_bridge_layers is not None else layers
    where = {Action.PROCESS: layers, Action.SKIP: bridged, Action.EXIT: layers, Action.SKIP_FFN: ffn_bridged}
    decided = range(config.min_layers, config.num_layers - config.keep_last_layers)
    names = set(config.controller_actions or [])
    return [
        [
            action is Action.PROCESS or (action.name in names and layer in where[action] and layer in decided)
            for action in Action
        ]
        for layer in layers
    ]


def cap(actions: Tensor, worth: Tensor, costs: Tensor, left: Tensor) -> Tensor:
    """Make actions affordable: the least missed ones become their layer's cheapest until the sum fits.

    Args:
        actions: int64 [N, n], as preferred.
        worth: preferences less their price, float64 [N, n, actions]; forbidden ones far below.
        costs: float64 [n, actions].
        left: what may be spent on these layers, float64 [N]; where even the cheapest don't fit, they are taken.
    """
    affordable = torch.where(worth > FORBIDDEN / 2, costs, torch.inf)
    cheapest = affordable.argmin(dim=-1)
    layers = torch.arange(costs.shape[0])
    extra = costs[layers, actions] - costs[layers, cheapest]
    gain = worth.gather(-1, actions.unsqueeze(-1)) - worth.gather(-1, cheapest.unsqueeze(-1))
    order = gain.squeeze(-1).argsort(dim=-1, descending=True, stable=True)
    room = left - costs[layers, cheapest].sum(dim=-1)
    fits = extra.gather(-1, order).cumsum(dim=-1) <= room.unsqueeze(-1) + TOLERANCE
    keeps = torch.zeros_like(fits).scatter(-1, order, fits)
    return torch.where(keeps, actions, cheapest)
