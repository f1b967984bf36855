"""What a controller is: from what is known of a token to the actions of its next layers.

Every kind answers for many tokens at once and looks at each token's own past alone, so a result depends neither on the
batch nor on how a sequence was cut into steps. Tokens with a budget of 1 are never asked about: they are processed.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from .budget import Dial
from .configuration_anee import FORMAT_VERSION, AneeConfig
from .costs import CostTable
from .ledger import Ledger
from .plans import PlanTable
from .step import Step


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
        row: for kinds that keep an account: number of each token's sequence, ascending, int64 [N], on the CPU; within a
            sequence tokens come in their order.
        account: for the same: what `Controller.account_before` says of each token, float64 [N], on the CPU.
    """

    hidden: Tensor
    previous: Tensor
    budget: Tensor
    spent: Tensor
    index: Tensor
    logits: Callable[[Tensor], Tensor]
    row: Tensor | None = None
    account: Tensor | None = None


@dataclass(frozen=True)
class Decision:
    """Actions uint8 [N, n] for the n layers of a segment, and what deciding cost, float64 [N] or a float.

    `head`: variant of the head of each token, uint8 [N], places in the table's `heads`; None: what it was, full at first.
    `settled`: tokens that later decisions are not asked about, bool [N]; None: nobody.
    """

    actions: Tensor
    cost: Tensor | float = 0.0
    head: Tensor | None = None
    settled: Tensor | None = None


class Controller(nn.Module):
    """Interface of every kind. `segments` are the decisions: (first layer, layer after the last).

    A later decision replaces what an earlier one said of its layers.

    The first `keep_first` tokens of a sequence never leave anything out: where there are other variants than the full one, they
    run whole in those that are decided, else in full, without being asked about.
    """

    format_version: Tensor
    dial: Dial  # of the kinds that can be calibrated; made by `bind`
    needs_hidden = True
    fed: Tensor | None = None  # as how much of a feed-forward each action counts, [actions], for kinds with a capacity
    refines = False  # whether it asks for some tokens to run again, once their prediction is known; see `refine_runner.py`
    runs_without_full = False  # whether it can do without the base's own weights
    keeps_routes = False  # whether it was fitted to the very plans that leave something out, so that all of them must stay
    ceiling = 1.0  # the largest budget: less where the base's own weights were dropped, with
    dearest: tuple[list[int], int] | None = None  # actions, one a layer, and head of what costs so much

    def __init__(self, config: AneeConfig) -> None:
        super().__init__()
        self.num_layers = config.num_layers
        self.segments: list[tuple[int, int]] = []
        self.floor = 0.0
        self.strict = config.budget_mode == "strict"
        self.keep_first = 0 if self.strict else config.keep_first_tokens
        # Kinds without parameters need a weights file too, and a foreign file must be noticed.
        self.register_buffer("format_version", torch.tensor(FORMAT_VERSION))

    def bind(self, costs: CostTable) -> None:
        """Take the costs of the attached base; sets `floor`, the lowest mean cost that can be reached."""
        raise NotImplementedError

    def with_dial(self, dial: Dial) -> Self:
        """The same controller with another dial: a shallow copy that shares the parameters."""
        twin = copy.copy(self)
        twin.dial = dial
        return twin

    def end_at(self, table: PlanTable) -> None:
        """Take the dearest of the plans that are left when weights are gone as the largest budget there is."""
        self.ceiling = float(table.costs[-1])
        self.dearest = table.actions[-1].tolist(), int(table.heads[-1])

    def looks(self, segment: int) -> bool:
        """Whether a decision needs hidden states, and the account where one is kept."""
        return self.needs_hidden

    def decide(self, segment: int, seen: Observation) -> Decision:
        """Actions of N tokens for the layers of a segment."""
        raise NotImplementedError

    def account_before(self, start: int, step: Step, asked: Tensor, ledger: Ledger) -> Tensor | None:
        """What a decision from a layer on must know of what its row has done before; None for kinds without an account.

        Args:
            start: the layer.
            step: the tokens; `step.account` is what `account_after` said of the row's last token before them.
            asked: which of them the decision is about, bool [B, T].
            ledger: what is decided and spent up to here.

        Returns:
            float64 [B, T], on the CPU.
        """
        return None

    def account_after(self, step: Step, ledger: Ledger) -> Tensor | None:
        """What decisions about later tokens must know, up to and with each token of a step; None without an account.

        Returns:
            float64 [B, T], or [B, T, L] with an account for each layer, on the CPU.
        """
        return None

    def plan_budgets(self) -> list[float]:
        """Budgets that are the cost of one plan, which all tokens follow at them; none where tokens decide for themselves."""
        return []

    def probabilities(self, segment: int, seen: Observation) -> Tensor | None:
        """How likely each of K choices is held to be the best in a decision, float [N, n, K]; None where a kind knows none.

        n is the number of the segment's layers, if there is a choice for each, or 1, if one choice is for all of them. Nothing
        is run by them: they tell whoever analyses a controller how sure it is.
        """
        return None

    def reset_parameters(self) -> None:
        """Back to the untrained state, in which nothing changes the base."""
        nn.init.constant_(self.format_version, FORMAT_VERSION)
