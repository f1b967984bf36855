"""The executor: observe, decide and execute, layer by layer, for all tokens of a forward.

What an action does is read from its row: tokens are grouped by the variant of their attention and by that of their
feed-forward. A layer where all take one action runs without any gathering.

Shapes: B rows, T new tokens, L layers, D hidden size, S cached tokens. Decisions and accounts are kept on the CPU:
one device sync per decision, none per layer.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .actions import FULL, NONE, PROCESS, ActionTable
from .base_block import Block
from .base_model import BaseStack
from .bridges import Bridge, Bridges
from .budget import account_after, account_without
from .cache import AneeCache
from .controller import Controller, Observation
from .controller_gated import GatedController
from .costs import CostTable
from .gate_account import account_before
from .gated_runner import GatedRunner
from .hardware import gathering_pays
from .ledger import Ledger
from .plan_runner import is_alone, layer_run
from .step import Step, Subset, flat_indices
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
        self._blocks = {variant: stack.blocks_of(variant) for variant in sorted(table.variants)}
        layers = range(len(stack.blocks))
        self._bridges = [[bridges.stand_in(action, layer) for action in table] for layer in layers]
        self._runs = {
            (layer, place): layer_run(action, {name: own[layer] for name, own in self._blocks.items()}, bridge)
            for layer in layers
            for place, (action, bridge) in enumerate(zip(table, self._bridges[layer], strict=True))
        }
        self._gated: GatedRunner | None = None
        if isinstance(controller, GatedController):
            self._gated = GatedRunner(controller, self._blocks, bridges)

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
        ledger = Ledger.begin((*hidden.shape[:2], layers), self.costs, self.controller, given)
        entered = hidden
        if given is not None:
            hidden = self.run_layers(hidden, step, ledger, range(layers), keep)
        elif self._gated is not None and keep is None and self._is_alone(hidden, step) and self._gated.takes(step):
            hidden = self._gated.run(hidden, step, ledger, self._alike)
        else:
            hidden = self._decide_and_run(hidden, step, ledger, keep)
        if ledger.decided:
            hidden = self.translate(hidden, ledger.actions)
            if step.real_tokens < step.valid.numel():  # what padding went through depends on the others in the batch
                hidden = torch.where(_column(step.valid, hidden), hidden, entered)
        return hidden, ExecutionTrace(
            actions=ledger.actions,
            cost=(ledger.spent * step.valid).float(),
            valid=step.valid,
            floor=self.controller.floor,
            unit=self.costs.unit,
            ran_anyway=ledger.ran_anyway,
            account=self._account_after(step, ledger),
            table=self.table,
            head=ledger.head,
            cheapest=self.controller.cheapest,
        )

    def _account_after(self, step: Step, ledger: Ledger) -> Tensor | None:
        """What later tokens must know of these, for kinds that keep an account."""
        if self.controller.keeps_account:
            return account_after(step, ledger.spent, self.controller.floor)
        if ledger.account is None and isinstance(self.controller, GatedController) and self.controller.counts_runs:
            return self.controller.account(step, ledger.actions)
        return ledger.account

    def _decide_and_run(self, hidden: Tensor, step: Step, ledger: Ledger, keep: list[Tensor] | None) -> Tensor:
        """All layers, each after the decisions that it waits for, [B, T, D] -> [B, T, D]."""
        limited = (step.budget < 1.0) & step.valid
        if not self._has_variants:  # kept tokens could only be told to run in full
            limited &= step.places.index >= self.controller.keep_first
        done, previous = 0, hidden
        for segment, (start, _) in enumerate(self.controller.segments):
            if not limited.any():  # nobody has a limit, or all are settled
                break
            hidden = self.run_layers(hidden, step, ledger, range(done, start), keep)
            self._decide(segment, hidden, previous, step, limited, ledger)
            done, previous = start, hidden
        return self.run_layers(hidden, step, ledger, range(done, len(self.stack.blocks)), keep)

    @staticmethod
    def _is_alone(hidden: Tensor, step: Step) -> bool:
        """Whether there is one token alone, whose keys and values go into a cache of ours."""
        return isinstance(step.cache, AneeCache) and is_alone(hidden, step.masks)

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
        row = account = None
        if looks and self.controller.keeps_account:
            row = _pick(step.places.sequence, who)
            cost = ledger.spent + self.costs.of_actions(actions[..., start:], start)
            account = _pick(account_without(step, asked, cost, self.controller.floor), who)
        elif looks and self.controller.counts_runs:
            row, account = _pick(step.places.sequence, who), _pick(account_before(step, start), who)
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
        return self.stack.logits(_bridged(self.bridges.of_exit(layer), hidden))

    def run_layers(self, hidden: Tensor, step: Step, ledger: Ledger, layers: range, keep: list[Tensor] | None = None) -> Tensor:
        """Execute decided actions. Padding goes with the majority: it is never gathered and nobody sees it."""
        if len(layers) == 0:
            return hidden
        actions = ledger.actions[..., layers.start : layers.stop]
        ledger.spent += self.costs.of_actions(actions, layers.start)
        shared = self._shared_actions(actions, step, ledger, layers)
        if keep is None and self._is_alone(hidden, step):
            return self._run_alone(layers, hidden, step, step.cache, shared)
        for layer, only in zip(layers, shared, strict=True):
            if keep is not None:
                keep.append(hidden)
            hidden = self._mixed(layer, hidden, step, ledger) if only is None else self._alike(layer, hidden, step, only)
        return hidden

    def _run_alone(self, layers: range, hidden: Tensor, step: Step, cache: Any, actions: list[Any]) -> Tensor:
        """One token's hidden state [1, 1, D] through layers, with an action for each."""
        row = hidden.view(-1)
        with torch.inference_mode():  # a tenth of the time of small kernels goes to what gradients would need
            for layer, action in zip(layers, actions, strict=True):
                run = self._runs[layer, action]
                if run is None:
                    row = self._alike(layer, row.view(1, 1, -1), step, action).view(-1)
                else:
                    row = run(row, step.rotations[layer], cache.layers[layer])
        return row.view(1, 1, -1).clone()  # outside, so that it is an ordinary tensor again

    def _shared_actions(self, actions: Tensor, step: Step, ledger: Ledger, layers: range) -> list[int | None]:
        """For each of n layers the one action that every real token takes, None where they differ; actions [B, T, n]."""
        if not ledger.decided or step.real_tokens == 0:
            dearest = self.controller.dearest
            return [PROCESS] * len(layers) if dearest is None else list(dearest[0][layers.start : layers.stop])
        real = actions.flatten(0, 1) if step.real_tokens == step.valid.numel() else actions[step.valid]  # [N, n]
        first = real[0]
        if len(real) == 1:
            return first.tolist()
        alike = (real == first).all(dim=0).tolist()
        return [action if same else None for action, same in zip(first.tolist(), alike, strict=True)]

    def _alike(self, layer: int, hidden: Tensor, step: Step, action: int) -> Tensor:
        """One layer for tokens that all take the same action, [B, T, D] -> [B, T, D]."""
        row = self.table[action]
        if row.attention == NONE:
            attended = hidden
            self._note(layer, hidden, step, row.keys_values)
        else:
            attended = self.attend(layer, hidden, step, row.attention)
        if row.feed_forward != NONE:
            return self._blocks[row.feed_forward][layer].add_feed_forward(hidden, attended)
        return _bridged(self._bridges[layer][action], attended)

    def attend(self, layer: int, hidden: Tensor, step: Step, variant: str) -> Tensor:
        """Attention of every token in a variant, [B, T, D] -> [B, T, D]."""
        block = self._blocks[variant][layer]
        queries, keys_values = block.queries_keys_values(hidden, step.rotations[layer])
        keys, values = step.store(keys_values, layer)
        return block.add_attention(hidden, queries, keys, values, step.masks[layer])

    def _note(self, layer: int, hidden: Tensor, step: Step, variant: str) -> None:
        """Nobody attends: only keys and values are due, all in one variant, and our own cache can wait for them."""
        rotation = step.rotations[layer]
        if isinstance(step.cache, AneeCache):
            step.cache.defer(hidden, rotation, layer, variant)
        elif step.cache is not None:
            step.store(self._blocks[variant][layer].keys_values(hidden, rotation), layer)

    def _mixed(self, layer: int, hidden: Tensor, step: Step, ledger: Ledger) -> Tensor:
        """One layer for tokens with different actions: gathered where that pays, else selected from a dense run."""
        actions = ledger.actions[..., layer]
        attends, feeds = self._groups(actions, step, "attention"), self._groups(actions, step, "feed_forward")
        if attends or feeds:
            dense = not self._gathering_pays(layer, step.real_tokens, attends, feeds, hidden.device)
            if dense:
                self._note_ran_anyway(step, ledger, attends, feeds)
        else:
            dense = True
        attended = self._attended(layer, hidden, step, actions, dense)
        result = self._stood_in(layer, attended, actions)
        return self._fed(layer, hidden, attended, result, feeds, dense)

    def _groups(self, actions: Tensor, step: Step, sublayer: str) -> dict[str, Tensor]:
        """The tokens [B, T] of each variant that a sublayer runs in."""
        by_variant: dict[str, list[int]] = {}
        for action in actions[step.valid].unique().tolist():
            variant = getattr(self.table[action], sublayer)
            if variant != NONE:
                by_variant.setdefault(variant, []).append(action)
        masks = {name: torch.isin(actions, actions.new_tensor(taken)) for name, taken in by_variant.items()}
        return {variant: mask & step.valid for variant, mask in masks.items()}

    def _attended(self, layer: int, hidden: Tensor, step: Step, actions: Tensor, dense: bool) -> Tensor:
        """Hidden states [B, T, D] after the attention of those tokens that have one; keys and values of every token."""
        attends, due = self._groups(actions, step, "attention"), self._groups(actions, step, "keys_values")
        if len(due) == 1:
            variant, everyone = next(iter(due.items()))
            if not attends:
                self._note(layer, hidden, step, variant)
                return hidden
            mask = attends.get(variant)
            alike = mask is not None and torch.equal(mask, everyone)
            if mask is not None and (alike or dense):  # queries, keys and values in one kernel
                attended = self.attend(layer, hidden, step, variant)
                return attended if alike else torch.where(_column(mask, hidden), attended, hidden)
        keys, values = self._keys_values(layer, hidden, step, due)
        attended = hidden
        for variant, mask in attends.items():
            subset = Subset.of(mask, hidden.device)
            part = self._attend_some(self._blocks[variant][layer], hidden, step, subset, layer, keys, values)
            attended = subset.scatter(attended, part)
        return attended

    def _keys_values(self, layer: int, hidden: Tensor, step: Step, due: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of every token so far, [B, G, S, E]: each in its own variant."""
        rotation, keys_values = step.rotations[layer], None
        for variant, mask in due.items():
            more = self._blocks[variant][layer].keys_values(hidden, rotation)
            own = mask.to(hidden.device)[:, None, :, None]
            keys_values = more if keys_values is None else torch.where(own, more, keys_values)
        assert keys_values is not None
        return step.store(keys_values, layer)

    @staticmethod
    def _attend_some(
        block: Block, hidden: Tensor, step: Step, subset: Subset, layer: int, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Attention of a subset, [N, D]."""
        part, rotation = subset.gather(hidden), step.rotations[layer]
        rotation = rotation and (subset.gather(rotation[0]), subset.gather(rotation[1]))
        mask = subset.mask(step.masks[layer], step, keys.shape[2])
        queries = block.queries(part, rotation)
        return subset.flat(block.add_attention(part, queries, subset.take_rows(keys), subset.take_rows(values), mask))

    def _stood_in(self, layer: int, attended: Tensor, actions: Tensor) -> Tensor:
        """Hidden states [B, T, D] with bridges where a feed-forward, or all of the layer, was left out.

        A bridge is so small that running it for every token is cheaper than gathering.
        """
        result = attended
        for action in actions.unique().tolist():
            bridge = self._bridges[layer][action]
            if bridge is not None:
                result = torch.where(_column(actions == action, result), bridge(attended), result)
        return result

    def _fed(
        self, layer: int, hidden: Tensor, attended: Tensor, result: Tensor, feeds: dict[str, Tensor], dense: bool
    ) -> Tensor:
        """The result [B, T, D] with the feed-forward of those tokens that have one."""
        for variant, mask in feeds.items():
            block = self._blocks[variant][layer]
            if dense:
                result = torch.where(_column(mask, hidden), block.add_feed_forward(hidden, attended), result)
                continue
            index = flat_indices(mask).to(hidden.device)
            entering, middle = hidden.flatten(0, 1), attended.flatten(0, 1)
            fed = block.add_feed_forward(entering[index], middle[index])
            result = result.flatten(0, 1).index_copy(0, index, fed).view_as(hidden)
        return result

    @staticmethod
    def _note_ran_anyway(step: Step, ledger: Ledger, attends: dict[str, Tensor], feeds: dict[str, Tensor]) -> None:
        """Tokens for which a dense run does what their action leaves out."""
        due = next(iter((feeds or attends).values()))
        ran_anyway = (step.valid & ~due).long()
        ledger.ran_anyway = ran_anyway if ledger.ran_anyway is None else ledger.ran_anyway + ran_anyway

    def translate(self, hidden: Tensor, actions: Tensor) -> Tensor:
        """Tokens that left go through the translator of the layer where they did."""
        if not len(self.bridges.exit):
            return hidden
        leaves = self.table.leaving[actions.long()]
        first = torch.where(leaves[..., -1], leaves.int().argmax(dim=-1), -1)
        for layer in first.unique().tolist():
            translator = self.bridges.of_exit(layer)
            if translator is not None:
                hidden = torch.where(_column(first == layer, hidden), translator(hidden), hidden)
        return hidden

    def _gathering_pays(
        self, layer: int, tokens: int, attends: dict[str, Tensor], feeds: dict[str, Tensor], device: torch.device
    ) -> bool:
        """Whether leaving tokens out of a layer saves more arithmetic than gathering the others costs."""
        if len(attends) > 1 or len(feeds) > 1:  # a dense run would run every variant for every token
            return True
        attending, feeding = (sum(int(mask.sum()) for mask in group.values()) for group in (attends, feeds))
        work = self.costs.works[FULL][layer]
        saved = (tokens - attending) * work.attention.flops + (tokens - feeding) * work.feed_forward.flops
        return gathering_pays(saved, device)


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
