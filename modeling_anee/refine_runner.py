"""Runs tokens under a `refine` controller: the first plan, and where the prediction is in doubt the last layers again.

A token alone runs first, is asked how sure it is, and may run again over the keys and values that it has just written. What
later tokens see of it are the newer ones. So a token depends on which tokens before it ran again, and these are known only once
the tokens before them have gone through all layers.

Several tokens at once are run as a fixed point of that (Jacobi iteration, Song et al., arXiv:2002.03629), so that scoring is
decoding, exactly: suppose that nobody runs again, run both streams of all tokens in parallel, see who would, and go on from the
first token about which that was wrong. What was found up to it is final, so every sweep settles one token more at least; mostly
a few sweeps settle all.

Shapes: B rows, T tokens, L layers, D hidden size, V tokens of the vocabulary.
"""

from typing import Any, cast

import torch
from torch import Tensor

from .base_model import BaseStack
from .budget import account_without
from .cache import AneeCache
from .layer_runner import LayerRunner, runs_alone
from .ledger import Ledger
from .refine_streams import Queries, StreamCache, columns_of, first_difference, put, taken
from .step import Step


ROWS = 256  # hidden states that the head is asked about at once


class RefineRunner:
    """Runs the tokens of a step, those that may run again among them.

    Args:
        stack: whose head says what is predicted.
        controller: a bound `RefineController`, or who stands in for one.
        layers: what runs them.
        heads: the variants of the head, by place.
    """

    def __init__(self, stack: BaseStack, controller: Any, layers: LayerRunner, heads: list[str]) -> None:
        self._stack, self._controller, self._layers, self._heads = stack, controller, layers, heads

    def run(self, hidden: Tensor, step: Step, ledger: Ledger, unsettled: Tensor, keep: list[Tensor] | None) -> Tensor:
        """Hidden states [B, T, D] that enter the first layer -> those that leave the last; written down in the ledger.

        Args:
            hidden: [B, T, D].
            step: the tokens.
            ledger: has the first plan of each; takes who ran again, and what that costs.
            unsettled: who may run again, bool [B, T].
            keep: the hidden states that enter each layer are appended to it.

        Raises:
            ValueError: a cache whose keys and values can't be replaced.
        """
        hidden = self._layers.run(hidden, step, ledger, range(self._controller.start), keep)
        if keep is None and runs_alone(hidden, step):
            return self._run_one(hidden, step, ledger, unsettled)
        return _Forward(self, hidden, step, ledger, unsettled, keep).run()

    def _run_one(self, hidden: Tensor, step: Step, ledger: Ledger, unsettled: Tensor) -> Tensor:
        """The same for one token [1, 1, D] whose cache is ours."""
        rest = range(self._controller.start, self._controller.num_layers)
        left = self._layers.run(hidden, step, ledger, rest)
        logits = self.logits(left, self._controller.first_head)
        refined = self.choose(self._controller.doubt(logits[0]), step, ledger.spent, unsettled)
        if refined.any():
            for layer in cast(AneeCache, step.cache).layers[rest.start :]:
                layer.crop(-1)
            self.write_down(ledger, refined)
            left = self._layers.run(hidden, step, ledger, rest)  # adds what these layers cost
            ledger.spent += self._layers.costs.of_heads(self._controller.again_head)
            logits = self.logits(left, self._controller.again_head)
        step.answers.append(logits)
        ledger.refined = refined
        return left

    def choose(self, doubts: Tensor, step: Step, spent: Tensor, unsettled: Tensor) -> Tensor:
        """Who runs again, bool [B, T].

        Args:
            doubts: of the unsettled ones, float64 [N].
            step: the tokens.
            spent: what each costs if none does, float64 [B, T].
            unsettled: bool [B, T].
        """
        controller = self._controller
        accounts = account_without(step, unsettled, spent, controller.floor)[unsettled]
        rows = step.places.sequence[unsettled]
        chosen = torch.zeros_like(unsettled)
        chosen[unsettled] = controller.choose(doubts, step.budget[unsettled], accounts, rows)
        return chosen

    def write_down(self, ledger: Ledger, refined: Tensor) -> None:
        """What the tokens that run again, bool [B, T], do from there on."""
        controller = self._controller
        ledger.actions[..., controller.start :][refined] = controller.again[controller.start :]
        if ledger.head is not None:
            ledger.head[refined] = controller.again_head

    def logits(self, hidden: Tensor, head: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D] that left the last layer, by a variant of the head."""
        return self._stack.logits(hidden, self._heads[int(head)])

    @torch.no_grad()
    def doubts(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """How unsure the first plan is of hidden states [N, D], float64 [N], and its logits of the last of them, [n, V]."""
        found = []
        for part in hidden.split(ROWS):
            logits = self.logits(part, self._controller.first_head)
            found.append(self._controller.doubt(logits))
        return torch.cat(found), logits


class _Forward:
    """Several tokens, or some that are not alone."""

    def __init__(
        self,
        runner: RefineRunner,
        hidden: Tensor,
        step: Step,
        ledger: Ledger,
        unsettled: Tensor,
        keep: list[Tensor] | None,
    ) -> None:
        controller = runner._controller
        self._runner, self._controller, self._layers = runner, controller, runner._layers
        self._hidden, self._step, self._ledger, self._keep = hidden, step, ledger, keep
        self._rest = range(controller.start, controller.num_layers)
        self._cache = StreamCache(step, self._rest.start, self._rest.stop)
        self._tokens, self._unsettled = hidden.shape[1], unsettled
        self._first = ledger.actions.clone()
        self._states: list[Tensor | None] = [None] * (1 if keep is None else 1 + len(self._rest))  # of both streams
        self._ran_anyway: Tensor | None = None
        self._doubts = torch.zeros(unsettled.shape, dtype=torch.float64, device="cpu")

    def run(self) -> Tensor:
        """Hidden states [B, T, D] that leave the last layer."""
        step, ledger, columns = self._step, self._ledger, torch.arange(self._tokens, device="cpu")
        ledger.spent += self._layers.costs.of_actions(self._first[..., self._rest.start :], self._rest.start)
        refined, nobody = torch.zeros_like(self._unsettled), columns[:0]
        logits = self._sweep(Queries.of(columns, nobody), refined)
        while True:
            found = self._runner.choose(self._doubts[self._unsettled], step, ledger.spent, self._unsettled)
            wrong = first_difference(found, refined)
            if wrong == self._tokens:
                return self._settle(refined, logits)
            refined = found
            self._sweep(Queries.of(columns[wrong + 1 :], columns_of(refined, wrong)), refined)

    def _sweep(self, queries: Queries, refined: Tensor) -> Tensor | None:
        """Run tokens, given who has run again, bool [B, T]; logits [n, V] of the last that may yet, None where nobody may."""
        step = queries.step(self._step, refined, self._cache, self._rest.start)
        self._cache.slots = slots = queries.slots(self._tokens)
        actions = self._first[:, queries.columns]
        actions[:, queries.again] = self._controller.again
        ledger = Ledger(actions=actions, spent=torch.zeros(step.budget.shape, dtype=torch.float64, device="cpu"))
        entering = self._hidden[:, queries.columns.to(self._hidden.device)]
        states: list[Tensor] = []
        left = self._layers.run(entering, step, ledger, self._rest, None if self._keep is None else states)
        self._states = [put(x, slots, own, self._tokens) for x, own in zip(self._states, [*states, left], strict=True)]
        if len(queries.columns) == self._tokens and not queries.again.any():
            self._ran_anyway = ledger.ran_anyway
        asked = self._unsettled[:, queries.columns] & ~queries.again
        where = asked.nonzero()
        if not len(where):
            return None
        found, logits = self._runner.doubts(left[where[:, 0].to(left.device), where[:, 1].to(left.device)])
        self._doubts[where[:, 0], queries.columns[where[:, 1]]] = found
        return logits

    def _settle(self, refined: Tensor, logits: Tensor | None) -> Tensor:
        """Write down who ran again, bool [B, T], and their keys and values; the hidden states that leave, [B, T, D]."""
        ledger, controller = self._ledger, self._controller
        self._runner.write_down(ledger, refined)
        ledger.spent += refined * controller.charge
        ledger.refined = refined
        if self._ran_anyway is not None:
            ledger.ran_anyway = (0 if ledger.ran_anyway is None else ledger.ran_anyway) + self._ran_anyway * ~refined
        *entered, left = (taken(x, refined) for x in self._states if x is not None)
        if self._keep is not None:
            self._keep += entered
        if self._step.cache is not None:
            for layer in self._rest:
                self._step.store(self._cache.chosen(layer, refined), layer)
        if self._tokens == 1 and logits is not None and len(logits) == len(left) and not torch.is_grad_enabled():
            self._step.answers.append(self._answers(left, refined, logits))
        return left

    def _answers(self, left: Tensor, refined: Tensor, logits: Tensor) -> Tensor:
        """Logits [B, 1, V] of one token a row, of which those of the first plan [B, V] are known."""
        if refined.any():
            again = refined[:, 0].nonzero().squeeze(1).to(left.device)
            logits = logits.index_copy(0, again, self._runner.logits(left[again, 0], self._controller.again_head))
        return logits.unsqueeze(1)
