"""The `gated` controller: a router in every layer says how much a token needs its feed-forward, gates where it may leave.

Both predict the logarithm of what would be lost (KL to the base, nats), so scores can be compared between layers, and one
price can serve all. What a score must be for a token to go on is a threshold per layer, found by calibration for each
capacity: the share of the feed-forwards that run. A token's way depends on its own past alone.

Attention runs in the variant of the feed-forward, beside none in the cheapest that there is. Budgets that afford the dearest of
`gated_variants` for everything are fixed plans, and nobody looks at the token.

The capacity is the share of the feed-forwards that run, where a cheaper variant counts as the part of the way from the cheapest
to the dearest that it costs.
"""

from dataclasses import replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .actions import FULL, NONE, ActionTable
from .budget import TOLERANCE, Dial
from .configuration_anee import AneeConfig
from .configuration_gated import attention_beside
from .controller import Controller, Decision, Observation
from .controller_fixed import WholePlans
from .controller_learned import stand_in_layers
from .costs import CostTable
from .gate_account import account_after, account_before, choose_in_turn
from .gates import GateBank, GateDial
from .ledger import Ledger
from .plans import plan_table
from .step import Step


RELATIVE = -3.0  # logarithm of what a middle variant loses, as a share of what the cheapest does, until that is known


class GatedController(Controller):
    """One decision a layer: which variant the feed-forward runs in, or whether the token leaves here.

    A router reads the hidden state that enters its layer, and so does a gate, of which each of the `exit_layers` has one: a
    token leaves before that layer. The first `min_layers` and the last `keep_last_layers` run in the dearest variant; where
    some layers have a bridge for the feed-forward, the others never leave it out.

    In strict mode every layer takes the dearest variant, at most the one that it would, that leaves enough for the cheapest
    way on.

    `relative` (where there are more than two variants) is the logarithm of what a middle variant loses at each layer, as a
    share of what the cheapest loses, float32 [V - 2, L]; training or measuring sets it.
    """

    dial: GateDial
    cheapest: str
    relative: Tensor

    def __init__(self, config: AneeConfig) -> None:
        super().__init__(config)
        table, variants = config.table, config.gated_variants or [FULL, NONE]
        self.variants = tuple(variants)  # of the feed-forward, dearest first
        self.cheapest = self.variants[-1]
        self.attentions = [attention_beside(variants, one) for one in variants]
        places = [table.place_of(*pair) for pair in zip(self.attentions, variants, strict=True)]
        self.choices = torch.tensor(places, dtype=torch.uint8, device="cpu")
        self.leave = table.exit_with(variants[0])
        self.exit_layers = sorted(config.exit_layers or ())
        self.routers = GateBank(config.text_config.hidden_size, self.num_layers)
        self.gates = GateBank(config.text_config.hidden_size, len(self.exit_layers))
        if len(variants) > 2:
            self.register_buffer("relative", torch.full((len(variants) - 2, self.num_layers), RELATIVE))
        self.gated_layers = gated_layers(config)
        self._config = config
        self._fixed = [(0, self.num_layers)] if table.variants != {FULL} else []  # else PROCESS is all that it could be
        self.segments = list(self._fixed)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to leaving nothing out, whatever the token."""
        super().reset_parameters()
        self.routers.reset_parameters()
        self.gates.reset_parameters()
        if len(self.variants) > 2:
            nn.init.constant_(self.relative, RELATIVE)

    def scores(self, layer: int, hidden: Tensor) -> Tensor:
        """Logarithm of the loss (KL to the base, nats) of running a layer's feed-forward in the cheapest of the variants.

        Args:
            layer: which.
            hidden: what enters it, [..., D].

        Returns:
            float32 [...], with gradients.
        """
        return self.routers(hidden, layer)

    def exit_scores(self, layer: int, hidden: Tensor) -> Tensor:
        """The same of leaving before one of the `exit_layers`."""
        return self.gates(hidden, self.exit_layers.index(layer))

    def bind(self, costs: CostTable) -> None:
        """Look up the fixed plans, and what every choice costs; read the calibration."""
        config = self._config
        whole, head = [int(self.choices[0])] * self.num_layers, config.table.heads.index(self.variants[0])
        table = plan_table(config, costs, self.strict, [(whole, head)])
        same = (table.actions == self.choices[0]).all(dim=1) & (table.heads == head)
        self._whole = WholePlans(table, int(same.int().argmax()))
        self.top = self._whole.top  # budget from which on plans are fixed
        self.head = config.table.heads.index(config.gated_head or self.variants[0])
        self.head_cost = costs.heads[self.head] if costs.heads else costs.head
        self.costs = costs.layers[:, self.choices.long()]  # of each layer in each variant, float64 [L, V]
        self._count(config.table)
        self.router_cost = costs.of_module(self.routers) / self.num_layers
        self.gate_cost = costs.of_module(self.gates) / max(len(self.exit_layers), 1)
        self._find_cheapest_ways(costs.layers[:, self.leave])
        self.with_dial_in_place(self.dial_of(config.calibration))

    def _count(self, table: ActionTable) -> None:
        """As how much of a feed-forward each variant counts, 1 for the dearest and 0 for the cheapest, and each action."""
        costs = self.costs.mean(dim=0)
        shares = (costs - costs[-1]) / (costs[0] - costs[-1])
        self.counts_as = [1.0, *shares[1:-1].clamp(0.0, 1.0).tolist(), 0.0]
        known = dict(zip(self.variants, self.counts_as, strict=True)) | {NONE: 0.0}
        self.fed = torch.tensor([known.get(row.feed_forward, 1.0) for row in table], dtype=torch.float64, device="cpu")

    def dial_of(self, calibration: dict | None) -> GateDial:
        """The dial of a calibration."""
        return GateDial(calibration, self.num_layers, len(self.variants) - 1, len(self.exit_layers))

    def _find_cheapest_ways(self, leaving: Tensor) -> None:
        """The cheapest way on from each layer, and the exit gates at which leaving costs less; `leaving` float64 [L]."""
        self.leaving = leaving.flip(0).cumsum(dim=0).flip(0).tolist()  # cost of having left before each layer
        self.rest = [0.0]  # cost of the cheapest way on from each layer on, and after the last; decisions included
        self.asked_exits: dict[int, int] = {}  # numbers of their gates, by layer
        self.saved = [0.0] * len(self.exit_layers)  # at least, by leaving at each
        for layer in range(self.num_layers - 1, -1, -1):
            gated = layer in self.gated_layers
            stays = float(self.costs[layer].min()) + self.router_cost if gated else float(self.costs[layer, 0])
            stays += self.rest[0]
            saved = stays - self.leaving[layer]
            if layer in self.exit_layers and layer >= self._config.min_layers and saved > 0.0:
                number = self.asked_exits[layer] = self.exit_layers.index(layer)
                self.saved[number] = saved
                stays += self.gate_cost
            self.rest.insert(0, stays)

    def with_dial(self, dial: Dial) -> Self:
        """The same controller with another dial: a shallow copy that shares the parameters."""
        assert isinstance(dial, GateDial)
        twin = super().with_dial(dial)
        twin.with_dial_in_place(dial)
        return twin

    def with_dial_in_place(self, dial: GateDial) -> None:
        """Take a dial, on which it depends whether anything has to be decided below the fixed plans."""
        self.dial = dial
        self.counts_runs = dial.shares is not None and not self.strict
        layers = sorted({*self.gated_layers, *self.asked_exits}) if self.decides else []
        self.segments = [*self._fixed, *((layer, layer + 1) for layer in layers)]
        self.floor = self.head_cost + self.rest[0] if self.strict else float(dial.budgets[0]) if dial.calibrated else self.top

    @property
    def decides(self) -> bool:
        """Whether a token below the fixed plans may have anything left out."""
        return self.strict or self.dial.calibrated

    def looks(self, segment: int) -> bool:
        """Only routers and gates read anything of a token."""
        return segment >= len(self._fixed)

    def plan_budgets(self) -> list[float]:
        """The costs of the plans that are fixed."""
        return self._whole.budgets if self._fixed else []

    def decide(self, segment: int, seen: Observation) -> Decision:
        """What is fixed; then, layer by layer, the variant of each token's feed-forward, or that it leaves."""
        if not self.looks(segment):
            return self._fixed_plans(seen)
        layer = self.segments[segment][0]
        routers, exits = self.dial.thresholds(seen.budget)
        score, exit_score = self._both_scores(layer, seen.hidden)
        leaves = torch.zeros(len(seen.budget), dtype=torch.bool, device="cpu")
        if exit_score is not None:
            leaves = exit_score <= exits[:, self.asked_exits[layer]]
        choice = torch.zeros(len(seen.budget), dtype=torch.int64, device="cpu")
        if score is not None:
            choice = self._choose(layer, score, routers[..., layer], ~leaves, seen)
        own = (exit_score is not None) * self.gate_cost + (score is not None) * ~leaves * self.router_cost
        if self.strict and score is not None:
            choice = self._affordable(layer, choice, seen.budget - seen.spent - own)
        actions = torch.where(leaves, self.leave, self.choices[choice]).to(torch.uint8)
        return Decision(actions.unsqueeze(-1), own)

    def _fixed_plans(self, seen: Observation) -> Decision:
        """The plans of tokens whose budget affords one; the head of the others."""
        fixed = self._whole.decide(seen, self.keep_first)
        assert fixed.head is not None and fixed.settled is not None
        return replace(fixed, head=fixed.head.where(fixed.settled, self.head)) if self.decides else fixed

    def _choose(self, layer: int, score: Tensor, limits: Tensor, stays: Tensor, seen: Observation) -> Tensor:
        """Which of the variants each token's feed-forward runs in, int64 [N], for scores [N] and thresholds [N or 1, V - 1]."""
        if not self.counts_runs:
            return (score.unsqueeze(-1) <= limits).sum(dim=-1)
        assert seen.row is not None and seen.account is not None
        shares = self.dial.shares_at(seen.budget)[:, layer]
        return choose_in_turn(self.counts_as, score, limits.expand(len(score), -1), shares, seen.row, seen.account, stays)

    def counted(self, step: Step, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Where a router was asked, bool [B, T, L], and as how much of its feed-forward what then ran counts, float64."""
        budget = step.budget
        asked = step.valid & ~self._whole.affords(budget) & (budget < 1.0) & (step.places.index >= self.keep_first)
        gated = torch.zeros(self.num_layers, dtype=torch.bool, device="cpu")
        gated[self.gated_layers] = True
        counts = asked.unsqueeze(-1) & (actions != self.leave) & gated
        assert self.fed is not None
        return counts, counts * self.fed[actions.long()]

    def account_before(self, start: int, step: Step, asked: Tensor, ledger: Ledger) -> Tensor | None:
        """What the layer has run above its share for the tokens before a step."""
        return account_before(step, start) if self.counts_runs else None

    def account_after(self, step: Step, ledger: Ledger) -> Tensor | None:
        """What each layer has run above its share, up to and with each token."""
        if ledger.account is not None or not self.counts_runs:
            return ledger.account
        counts, ran = self.counted(step, ledger.actions)
        shares = self.dial.shares_at(step.budget.flatten()).view(*step.budget.shape, -1)
        return account_after(step, ran - shares * counts)

    def _both_scores(self, layer: int, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What router and exit gate of a layer say, where they are asked, float64 [N] on the CPU: one device sync."""
        asked = [self.scores(layer, hidden)] if layer in self.gated_layers else []
        asked += [self.exit_scores(layer, hidden)] if layer in self.asked_exits else []
        found = list(torch.stack(asked).double().cpu())
        return found[0] if layer in self.gated_layers else None, found[-1] if layer in self.asked_exits else None

    def _affordable(self, layer: int, choice: Tensor, left: Tensor) -> Tensor:
        """The dearest choices int64 [N] from those wanted on that leave enough for the cheapest way on, else the cheapest.

        Args:
            layer: which.
            choice: what is wanted, int64 [N].
            left: what may be spent from this layer on, float64 [N].
        """
        costs = self.costs[layer]
        fits = costs <= (left - self.rest[layer + 1]).unsqueeze(-1) + TOLERANCE
        fits &= torch.arange(len(costs), device="cpu") >= choice.unsqueeze(-1)
        return torch.where(fits.any(dim=-1), fits.int().argmax(dim=-1), costs.argmin())

    def probabilities(self, segment: int, seen: Observation) -> Tensor | None:
        """How likely each variant is held to be, float32 [N, 1, V]: logistic in the distance of a score to its thresholds."""
        layer = self.segments[segment][0]
        if not self.looks(segment) or layer not in self.gated_layers:
            return None
        routers, _ = self.dial.thresholds(seen.budget)
        score = self.scores(layer, seen.hidden).double().cpu()
        cheaper = (routers[..., layer] - score.unsqueeze(-1)).sigmoid()  # than each of the variants but the last
        edges = F.pad(F.pad(cheaper, (1, 0), value=1.0), (0, 1), value=0.0)
        return (edges[:, :-1] - edges[:, 1:]).unsqueeze(1).float()

    def at_price(self, price: float) -> tuple[Tensor, Tensor]:
        """Thresholds of routers float64 [V - 1, L] and exit gates [E] at which what is lost is worth what is saved.

        Args:
            price: logarithm of the loss, in nats, that saving the whole model's cost is worth.
        """
        saved = (self.costs[:, :-1] - self.costs[:, 1:]).clamp(min=TOLERANCE).log().T  # by each next cheaper variant
        losses = torch.zeros(len(self.variants), self.num_layers, dtype=torch.float64, device="cpu")  # shares of the cheapest's
        if len(self.variants) > 2:
            losses[1:-1] = self.relative.double().cpu().exp().clamp(max=1.0)
        losses[-1] = 1.0
        routers = price + saved - (losses[1:] - losses[:-1]).clamp(min=TOLERANCE).log()
        routers = routers.flip(0).cummax(dim=0).values.flip(0)  # a variant that is never worth it has no room
        leaving = torch.tensor(self.saved, dtype=torch.float64, device="cpu")
        return routers, price + leaving.clamp(min=TOLERANCE).log()


def gated_layers(config: AneeConfig) -> list[int]:
    """Layers at which a router is asked."""
    variants = config.gated_variants or [FULL, NONE]
    action = config.table[config.table.place_of(attention_beside(variants, variants[-1]), variants[-1])]
    inner = range(config.min_layers, config.num_layers - config.keep_last_layers)
    return [layer for layer in inner if layer in stand_in_layers(action, config)]
