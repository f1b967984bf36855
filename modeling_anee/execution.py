"""The executor: observe, decide and execute, layer by layer, for all tokens of a forward.

Shapes: B rows, T new tokens, L layers, D hidden size, S cached tokens. Decisions and accounts are kept on the CPU:
one device sync per decision, none per layer.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import Cache

from .actions import Action
from .base_model import BaseStack
from .cache import AneeCache
from .controllers import Controller, Observation
from .costs import CostTable
from .rotary import Rotation
from .trace import ExecutionTrace


# Arithmetic that a device does in the time that gathering and scattering a subset takes: on 2 CPU cores a layer of
# SmolLM2-135M (7 MFLOP a token) broke even at 12 to 16 tokens left out; accelerators are limited by kernel launches.
GATHERING_FLOPS = {"cpu": 1e8, "cuda": 2e10}


@dataclass(frozen=True)
class Step:
    """The tokens of one forward.

    Args:
        budget: float64 [B, T] on the CPU.
        index: number of real tokens before each one in its row, int64 [B, T] on the CPU.
        valid: False for padding, bool [B, T] on the CPU.
        rotations: rotary cos and sin of the positions, or None, for each layer.
        masks: attention mask of the base, or None, for each layer.
        cache: where keys and values go, or None.
        past: number of tokens in the cache before.
    """

    budget: Tensor
    index: Tensor
    valid: Tensor
    rotations: list[Rotation | None]
    masks: list[Tensor | None]
    cache: Cache | None
    past: int

    @cached_property
    def real_tokens(self) -> int:
        """Number of tokens that are not padding."""
        return int(self.valid.sum())


@dataclass(frozen=True)
class Subset:
    """Some of the tokens of a step, gathered into a rectangle of R rows and at most n tokens each.

    Args:
        rows: rows with any token, int64 [R].
        columns: their tokens, int64 [R, n]; short rows are filled up with token 0.
        real: False for those fillers, bool [R, n].
    """

    rows: Tensor
    columns: Tensor
    real: Tensor

    @classmethod
    def of(cls, chosen: Tensor, device: torch.device) -> "Subset":
        """The tokens marked in a mask [B, T] that lies on the CPU."""
        rows = chosen.any(dim=1).nonzero().squeeze(1)
        counts = chosen[rows].sum(dim=1)
        columns = (~chosen[rows]).long().argsort(dim=1, stable=True)[:, : int(counts.max())]
        real = torch.arange(columns.shape[1]) < counts.unsqueeze(1)
        return cls(rows.to(device), columns.masked_fill(~real, 0).to(device), real.to(device))

    def gather(self, x: Tensor) -> Tensor:
        """[B or 1, T, ...] -> [R, n, ...]."""
        rows = self.rows if x.shape[0] > 1 else torch.zeros_like(self.rows)
        return x[rows.unsqueeze(1), self.columns]

    def scatter(self, x: Tensor, part: Tensor) -> Tensor:
        """A copy of x [B, T, D] with the tokens of the subset taken from `part` [R, n, D]."""
        rows = self.rows.unsqueeze(1).expand_as(self.columns)[self.real]
        return x.index_put((rows, self.columns[self.real]), part[self.real])

    def take_rows(self, x: Tensor) -> Tensor:
        """The rows of x [B, ...] that have any token."""
        return x if len(self.rows) == x.shape[0] else x.index_select(0, self.rows)

    def mask(self, mask: Tensor | None, step: Step, keys: int) -> Tensor | None:
        """Rows and queries of an attention mask [B or 1, 1, T, S]; one is made where the base relies on causality."""
        if mask is None and step.valid.shape[1] == 1:
            return None
        if mask is None:
            last_key = self.columns + step.past
            return (torch.arange(keys, device=last_key.device) <= last_key.unsqueeze(-1)).unsqueeze(1)
        return self.gather(mask.transpose(1, 2)).transpose(1, 2)


@dataclass
class Ledger:
    """What is decided and spent in the course of a step; on the CPU.

    Args:
        actions: uint8 [B, T, L]; PROCESS until something else is decided.
        spent: cost of the layers run so far and of deciding, float64 [B, T].
        ran_anyway: skipped layers that were run because gathering would not pay, int64 [B, T], None for none.
    """

    actions: Tensor
    spent: Tensor
    ran_anyway: Tensor | None = None


class Executor:
    """Runs the decoder stack of a base under a controller."""

    def __init__(self, stack: BaseStack, controller: Controller, costs: CostTable) -> None:
        self.stack = stack
        self.controller = controller
        self.costs = costs
        flops = stack.measure_costs("flops")
        self._flops = (flops.layers[:, Action.PROCESS] * flops.stack).tolist()  # of each layer, per token

    def run(self, hidden: Tensor, step: Step, keep: list[Tensor] | None = None) -> tuple[Tensor, ExecutionTrace]:
        """Hidden states [B, T, D] that enter the first layer -> those that leave the last, and what was done.

        With `keep`, the hidden states that enter each layer are appended to it.
        """
        layers = len(self.stack.blocks)
        ledger = Ledger(
            actions=torch.zeros(*hidden.shape[:2], layers, dtype=torch.uint8),
            spent=torch.zeros(hidden.shape[:2], dtype=torch.float64),
        )
        limited = (step.budget < 1.0) & step.valid
        done, previous = 0, hidden
        for segment, (start, _) in enumerate(self.controller.segments if limited.any() else ()):
            hidden = self._run_layers(hidden, step, ledger, range(done, start), keep)
            self._decide(segment, hidden, previous, step, limited, ledger)
            done, previous = start, hidden
        hidden = self._run_layers(hidden, step, ledger, range(done, layers), keep)
        return hidden, ExecutionTrace(
            actions=ledger.actions,
            cost=(ledger.spent * step.valid).float(),
            valid=step.valid,
            stack_share=self.costs.stack_share,
            floor=self.controller.floor,
            unit=self.costs.unit,
            ran_anyway=ledger.ran_anyway,
        )

    def _decide(self, segment: int, hidden: Tensor, previous: Tensor, step: Step, limited: Tensor, ledger: Ledger) -> None:
        """Ask the controller about every token that has a limit and has not exited; write its answer down."""
        start, stop = self.controller.segments[segment]
        actions = ledger.actions
        asked = limited if start == 0 else limited & (actions[..., start - 1] != Action.EXIT)
        count = int(asked.sum())
        if count == 0:
            return
        who = None if count == asked.numel() else asked  # indices are slow, and mostly nobody is left out
        if self.controller.needs_hidden:
            hidden, previous = _pick(hidden, who), _pick(previous, who)
        budget, spent, index = (_pick(x, who) for x in (step.budget, ledger.spent, step.index))
        decision = self.controller.decide(segment, Observation(hidden, previous, budget, spent, index, self.stack.logits))
        chosen, exits = decision.actions, decision.actions == Action.EXIT
        if exits.any():
            exited = exits.cumsum(dim=-1) > 0
            chosen = chosen.masked_fill(exited, Action.EXIT)
            leaves = asked.clone()
            leaves[asked] = exited[:, -1]
            actions[..., stop:][leaves] = Action.EXIT
        _put(actions[..., start:stop], who, chosen)
        _put(ledger.spent, who, spent + decision.cost)

    def _run_layers(self, hidden: Tensor, step: Step, ledger: Ledger, layers: range, keep: list[Tensor] | None) -> Tensor:
        """Execute decided actions. Padding goes with the majority: it is never gathered and nobody sees it."""
        actions = ledger.actions[..., layers.start : layers.stop]
        ledger.spent += self.costs.of_actions(actions, layers.start)
        process = (actions == Action.PROCESS) & step.valid.unsqueeze(-1)
        counts = process.flatten(0, 1).sum(dim=0).tolist()
        for i, layer in enumerate(layers):
            if keep is not None:
                keep.append(hidden)
            if counts[i] == 0:
                self._skip(layer, hidden, step)
            elif counts[i] == step.real_tokens:
                hidden = self._process_all(layer, hidden, step)
            else:
                hidden = self._process_some(layer, hidden, step, process[..., i], ledger)
        return hidden

    def _skip(self, layer: int, hidden: Tensor, step: Step) -> None:
        """Every token passes: only keys and values are due, and our own cache can wait for them."""
        rotation = step.rotations[layer]
        if isinstance(step.cache, AneeCache):
            step.cache.defer(hidden, rotation, layer)
        elif step.cache is not None:
            step.cache.update(*self.stack.blocks[layer].keys_values(hidden, rotation), layer)

    def _process_all(self, layer: int, hidden: Tensor, step: Step) -> Tensor:
        """Every token is processed: nothing is gathered."""
        block = self.stack.blocks[layer]
        queries, keys, values = block.queries_keys_values(hidden, step.rotations[layer])
        if step.cache is not None:
            keys, values = step.cache.update(keys, values, layer)
        return block.process(hidden, queries, keys, values, step.masks[layer])

    def _process_some(self, layer: int, hidden: Tensor, step: Step, chosen: Tensor, ledger: Ledger) -> Tensor:
        """Keys and values of every token; queries, attention and feed-forward of those chosen in a mask [B, T]."""
        passed = step.valid & ~chosen
        if not self._gathering_pays(layer, int(passed.sum()), hidden.device):
            ledger.ran_anyway = passed.long() if ledger.ran_anyway is None else ledger.ran_anyway + passed
            processed = self._process_all(layer, hidden, step)
            return torch.where(chosen.to(hidden.device).unsqueeze(-1), processed, hidden)
        block, rotation = self.stack.blocks[layer], step.rotations[layer]
        subset = Subset.of(chosen, hidden.device)
        keys, values = block.keys_values(hidden, rotation)
        if step.cache is not None:
            keys, values = step.cache.update(keys, values, layer)
        part = subset.gather(hidden)
        rotation = rotation and (subset.gather(rotation[0]), subset.gather(rotation[1]))
        mask = subset.mask(step.masks[layer], step, keys.shape[2])
        queries = block.queries(part, rotation)
        part = block.process(part, queries, subset.take_rows(keys), subset.take_rows(values), mask)
        return subset.scatter(hidden, part)

    def _gathering_pays(self, layer: int, saved_tokens: int, device: torch.device) -> bool:
        """Whether leaving tokens out of a layer saves more arithmetic than gathering the others costs."""
        return saved_tokens * self._flops[layer] >= GATHERING_FLOPS.get(device.type, GATHERING_FLOPS["cuda"])


def _pick(x: Tensor, who: Tensor | None) -> Tensor:
    """The tokens of x [B, T, ...] marked in a mask [B, T] that lies on the CPU, or all of them, [N, ...]."""
    return x.flatten(0, 1) if who is None else x[who.to(x.device)]


def _put(x: Tensor, who: Tensor | None, part: Tensor) -> None:
    """Write [N, ...] to the tokens of x [B, T, ...] that `_pick` takes."""
    if who is None:
        x.copy_(part.view_as(x))
    else:
        x[who] = part
