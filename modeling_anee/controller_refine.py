"""The `refine` controller: a full cheap plan first; where its prediction is unsure, the last layers again in a dearer plan.

Progressive refinement, as of anytime prediction (Grubb and Bagnell, 2012) and of cascades (FrugalGPT, arXiv:2305.05176), within
one token of one model: keys and values of the layers that run again are replaced by the dearer ones. The dial is a threshold
of doubt. Where the mean of a text drifts from its budget, that follows what it has over- or underspent.

`refine_runner.py` says how the tokens of one forward run so.
"""

import torch
from torch import Tensor

from .actions import FULL, PROCESS
from .budget import TOLERANCE, Dial, account_after
from .configuration_anee import AneeConfig
from .configuration_refine import default_pair, refined_from
from .controller import Controller, Decision, Observation
from .costs import CostTable
from .ledger import Ledger
from .plans import PlanTable, listed_plans, plan_table
from .step import Step


FEEDBACK = 0.1  # nats of doubt, for each refinement that a text has overspent
NEUTRAL = {"entropy": 1.0, "margin": -1.0, "max_probability": 0.7}  # the doubt from which on, uncalibrated


class RefineController(Controller):
    """Tokens run the first of two plans; those in doubt run its layers from `start` on, and the head, again in the other.

    Both runs are charged, so a token that runs again costs more than the second plan alone. Budgets that afford that plan for
    every token take fixed plans instead; so do, in any case, the kept first tokens. In strict mode a token runs again only if
    its own budget affords both.
    """

    refines = True
    needs_hidden = False

    def __init__(self, config: AneeConfig) -> None:
        super().__init__(config)
        self.segments = [(0, self.num_layers)]
        self.start = refined_from(self.num_layers) if config.refine_from is None else config.refine_from
        self.metric = config.confidence_metric or "margin"
        self._has_variants = config.table.variants != {FULL}
        self._config = config

    def bind(self, costs: CostTable) -> None:
        """Look up the plans and what they cost."""
        pair = self._pair(costs)
        plans = torch.tensor([plan for plan, _ in pair], dtype=torch.uint8, device="cpu")
        heads = torch.tensor([head for _, head in pair], dtype=torch.uint8, device="cpu")
        self.first, self.again = plans  # uint8 [L] each
        self.first_head, self.again_head = heads
        cheap, dear = costs.of_plans(plans, heads).tolist()
        self.cost = cheap  # of a token that runs once
        self.charge = float(costs.of_actions(self.again[self.start :], self.start) + costs.of_heads(self.again_head))
        self.top = min(dear, cheap + self.charge)  # budget from which on plans are fixed
        self.floor = cheap
        self.table = plan_table(self._config, costs, self.strict, pair)
        self._whole = self._first_whole(self.table)
        self.dial = Dial(self._config.calibration, neutral=NEUTRAL[self.metric])

    def _pair(self, costs: CostTable) -> list[tuple[list[int], int]]:
        """Actions, one a layer, and heads of the two plans."""
        config, layers = self._config, self.num_layers
        if config.refine_plans is not None:
            return [(config.table.plan(plan, layers), config.table.head_of(plan)) for plan in config.refine_plans]
        if config.precisions:
            return default_pair(config.precisions, config.table, layers)
        table = PlanTable([*listed_plans(config)[0], [PROCESS] * layers], costs)
        stays = ~config.table.leaving[table.actions.long()].any(dim=1)
        return [(table.actions[stays][0].tolist(), 0), ([PROCESS] * layers, 0)]

    def _first_whole(self, table: PlanTable) -> int:
        """Place of the cheapest plan from `top` on that leaves nothing out; of the dearest, if all of them do."""
        whole = self._config.table.complete[table.actions.long()].all(dim=1) & (table.costs >= self.top - TOLERANCE)
        return int(whole.int().argmax()) if whole.any() else len(whole) - 1

    def decide(self, segment: int, seen: Observation) -> Decision:
        """The first plan, or what is fixed."""
        affords, kept = seen.budget >= self.top - TOLERANCE, seen.index < self.keep_first
        places = torch.where(affords, self.table.places(seen.budget, seen.index), self._whole)
        fixed = affords | kept
        actions = torch.where(fixed.unsqueeze(-1), self.table.actions[places], self.first)
        heads = torch.where(fixed, self.table.heads[places], self.first_head)
        return Decision(actions, head=heads if self._has_variants else None, settled=fixed)

    def first_costs(self, count: int) -> float:
        """What the kept first tokens of a sequence cost, `count` of them."""
        return count * float(self.table.costs[self._whole])

    def plan_budgets(self) -> list[float]:
        """The costs of the plans that are fixed."""
        return [cost for cost in self.table.costs.tolist() if cost >= self.top - TOLERANCE]

    def account_after(self, step: Step, ledger: Ledger) -> Tensor:
        """What every row has spent above its budgets (or the floor), up to and with each token."""
        return account_after(step, ledger.spent, self.floor)

    def doubt(self, logits: Tensor) -> Tensor:
        """How unsure predictions are, in nats: logits [n, V] -> float64 [n] on the CPU.

        The entropy; or by how much the two likeliest tokens differ, or the largest probability, as their negative logarithms.
        """
        if self.metric == "margin":
            best = logits.float().topk(2, dim=-1).values
            return (best[..., 1] - best[..., 0]).double().cpu()
        log_probabilities = logits.float().log_softmax(dim=-1)
        if self.metric == "max_probability":
            return -log_probabilities.amax(dim=-1).double().cpu()
        return -(log_probabilities.exp() * log_probabilities).sum(dim=-1).double().cpu()

    def choose(self, doubts: Tensor, budgets: Tensor, accounts: Tensor, rows: Tensor) -> Tensor:
        """Which of N tokens run again, bool [N], one after the other.

        Args:
            doubts: float64 [N].
            budgets: float64 [N].
            accounts: what the row has spent above its budgets before each token, these N left out, float64 [N].
            rows: number of each token's sequence, ascending, int64 [N].
        """
        settings = self.dial.setting(budgets)
        if self.strict:
            return (doubts > settings) & (self.cost + self.charge <= budgets + TOLERANCE)
        if not self.dial.calibrated:
            return doubts > settings
        own: dict[int, float] = {}  # what each row has overspent in this forward
        columns = (x.tolist() for x in (rows, doubts, settings, accounts, budgets.clamp(min=self.floor)))
        chosen = []
        for row, doubt, setting, account, budget in zip(*columns, strict=True):
            over = own.get(row, 0.0)
            chosen.append(doubt > setting + FEEDBACK / self.charge * (account + over))
            own[row] = over + self.cost + chosen[-1] * self.charge - budget
        return torch.tensor(chosen, dtype=torch.bool, device="cpu")
