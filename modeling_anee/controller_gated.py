"""The `gated` controller: a router in every layer says how much a token needs its feed-forward, gates where it may leave.

Both predict the logarithm of what would be lost (KL to the base, nats), so scores can be compared between layers, and one
price can serve all. What a score must be for a token to go on is a threshold per layer, found by calibration for each
capacity: the share of the feed-forwards that run. A token's way depends on its own past alone.

Everything but the feed-forward runs in the dearest of `gated_variants`. Budgets that afford that without leaving anything out
are fixed plans, and nobody looks at the token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .actions import FULL, NONE
from .bridges import normalised
from .budget import Dial
from .configuration_anee import AneeConfig
from .controller import Controller, Decision, Observation
from .controller_fixed import WholePlans
from .costs import CostTable
from .plans import plan_table


UNTRAINED = 10.0  # logarithm of a loss for which nothing is left out


class GateBank(nn.Linear):
    """Linear gates side by side: weights [n, D], biases [n]. Untrained they say that everything is needed."""

    def reset_parameters(self) -> None:
        """Back to the untrained state."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, UNTRAINED)

    def score(self, number: int, hidden: Tensor) -> Tensor:
        """What one of the gates says of hidden states [..., D], float32 [...]."""
        features = normalised(hidden).to(self.weight.dtype)
        return (F.linear(features, self.weight[number]) + self.bias[number]).float()


class GateDial(Dial):
    """From a budget to thresholds and capacity, and from a capacity to a budget: linear between what was calibrated.

    A calibration has a row for each capacity: `budgets` (its cost, ascending), `settings` (the capacity), `thresholds` of the
    routers and `exit_thresholds` of the gates. Without one nothing is left out.

    Args:
        calibration: `AneeConfig.calibration`, or None.
        layers: number of layers.
        boundaries: between variants of the feed-forward, dearest first.
        exits: number of exit gates.
    """

    def __init__(self, calibration: dict | None, layers: int, boundaries: int, exits: int) -> None:
        super().__init__(calibration, neutral=1.0)
        self.calibrated = self.calibrated and calibration is not None and "thresholds" in calibration
        never = {"thresholds": [[[-torch.inf] * layers] * boundaries], "exit_thresholds": [[-torch.inf] * exits]}
        table = never if calibration is None or not self.calibrated else never | calibration
        self.routers = torch.tensor(table["thresholds"], dtype=torch.float64, device="cpu")  # [K, boundaries, L]
        self.exits = torch.tensor(table["exit_thresholds"], dtype=torch.float64, device="cpu")  # [K, E]

    def thresholds(self, budget: Tensor) -> tuple[Tensor, Tensor]:
        """Of routers float64 [n, boundaries, L] and exit gates [n, E] for budgets float64 [N]; n is N, or 1 for equal ones."""
        same = len(budget) > 0 and bool((budget == budget[0]).all())
        budget = budget[:1] if same else budget
        return self.between(budget, self.routers), self.between(budget, self.exits)

    def budget_of(self, capacity: Tensor) -> Tensor:
        """Budgets float64 [N] of capacities float64 [N]; outside of what was calibrated, as at the nearest."""
        twin = Dial({"budgets": self.settings.tolist(), "settings": self.budgets.tolist()}, neutral=1.0)
        return twin.setting(capacity)


class GatedController(Controller):
    """One decision a layer: which variant the feed-forward runs in, or whether the token leaves here.

    A router reads the hidden state that enters its layer, and so does a gate, of which each of the `exit_layers` has one: a
    token leaves before that layer. The first `min_layers` and the last `keep_last_layers` run in the
    dearest variant; where some layers have a bridge for the feed-forward, the others never leave it out.

    In strict mode every layer takes the dearest variant, at most the one that it would, that leaves enough for the cheapest
    way on.
    """

    dial: GateDial

    def __init__(self, config: AneeConfig) -> None:
        super().__init__(config)
        table, variants = config.table, config.gated_variants or [FULL, NONE]
        self.variants = tuple(variants)  # of the feed-forward, dearest first
        self.choices = torch.tensor([table.place_of(variants[0], one) for one in variants], dtype=torch.uint8, device="cpu")
        self.leave = table.exit_with(variants[0])
        self.exit_layers = sorted(config.exit_layers or ())
        self.routers = GateBank(config.text_config.hidden_size, self.num_layers)
        self.gates = GateBank(config.text_config.hidden_size, len(self.exit_layers))
        self._config = config
        self._fixed = [(0, self.num_layers)] if table.variants != {FULL} else []  # else PROCESS is all that it could be
        self.segments = list(self._fixed)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to leaving nothing out, whatever the token."""
        super().reset_parameters()
        self.routers.reset_parameters()
        self.gates.reset_parameters()

    def scores(self, layer: int, hidden: Tensor) -> Tensor:
        """Logarithm of the loss (KL to the base, nats) of running a layer's feed-forward in the cheapest of the variants.

        Args:
            layer: which.
            hidden: what enters it, [..., D].

        Returns:
            float32 [...], with gradients.
        """
        return self.routers.score(layer, hidden)

    def exit_scores(self, layer: int, hidden: Tensor) -> Tensor:
        """The same of leaving before one of the `exit_layers`."""
        return self.gates.score(self.exit_layers.index(layer), hidden)

    def bind(self, costs: CostTable) -> None:
        """Look up the fixed plans, and what every choice costs; read the calibration."""
        config = self._config
        whole, head = [int(self.choices[0])] * self.num_layers, config.table.heads.index(self.variants[0])
        table = plan_table(config, costs, self.strict, [(whole, head)])
        same = (table.actions == self.choices[0]).all(dim=1) & (table.heads == head)
        self._whole = WholePlans(table, int(same.int().argmax()))
        self.top = self._whole.top  # budget from which on plans are fixed
        self.dial = GateDial(config.calibration, self.num_layers, len(self.variants) - 1, len(self.exit_layers))
        self.segments = list(self._fixed)
        self.floor = self.top

    def decide(self, segment: int, seen: Observation) -> Decision:
        """What is fixed; then the variant of each token's feed-forward, layer by layer."""
        return self._whole.decide(seen, self.keep_first)

    def looks(self, segment: int) -> bool:
        """Only routers and gates read anything of a token."""
        return segment >= len(self._fixed)

    def plan_budgets(self) -> list[float]:
        """The costs of the plans that are fixed."""
        return self._whole.budgets if self._fixed else []
