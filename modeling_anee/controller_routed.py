"""The `routed` controller: one look at every token, early in the stack, picks the plan that it follows from there on.

A small MLP predicts how much each plan would lose on the token; the dial decides how much a loss must be worth: every
plan pays its cost times a price that falls as the budget rises. Where the mean of a text drifts from its budget, since it
is harder or easier than the text of the calibration, the price follows what the text has over- or underspent so far.

Fewer bits lose next to nothing, and the same on every token: so what a budget affords without leaving anything out is a fixed
plan, as of the `plan` controller, and nobody looks at the token.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .actions import FULL
from .bridges import normalised
from .budget import TOLERANCE, Dial, account_after, account_without
from .configuration_anee import ROUTER_BUDGETS, AneeConfig
from .controller import Controller, Decision, Observation
from .controller_fixed import WholePlans, cheapest_whole
from .costs import CostTable
from .ledger import Ledger
from .other_dtype import grown_dial, growth_of
from .plans import PlanTable, listed_plans, plan_table
from .step import Step


FEEDBACK = 0.1  # of the logarithm of the price, for each token's worth of the dearest plan that a text has overspent
STEEPEST = 15.0  # logarithm of the highest price


class RoutedController(Controller):
    """One decision per token, before layer `min_layers`: the cheapest plan that leaves nothing out, or one of `router_budgets`.

    Without other variants than the full one the first of these is PROCESS everywhere. All of them begin with its first
    `min_layers` layers. Tokens whose budget affords it take a fixed plan instead, at the first layer, and so do the kept first
    ones.

    Capacity moves between tokens, as in mixture-of-depths (arXiv:2404.02258), but a token's way depends on its own past
    alone. Untrained it leaves nothing out, uncalibrated it takes the plan of least predicted loss. In strict mode every
    token takes the best plan within its budget, and the price stays what it is.
    """

    runs_without_full = True
    keeps_routes = True

    def __init__(self, config: AneeConfig) -> None:
        super().__init__(config)
        self.start = config.min_layers
        self.has_fixed = config.table.variants != {FULL}  # else PROCESS is all that it could be
        self._fixed = [(0, self.num_layers)] if self.has_fixed else []
        self.segments = [*self._fixed, *([(self.start, self.num_layers)] if self.start < self.num_layers else [])]
        outputs = 1 + len(config.router_plans or config.router_budgets or ROUTER_BUDGETS)
        sizes = [config.text_config.hidden_size, *(config.controller_hidden_sizes or ())]
        inner = [part for a, b in zip(sizes[:-1], sizes[1:], strict=True) for part in (nn.Linear(a, b), nn.GELU())]
        self.predictor = nn.Sequential(*inner, nn.Linear(sizes[-1], outputs))
        self._config = config
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to leaving nothing out, whatever the token."""
        super().reset_parameters()
        for part in self.predictor:
            if isinstance(part, nn.Linear):
                part.reset_parameters()
        last = self.predictor[-1]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            last.bias[0] = -1.0  # type: ignore[index, operator]

    def bind(self, costs: CostTable) -> None:
        """Look up the plans of the budgets."""
        self.costs = costs
        table = plan_table(self._config, costs, self.strict)
        if costs.gone:
            self.end_at(table)
        self._whole = WholePlans(table, cheapest_whole(table, self._config.table.complete))
        self.top = self._whole.top
        self.ways = self._ways(table)
        self.plans = torch.cat((self._whole.actions.unsqueeze(0), self.ways[0]))  # uint8 [K, L], dearest first
        self.heads = torch.cat((self._whole.head.unsqueeze(0), self.ways[1]))  # uint8 [K]
        self.plans[:, : self.start] = self.plans[0, : self.start]
        self.own_cost = costs.of_module(self.predictor)
        self.plan_costs = costs.of_plans(self.plans, self.heads)  # float64 [K]
        self.charges = self.plan_costs + self.own_cost  # the decision included
        self.floor = float(self.charges.min())
        self.limit = min(self.top - TOLERANCE, 1.0) if self.has_fixed else 1.0  # the router is asked at budgets below it
        self._numbers = self.plan_costs.tolist(), self.charges.tolist()
        self.dial = Dial(grown_dial(self._config.calibration, growth_of(self._config, costs)), neutral=-torch.inf)

    def _ways(self, table: PlanTable) -> tuple[Tensor, Tensor]:
        """Actions uint8 [K - 1, L] and heads uint8 [K - 1] of the plans that leave something out."""
        if self._config.router_plans is None:
            places = table.within(self._budgets(table.floor)).clamp(max=self._whole.place)
            return table.actions[places], table.heads[places]
        plans, heads = (torch.tensor(listed, dtype=torch.uint8, device="cpu") for listed in listed_plans(self._config))
        return plans[self._config.router_plans], heads[self._config.router_plans]

    def _budgets(self, lowest: float) -> Tensor:
        """Budgets of the plans that leave something out, descending, float64 [K - 1]; `lowest`: cost of the cheapest plan."""
        budgets = self._config.router_budgets
        if budgets is None:
            count = len(ROUTER_BUDGETS)
            budgets = [lowest + (self.top - lowest) * step / count for step in range(count)]
        return torch.tensor(sorted(budgets, reverse=True), dtype=torch.float64, device="cpu")

    def looks(self, segment: int) -> bool:
        """Only the router reads anything of a token."""
        return segment >= len(self._fixed)

    def plan_budgets(self) -> list[float]:
        """The costs of the plans that are fixed."""
        return self._whole.budgets if self._fixed else []

    def account_before(self, start: int, step: Step, asked: Tensor, ledger: Ledger) -> Tensor:
        """What the row has spent above its budgets (or the floor) before each token, those that are asked about left out."""
        cost = ledger.spent + self.costs.of_actions(ledger.actions[..., start:], start)
        return account_without(step, asked, cost, self.floor)

    def account_after(self, step: Step, ledger: Ledger) -> Tensor:
        """The same up to and with each token."""
        if ledger.account is not None:
            return ledger.account
        return account_after(step, ledger.spent, self.floor)

    def predict(self, hidden: Tensor) -> Tensor:
        """Logarithm of the loss of each plan (KL to the base, nats) for hidden states [..., D] -> float32 [..., K]."""
        dtype = next(self.predictor.parameters()).dtype
        return self.predictor(normalised(hidden).to(dtype)).float()

    def losses(self, hidden: Tensor) -> Tensor:
        """The same in nats, float64 [..., K] on the CPU."""
        return self.predict(hidden).double().exp().cpu()

    def choose(self, loss: Tensor, setting: Tensor) -> Tensor:
        """Plans int64 [N] for losses [N, K] and logarithms of the price [N]."""
        return (loss + self._prices(setting)).argmin(dim=-1)

    def decide(self, segment: int, seen: Observation) -> Decision:
        """What is fixed; then for each other token the plan whose predicted loss and price are least together."""
        return self._route(seen) if self.looks(segment) else self._whole.decide(seen, self.keep_first)

    def _route(self, seen: Observation) -> Decision:
        """The best plan of each token."""
        loss = self.losses(seen.hidden)
        setting = self.dial.setting(seen.budget)
        if self.strict:
            fits = self.charges <= seen.budget.unsqueeze(-1) + TOLERANCE
            fits[:, self.plan_costs.argmin()] = True
            chosen = (loss + self._prices(setting)).masked_fill(~fits, torch.inf).argmin(dim=-1)
        elif self.dial.calibrated:
            chosen = self._choose_in_turn(loss, setting, seen)
        else:
            chosen = self.choose(loss, setting)
        head = self.heads[chosen] if self._fixed else None
        return Decision(self.plans[chosen, self.start :], self.own_cost, head)

    def _prices(self, setting: Tensor) -> Tensor:
        """What each plan pays at logarithms of the price [N], [N, K]."""
        return setting.clamp(max=STEEPEST).exp().unsqueeze(-1) * self.plan_costs

    def _choose_in_turn(self, loss: Tensor, setting: Tensor, seen: Observation) -> Tensor:
        """Plans int64 [N] of tokens chosen one after the other, the account of each row kept.

        In plain numbers: tensors of one token's few plans would be overhead and little else.
        """
        assert seen.row is not None and seen.account is not None
        charges = self._numbers[1]
        own: dict[int, float] = {}  # what each row has overspent in this forward
        chosen = []
        columns = (seen.row, loss, setting, seen.account, seen.budget.clamp(min=self.floor))
        for row, losses, log_price, account, budget in zip(*(column.tolist() for column in columns), strict=True):
            over = own.get(row, 0.0)
            best = self.best(losses, log_price, account + over)
            own[row] = over + charges[best] - budget
            chosen.append(best)
        return torch.tensor(chosen, dtype=torch.int64, device="cpu")

    def best(self, losses: Sequence[float], setting: float, over: float) -> int:
        """The plan of one token, for the loss of each plan and the logarithm of the price, in a text that has overspent."""
        price = math.exp(min(setting + FEEDBACK / self.top * over, STEEPEST))
        values = [lost + price * cost for lost, cost in zip(losses, self._numbers[0], strict=True)]
        return values.index(min(values))
