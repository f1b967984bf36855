"""The executor: observe, decide and execute, layer by layer, for all tokens of a forward.

Shapes: B rows, T new tokens, L layers, D hidden size, S cached tokens. Decisions and accounts are kept on the CPU:
one device sync per decision, none per layer.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .actions import Action
from .base_model import BaseStack
from .bridges import Bridge, Bridges
from .cache import AneeCache
from .controller import Controller, Observation
from .costs import CostTable
from .step import Step, Subset, flat_indices
from .trace import ExecutionTrace


# Arithmetic that a device does in the time that gathering and scattering a subset takes: on 2 CPU cores a layer of
# SmolLM2-135M (7 MFLOP a token) broke even at 12 to 16 tokens left out; accelerators are limited by kernel launches.
GATHERING_FLOPS = {"cpu": 1e8, "cuda": 2e10}


@dataclass
class Ledger:
    """What is decided and spent in the course of a step; on the CPU.

    Args:
        actions: uint8 [B, T, L]; PROCESS until something else is decided.
        spent: cost of the layers run so far and of deciding, float64 [B, T].
        ran_anyway: skipped layers that were run because gathering would not pay, int64 [B, T], None for none.
        decided: False before the first decision, when everything is still PROCESS.
    """

    actions: Tensor
    spent: Tensor
    ran_anyway: Tensor | None = None
    decided: bool = True


class Executor:
    """Runs the decoder stack of a base under a controller, with bridges for what is left out."""

    def __init__(self, stack: BaseStack, controller: Controller, bridges: Bridges, costs: CostTable) -> None:
        self.stack = stack
        self.controller = controller
        self.bridges = bridges
        self.costs = costs
        flops = stack.measure_costs("flops")
        per_token = flops.layers * flops.stack
        attention = per_token[:, Action.SKIP_FFN]
        self._attention = attention.tolist()  # FLOPs of each layer, per token
        self._feed_forward = (per_token[:, Action.PROCESS] - attention).tolist()
        layers = range(len(stack.blocks))
        self._skip_bridges = [bridges.of_skip(layer) for layer in layers]
        self._ffn_bridges = [bridges.of_skip_ffn(layer) for layer in layers]

    def run(self, hidden: Tensor, step: Step, keep: list[Tensor] | None = None) -> tuple[Tensor, ExecutionTrace]:
        """Hidden states [B, T, D] that enter the first layer -> those that leave the last, and what was done.

        With `keep`, the hidden states that enter each layer are appended to it.
        """
        layers = len(self.stack.blocks)
        ledger = Ledger(
            actions=torch.zeros(*hidden.shape[:2], layers, dtype=torch.uint8, device="cpu"),
            spent=torch.zeros(hidden.shape[:2], dtype=torch.float64, device="cpu"),
            decided=False,
        )
        limited = (step.budget < 1.0) & step.valid & (step.places.index >= self.controller.keep_first)
        segments = self.controller.segments if limited.any() else []
        done, previous = 0, hidden
        for segment, (start, _) in enumerate(segments):
            hidden = self.run_layers(hidden, step, ledger, range(done, start), keep)
            self._decide(segment, hidden, previous, step, limited, ledger)
            done, previous = start, hidden
        hidden = self.run_layers(hidden, step, ledger, range(done, layers), keep)
        if segments:
            hidden = self.translate(hidden, ledger.actions)
        return hidden, ExecutionTrace(
            actions=ledger.actions,
            cost=(ledger.spent * step.valid).float(),
            valid=step.valid,
            stack_share=self.costs.stack_share,
            floor=self.controller.floor,
            unit=self.costs.unit,
            ran_anyway=ledger.ran_anyway,
            account=_account(step, ledger.spent, self.controller.floor) if self.controller.keeps_account else None,
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
        budget, spent, index = (_pick(x, who) for x in (step.budget, ledger.spent, step.places.index))
        logits = partial(self._logits_before, start)
        row = account = None
        if self.controller.keeps_account:
            row = _pick(step.places.sequence, who)
            account = _pick(_account_without(step, asked, self.controller.floor), who)
        decision = self.controller.decide(segment, Observation(hidden, previous, budget, spent, index, logits, row, account))
        chosen, exits = decision.actions, decision.actions == Action.EXIT
        if exits.any():
            exited = exits.cumsum(dim=-1) > 0
            chosen = chosen.masked_fill(exited, Action.EXIT)
            leaves = asked.clone()
            leaves[asked] = exited[:, -1]
            actions[..., stop:][leaves] = Action.EXIT
        _put(actions[..., start:stop], who, chosen)
        _put(ledger.spent, who, spent + decision.cost)
        ledger.decided = True

    def _logits_before(self, layer: int, hidden: Tensor) -> Tensor:
        """Logits [n, V] of hidden states [n, D] as if they left before a layer."""
        return self.stack.logits(_bridged(self.bridges.of_exit(layer), hidden))

    def run_layers(self, hidden: Tensor, step: Step, ledger: Ledger, layers: range, keep: list[Tensor] | None = None) -> Tensor:
        """Execute decided actions. Padding goes with the majority: it is never gathered and nobody sees it."""
        if len(layers) == 0:
            return hidden
        actions = ledger.actions[..., layers.start : layers.stop]
        ledger.spent += self.costs.of_actions(actions, layers.start)
        everything = [step.real_tokens if action is Action.PROCESS else 0 for action in Action]
        counts = _counts(actions, step.valid) if ledger.decided else [everything] * len(layers)
        for layer, taken in zip(layers, counts, strict=True):
            if keep is not None:
                keep.append(hidden)
            attending = taken[Action.PROCESS] + taken[Action.SKIP_FFN]
            if taken[Action.PROCESS] == step.real_tokens:
                hidden = self.stack.blocks[layer].add_feed_forward(hidden, self.attend(layer, hidden, step))
            elif taken[Action.SKIP_FFN] == step.real_tokens:
                hidden = _bridged(self._ffn_bridges[layer], self.attend(layer, hidden, step))
            elif attending == 0:
                self._note(layer, hidden, step)
                hidden = self._skip(layer, hidden, step, ledger, taken[Action.SKIP])
            else:
                hidden = self._mixed(layer, hidden, step, ledger, taken)
        return hidden

    def attend(self, layer: int, hidden: Tensor, step: Step) -> Tensor:
        """Attention of every token, [B, T, D] -> [B, T, D]."""
        block = self.stack.blocks[layer]
        queries, keys, values = block.queries_keys_values(hidden, step.rotations[layer])
        if step.cache is not None:
            keys, values = step.cache.update(keys, values, layer)
        return block.add_attention(hidden, queries, keys, values, step.masks[layer])

    def _attend_some(self, layer: int, hidden: Tensor, step: Step, subset: Subset) -> tuple[Tensor, Tensor]:
        """Keys and values of every token, attention of a subset: what enters the layer and what leaves attention, [N, D]."""
        block, rotation = self.stack.blocks[layer], step.rotations[layer]
        keys, values = block.keys_values(hidden, rotation)
        if step.cache is not None:
            keys, values = step.cache.update(keys, values, layer)
        part = subset.gather(hidden)
        rotation = rotation and (subset.gather(rotation[0]), subset.gather(rotation[1]))
        queries = block.queries(part, rotation)
        mask = subset.mask(step.masks[layer], step, keys.shape[2])
        attended = block.add_attention(part, queries, subset.take_rows(keys), subset.take_rows(values), mask)
        return subset.flat(part), subset.flat(attended)

    def _feed_some(self, layer: int, hidden: Tensor, attended: Tensor, feeds: Tensor) -> Tensor:
        """Feed-forward of the tokens in a mask [N] that lies on the CPU, the bridge for the others, [N, D] -> [N, D]."""
        bridged = _bridged(self._ffn_bridges[layer], attended)
        index = flat_indices(feeds).to(hidden.device)
        if len(index) == 0:
            return bridged
        return bridged.index_copy(0, index, self.stack.blocks[layer].add_feed_forward(hidden[index], attended[index]))

    def _note(self, layer: int, hidden: Tensor, step: Step) -> None:
        """Nobody attends: only keys and values are due, and our own cache can wait for them."""
        rotation = step.rotations[layer]
        if isinstance(step.cache, AneeCache):
            step.cache.defer(hidden, rotation, layer)
        elif step.cache is not None:
            step.cache.update(*self.stack.blocks[layer].keys_values(hidden, rotation), layer)

    def _skip(self, layer: int, hidden: Tensor, step: Step, ledger: Ledger, skipping: int) -> Tensor:
        """Hidden states [B, T, D], those of tokens that skip taken over the layer's bridge."""
        bridge = self._skip_bridges[layer]
        if bridge is None or skipping == 0:
            return hidden
        if skipping == step.real_tokens:
            return bridge(hidden)
        # A bridge is so small that running it for every token is cheaper than gathering.
        skips = ledger.actions[..., layer] == Action.SKIP
        return torch.where(_column(skips, hidden), bridge(hidden), hidden)

    def _mixed(self, layer: int, hidden: Tensor, step: Step, ledger: Ledger, taken: list[int]) -> Tensor:
        """Tokens with different actions, some of which attend: gathered where that pays, else selected from a dense run."""
        actions, feeding = ledger.actions[..., layer], taken[Action.PROCESS]
        feeds = attends = (actions == Action.PROCESS) & step.valid
        if taken[Action.SKIP_FFN]:
            attends = feeds | (actions == Action.SKIP_FFN) & step.valid
        skipped = self._skip(layer, hidden, step, ledger, taken[Action.SKIP])
        attending = feeding + taken[Action.SKIP_FFN]
        if self._gathering_pays(layer, step.real_tokens, attending, feeding, hidden.device):
            return self._gathered(layer, hidden, skipped, step, attends, feeds)
        ran_anyway = step.valid & ~(feeds if feeding else attends)
        ledger.ran_anyway = ran_anyway.long() if ledger.ran_anyway is None else ledger.ran_anyway + ran_anyway
        attended = self.attend(layer, hidden, step)
        result = skipped
        if attending > feeding:
            result = torch.where(_column(attends, hidden), _bridged(self._ffn_bridges[layer], attended), result)
        if feeding:
            result = torch.where(_column(feeds, hidden), self.stack.blocks[layer].add_feed_forward(hidden, attended), result)
        return result

    def _gathered(self, layer: int, hidden: Tensor, skipped: Tensor, step: Step, attends: Tensor, feeds: Tensor) -> Tensor:
        """Only what is due: attention of the tokens in one mask [B, T], feed-forward of those in the other."""
        if int(attends.sum()) == step.real_tokens:  # queries, keys and values in one kernel
            attended = self.attend(layer, hidden, step)
            return self._feed_some(layer, hidden.flatten(0, 1), attended.flatten(0, 1), feeds.flatten()).view_as(hidden)
        subset = Subset.of(attends, hidden.device)
        part, attended = self._attend_some(layer, hidden, step, subset)
        if feeds is attends:
            return subset.scatter(skipped, self.stack.blocks[layer].add_feed_forward(part, attended))
        return subset.scatter(skipped, self._feed_some(layer, part, attended, feeds[attends]))

    def translate(self, hidden: Tensor, actions: Tensor) -> Tensor:
        """Tokens that exited go through the translator of the layer where they did."""
        if not len(self.bridges.exit):
            return hidden
        exits = actions == Action.EXIT
        first = torch.where(exits[..., -1], exits.int().argmax(dim=-1), -1)
        for layer in first.unique().tolist():
            translator = self.bridges.of_exit(layer)
            if translator is not None:
                hidden = torch.where(_column(first == layer, hidden), translator(hidden), hidden)
        return hidden

    def _gathering_pays(self, layer: int, tokens: int, attending: int, feeding: int, device: torch.device) -> bool:
        """Whether leaving tokens out of a layer saves more arithmetic than gathering the others costs."""
        saved = (tokens - attending) * self._attention[layer] + (tokens - feeding) * self._feed_forward[layer]
        return saved >= GATHERING_FLOPS.get(device.type, GATHERING_FLOPS["cuda"])


def _account(step: Step, spent: Tensor, floor: float) -> Tensor:
    """What every sequence has spent above its budgets, or the floor, up to and with each token, float64 [B, T]."""
    return step.account + step.places.running_sum((spent - step.budget.clamp(min=floor)) * step.valid)


def _account_without(step: Step, asked: Tensor, floor: float) -> Tensor:
    """The same before each token, the tokens in a mask [B, T] left out; all others are processed in full."""
    above = (1.0 - step.budget.clamp(min=floor)) * (step.valid & ~asked)
    return step.account + step.places.running_sum(above) - above


def _counts(actions: Tensor, valid: Tensor) -> list[list[int]]:
    """How many valid tokens took each action: actions [B, T, n], valid [B, T] -> [n][actions]."""
    taken = actions.unsqueeze(-1) == torch.arange(len(Action), dtype=torch.uint8, device="cpu")
    return (taken & valid[..., None, None]).flatten(0, 1).sum(dim=0).tolist()


def _column(mask: Tensor, hidden: Tensor) -> Tensor:
    """A mask [B, T] from the CPU, as [B, T, 1] beside hidden states."""
    return mask.to(hidden.device).unsqueeze(-1)


def _bridged(bridge: Bridge | None, hidden: Tensor) -> Tensor:
    return hidden if bridge is None else bridge(hidden)


def _pick(x: Tensor, who: Tensor | None) -> Tensor:
    """The tokens of x [B, T, ...] marked in a mask [B, T] that lies on the CPU, or all of them, [N, ...]."""
    return x.flatten(0, 1) if who is None else x[who.to(x.device)]


def _put(x: Tensor, who: Tensor | None, part: Tensor) -> None:
    """Write [N, ...] to the tokens of x [B, T, ...] that `_pick` takes."""
    if who is None:
        x.copy_(part.view_as(x))
    else:
        x[who] = part
