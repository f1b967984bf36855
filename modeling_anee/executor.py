"""The executor: observe, decide and execute, for all tokens of a forward.

Shapes: B rows, T new tokens, L layers, D hidden size, S cached tokens. Decisions and accounts are kept on the CPU:
one device sync per decision, none per layer.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .actions import FULL, ActionTable
from .alone import alone_runner
from .base_model import BaseStack
from .bridges import Bridges
from .controller import Controller, Observation
from .costs import CostTable
from .layer_runner import LayerRunner, bridged, column, runs_alone
from .ledger import Ledger
from .refine_runner import RefineRunner
from .step import Step
from .trace import ExecutionTrace


class Executor:
    """Runs the decoder stack of a base under a controller, with bridges for what is left out.

    Raises:
        ValueError: an action asks for a variant that nobody knows.
    """

    def __init__(
        self, stack: BaseStack, controller: Controller, bridges: Bridges, costs: CostTable, table: ActionTable
    ) -> None:
        self.stack = stack
        self.controller = controller
        self.bridges = bridges
        self.costs = costs
        self.table = table
        self._has_variants = table.variants != {FULL}
        self.drafts: dict[str, Any] = {}  # plans that have been prepared to draft, by what they are in short
        dearest = controller.dearest
        self.layers = LayerRunner(stack, bridges, costs, table, None if dearest is None else dearest[0])
        self.alone = alone_runner(controller, self.layers, bridges)
        self.refiner = RefineRunner(stack, controller, self.layers, table.heads) if controller.refines else None

    def __reduce__(self) -> tuple:
        """Copies and pickles are made anew from copies of what this one was made of."""
        return type(self), (self.stack, self.controller, self.bridges, self.costs, self.table)

    def run(
        self, hidden: Tensor, step: Step, keep: list[Tensor] | None = None, given: Tensor | None = None
    ) -> tuple[Tensor, ExecutionTrace]:
        """Hidden states [B, T, D] that enter the first layer -> those that leave the last, and what was done.

        Where anything was decided, padding leaves as it entered.

        Args:
            hidden: [B, T, D].
            step: the tokens.
            keep: the hidden states that enter each layer are appended to it.
            given: actions uint8 [B, T, L], instead of what the controller decides.

        Raises:
            ValueError: given actions of another shape, or that the table does not have; full ones where those weights are gone.
        """
        layers = len(self.stack.blocks)
        if given is not None:
            self._check_given(given, (*hidden.shape[:2], layers), step)
        ledger = Ledger.begin((*hidden.shape[:2], layers), self.costs, self.controller.dearest, given)
        entered = hidden
        if given is not None:
            hidden = self.layers.run(hidden, step, ledger, range(layers), keep)
        elif self.alone is not None and keep is None and runs_alone(hidden, step) and self.alone.takes(step):
            hidden = self.alone.run(hidden, step, ledger)
        else:
            hidden = self._decide_and_run(hidden, step, ledger, keep)
        if ledger.decided:
            hidden = self.translate(hidden, ledger.actions)
            if step.real_tokens < step.valid.numel():  # what padding went through depends on the others in the batch
                hidden = torch.where(column(step.valid, hidden), hidden, entered)
        return hidden, self.trace_of(step, ledger)

    def trace_of(self, step: Step, ledger: Ledger) -> ExecutionTrace:
        """What was done with the tokens of a step."""
        return ExecutionTrace(
            actions=ledger.actions,
            cost=(ledger.spent * step.valid).float(),
            valid=step.valid,
            floor=self.controller.floor,
            unit=self.costs.unit,
            ran_anyway=ledger.ran_anyway,
            account=self.controller.account_after(step, ledger),
            table=self.table,
            head=ledger.head,
            fed=self.controller.fed,
            budget=step.budget,
            total=self.costs.total,
            refined=ledger.refined,
        )

    def _decide_and_run(self, hidden: Tensor, step: Step, ledger: Ledger, keep: list[Tensor] | None) -> Tensor:
        """All layers, each after the decisions that it waits for, [B, T, D] -> [B, T, D]."""
        limited = (step.budget < 1.0) & step.valid
        if not self._has_variants:  # kept tokens could only be told to run in full
            limited &= step.places.index >= self.controller.keep_first
        done, previous = 0, hidden
        for segment, (start, _) in enumerate(self.controller.segments):
            if not limited.any():  # nobody has a limit, or all are settled
                break
            hidden = self.layers.run(hidden, step, ledger, range(done, start), keep)
            self._decide(segment, hidden, previous, step, limited, ledger)
            done, previous = start, hidden
        if self.refiner is not None and limited.any():
            return self.refiner.run(hidden, step, ledger, limited, keep)
        return self.layers.run(hidden, step, ledger, range(done, len(self.stack.blocks)), keep)

    def _check_given(self, given: Tensor, shape: tuple[int, ...], step: Step) -> None:
        if given.shape != shape or given.dtype != torch.uint8 or given.device.type != "cpu":
            raise ValueError(f"actions of shape {tuple(given.shape)}, {given.dtype} is not allowed: uint8 {shape} on the CPU")
        if given.numel() and int(given.max()) >= len(self.table):
            raise ValueError(f"actions has {int(given.max())}, which is not allowed: the table has {len(self.table)} actions")
        if self.costs.gone:
            taken = given[step.valid].unique().long()
            lost = taken[self.table.needing(self.costs.gone)[taken]].tolist()
            if lost:
                names = ", ".join(self.table.names[one] for one in lost)
                raise ValueError(
                    f"actions has {names}, which is not possible: the weights for it were dropped (drop_full=True keeps "
                    "what the plans run in, never the full ones)"
                )

    def _decide(self, segment: int, hidden: Tensor, previous: Tensor, step: Step, limited: Tensor, ledger: Ledger) -> None:
        """Ask the controller about every token that has a limit and has not left; write its answer down.

        Those that are settled by it are taken off `limited`, bool [B, T].
        """
        start, stop = self.controller.segments[segment]
        actions, leaving = ledger.actions, self.table.leaving
        asked = limited.clone() if start == 0 else limited & ~leaving[actions[..., start - 1].long()]
        count = int(asked.sum())
        if count == 0:
            return
        who = None if count == asked.numel() else asked  # indices are slow, and mostly nobody is left out
        looks = self.controller.looks(segment)
        if looks:
            hidden, previous = _pick(hidden, who), _pick(previous, who)
        budget, spent, index = (_pick(x, who) for x in (step.budget, ledger.spent, step.places.index))
        logits = partial(self._logits_before, start)
        account = self.controller.account_before(start, step, asked, ledger) if looks else None
        row = None if account is None else _pick(step.places.sequence, who)
        account = None if account is None else _pick(account, who)
        decision = self.controller.decide(segment, Observation(hidden, previous, budget, spent, index, logits, row, account))
        chosen = self._kept_whole(decision.actions, index)
        leaves = leaving[chosen.long()]
        if leaves.any():
            left = leaves.cumsum(dim=-1) > 0
            gone = chosen.gather(-1, leaves.int().argmax(dim=-1, keepdim=True))  # the action by which each token leaves
            chosen = torch.where(left, gone, chosen)
            rest = asked.clone()
            rest[asked] = left[:, -1]
            actions[..., stop:][rest] = gone[left[:, -1]]
        _put(actions[..., start:stop], who, chosen)
        if decision.head is not None:
            if ledger.head is None:
                ledger.head = torch.zeros_like(actions[..., 0])
            spent = spent + self.costs.of_heads(decision.head) - self.costs.of_heads(_pick(ledger.head, who))
            _put(ledger.head, who, decision.head)
        _put(ledger.spent, who, spent + decision.cost)
        ledger.decided = True
        if decision.settled is not None:
            _put(limited, who, ~decision.settled)

    def _kept_whole(self, actions: Tensor, index: Tensor) -> Tensor:
        """Actions uint8 [N, n] of tokens at indices [N], with nothing left out for the kept first ones of a sequence."""
        if not self._has_variants or self.controller.keep_first == 0:
            return actions
        kept = index < self.controller.keep_first
        return torch.where(kept.unsqueeze(-1), self.table.whole[actions.long()], actions) if kept.any() else actions

    def _logits_before(self, layer: int, hidden: Tensor) -> Tensor:
        """Logits [n, V] of hidden states [n, D] as if they left before a layer."""
        return self.stack.logits(bridged(self.bridges.of_exit(layer), hidden))

    def translate(self, hidden: Tensor, actions: Tensor) -> Tensor:
        """Tokens that left go through the translator of the layer where they did."""
        if not len(self.bridges.exit):
            return hidden
        leaves = self.table.leaving[actions.long()]
        if not leaves[..., -1].any():  # who left stays away
            return hidden
        first = torch.where(leaves[..., -1], leaves.int().argmax(dim=-1), -1)
        for layer in first.unique().tolist():
            translator = self.bridges.of_exit(layer)
            if translator is not None:
                hidden = torch.where(column(first == layer, hidden), translator(hidden), hidden)
        return hidden


def _pick(x: Tensor, who: Tensor | None) -> Tensor:
    """The tokens of x [B, T, ...] marked in a mask [B, T] that lies on the CPU, or all of them, [N, ...]."""
    return x.flatten(0, 1) if who is None else x[who.to(x.device)]


def _put(x: Tensor, who: Tensor | None, part: Tensor) -> None:
    """Write [N, ...] to the tokens of x [B, T, ...] that `_pick` takes."""
    if who is None:
        x.copy_(part.view_as(x))
    else:
        x[who] = part
