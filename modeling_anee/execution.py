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
from .bridges import Bridge, Bridges
from .cache import AneeCache
from .controller import Controller, Observation
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
    """Runs the decoder stack of a base under a controller, with bridges for what is left out."""

    def __init__(self, stack: BaseStack, controller: Controller, bridges: Bridges, costs: CostTable) -> None:
        self.stack = stack
        self.controller = controller
        self.bridges = bridges
        self.costs = costs
        flops = stack.measure_costs("flops")
        per_token = flops.layers * flops.stack
        self._whole = per_token[:, Action.PROCESS].tolist()  # FLOPs of each layer, per token
        self._feed_forward = (per_token[:, Action.PROCESS] - per_token[:, Action.SKIP_FFN]).tolist()

    def run(self, hidden: Tensor, step: Step, keep: list[Tensor] | None = None) -> tuple[Tensor, ExecutionTrace]:
        """Hidden states [B, T, D] that enter the first layer -> those that leave the last, and what was done.

        With `keep`, the hidden states that enter each layer are appended to it.
        """
        layers = len(self.stack.blocks)
        ledger = Ledger(
            actions=torch.zeros(*hidden.shape[:2], layers, dtype=torch.uint8),
            spent=torch.zeros(hidden.shape[:2], dtype=torch.float64),
        )
        limited = (step.budget < 1.0) & step.valid & (step.index >= self.controller.keep_first)
        done, previous = 0, hidden
        for segment, (start, _) in enumerate(self.controller.segments if limited.any() else ()):
            hidden = self.run_layers(hidden, step, ledger, range(done, start), keep)
            self._decide(segment, hidden, previous, step, limited, ledger)
            done, previous = start, hidden
        hidden = self.run_layers(hidden, step, ledger, range(done, layers), keep)
        hidden = self.translate(hidden, ledger.actions)
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
        translator = self.bridges.of_exit(start)
        logits = self.stack.logits if translator is None else lambda hidden: self.stack.logits(translator(hidden))
        decision = self.controller.decide(segment, Observation(hidden, previous, budget, spent, index, logits))
        chosen, exits = decision.actions, decision.actions == Action.EXIT
        if exits.any():
            exited = exits.cumsum(dim=-1) > 0
            chosen = chosen.masked_fill(exited, Action.EXIT)
            leaves = asked.clone()
            leaves[asked] = exited[:, -1]
            actions[..., stop:][leaves] = Action.EXIT
        _put(actions[..., start:stop], who, chosen)
        _put(ledger.spent, who, spent + decision.cost)

    def run_layers(self, hidden: Tensor, step: Step, ledger: Ledger, layers: range, keep: list[Tensor] | None = None) -> Tensor:
        """Execute decided actions. Padding goes with the majority: it is never gathered and nobody sees it."""
        actions = ledger.actions[..., layers.start : layers.stop]
        ledger.spent += self.costs.of_actions(actions, layers.start)
        taken = _counts(actions[step.valid])
        for i, layer in enumerate(layers):
            if keep is not None:
                keep.append(hidden)
            if taken[Action.PROCESS][i] == step.real_tokens:
                hidden = self._process_all(layer, hidden, step)
            elif taken[Action.SKIP_FFN][i] == step.real_tokens:
                hidden = self._skip_ffn_all(layer, hidden, step)
            elif taken[Action.PROCESS][i] == taken[Action.SKIP_FFN][i] == 0:
                hidden = self._skip_all(layer, hidden, step, actions[..., i], taken[Action.EXIT][i])
            else:
                hidden = self._mixed(layer, hidden, step, actions[..., i], ledger)
        return hidden

    def attend(self, layer: int, hidden: Tensor, step: Step) -> Tensor:
        """Attention of every token."""
        block = self.stack.blocks[layer]
        queries, keys, values = block.queries_keys_values(hidden, step.rotations[layer])
        if step.cache is not None:
            keys, values = step.cache.update(keys, values, layer)
        return block.add_attention(hidden, queries, keys, values, step.masks[layer])

    def _process_all(self, layer: int, hidden: Tensor, step: Step) -> Tensor:
        return self.stack.blocks[layer].add_feed_forward(hidden, self.attend(layer, hidden, step))

    def _skip_ffn_all(self, layer: int, hidden: Tensor, step: Step) -> Tensor:
        return self._bridged(self.bridges.of_skip_ffn(layer), self.attend(layer, hidden, step))

    def _skip_all(self, layer: int, hidden: Tensor, step: Step, actions: Tensor, exits: int) -> Tensor:
        """Every token skips or exits: only keys and values are due, and our own cache can wait for them."""
        rotation = step.rotations[layer]
        if isinstance(step.cache, AneeCache):
            step.cache.defer(hidden, rotation, layer)
        elif step.cache is not None:
            step.cache.update(*self.stack.blocks[layer].keys_values(hidden, rotation), layer)
        return hidden if exits == step.real_tokens else self._bridge_skipped(layer, hidden, actions == Action.SKIP, exits == 0)

    def _mixed(self, layer: int, hidden: Tensor, step: Step, actions: Tensor, ledger: Ledger) -> Tensor:
        """Tokens with different actions, some of which attend: gathered where that pays, else selected from a dense run."""
        feeds = (actions == Action.PROCESS) & step.valid
        attends = feeds | (actions == Action.SKIP_FFN) & step.valid
        if self._gathering_pays(layer, step.real_tokens, int(attends.sum()), int(feeds.sum()), hidden.device):
            return self._gathered(layer, hidden, step, actions, attends, feeds)
        spared = step.valid & ~feeds
        ledger.ran_anyway = spared.long() if ledger.ran_anyway is None else ledger.ran_anyway + spared
        attended = self.attend(layer, hidden, step)
        processed = self.stack.blocks[layer].add_feed_forward(hidden, attended)
        bridged = self._bridged(self.bridges.of_skip_ffn(layer), attended)
        skipped = self._bridge_skipped(layer, hidden, actions == Action.SKIP, False)
        feeds, attends = (x.to(hidden.device).unsqueeze(-1) for x in (feeds, attends))
        return torch.where(feeds, processed, torch.where(attends, bridged, skipped))

    def _gathered(self, layer: int, hidden: Tensor, step: Step, actions: Tensor, attends: Tensor, feeds: Tensor) -> Tensor:
        """Keys and values of every token; queries and attention of those that attend, feed-forward of those that feed."""
        block = self.stack.blocks[layer]
        subset = Subset.of(attends, hidden.device)
        part, attended = self._attend_some(layer, hidden, step, subset)
        feeding = subset.gather(feeds.to(hidden.device))
        bridged = self._bridged(self.bridges.of_skip_ffn(layer), attended)
        processed = block.add_feed_forward(part[feeding], attended[feeding])
        part = bridged.index_put((feeding,), processed)
        skips = actions == Action.SKIP
        return subset.scatter(self._bridge_skipped(layer, hidden, skips, False) if skips.any() else hidden, part)

    def _attend_some(self, layer: int, hidden: Tensor, step: Step, subset: Subset) -> tuple[Tensor, Tensor]:
        """Attention of a subset: its hidden states [R, n, D] before and after."""
        block, rotation, mask = self.stack.blocks[layer], step.rotations[layer], step.masks[layer]
        keys, values = block.keys_values(hidden, rotation)
        if step.cache is not None:
            keys, values = step.cache.update(keys, values, layer)
        part = subset.gather(hidden)
        rotation = rotation and (subset.gather(rotation[0]), subset.gather(rotation[1]))
        queries = block.queries(part, rotation)
        mask = subset.mask(mask, step, keys.shape[2])
        return part, block.add_attention(part, queries, subset.take_rows(keys), subset.take_rows(values), mask)

    def _bridge_skipped(self, layer: int, hidden: Tensor, skips: Tensor, all_of_them: bool) -> Tensor:
        """Hidden states [B, T, D] with those marked in a mask [B, T] taken over the layer's bridge."""
        bridge = self.bridges.of_skip(layer)
        if bridge is None or all_of_them:
            return self._bridged(bridge, hidden)
        # A bridge is so small that running it for every token is cheaper than gathering.
        return torch.where(skips.to(hidden.device).unsqueeze(-1), bridge(hidden), hidden)

    @staticmethod
    def _bridged(bridge: Bridge | None, hidden: Tensor) -> Tensor:
        return hidden if bridge is None else bridge(hidden)

    def translate(self, hidden: Tensor, actions: Tensor) -> Tensor:
        """Tokens that exited go through the translator of the layer where they did."""
        for layer in map(int, self.bridges.exit):
            leaves = actions[..., layer] == Action.EXIT
            if layer > 0:
                leaves = leaves & (actions[..., layer - 1] != Action.EXIT)
            if leaves.any():
                translated = self.bridges.exit[str(layer)](hidden)
                hidden = torch.where(leaves.to(hidden.device).unsqueeze(-1), translated, hidden)
        return hidden

    def _gathering_pays(self, layer: int, tokens: int, attending: int, feeding: int, device: torch.device) -> bool:
        """Whether leaving tokens out of a layer saves more arithmetic than gathering the others costs."""
        saved = (tokens - attending) * (self._whole[layer] - self._feed_forward[layer])
        saved += (tokens - feeding) * self._feed_forward[layer]
        return saved >= GATHERING_FLOPS.get(device.type, GATHERING_FLOPS["cuda"])


def _counts(actions: Tensor) -> list[list[int]]:
    """How many of N tokens took each action at each of n layers: actions [N, n] -> [actions][n]."""
    return [(actions == action).sum(dim=0).tolist() for action in Action]


def _pick(x: Tensor, who: Tensor | None) -> Tensor:
    """The tokens of x [B, T, ...] marked in a mask [B, T] that lies on the CPU, or all of them, [N, ...]."""
    return x.flatten(0, 1) if who is None else x[who.to(x.device)]


def _put(x: Tensor, who: Tensor | None, part: Tensor) -> None:
    """Write [N, ...] to the tokens of x [B, T, ...] that `_pick` takes."""
    if who is None:
        x.copy_(part.view_as(x))
    else:
        x[who] = part
