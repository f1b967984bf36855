"""Layers whose actions are known: who runs together, who is gathered, and what stands in for what is left out.

What an action does is read from its row: tokens are grouped by the variant of their attention and by that of their
feed-forward. A layer where all take one action runs without any gathering.

Shapes: B rows, T new tokens, L layers, D hidden size, S cached tokens.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .actions import FULL, NONE, PROCESS, ActionTable
from .base_block import Block
from .base_model import BaseStack
from .bridges import Bridge, Bridges
from .cache import AneeCache
from .costs import CostTable
from .hardware import gathering_pays
from .ledger import Ledger
from .plan_runner import LayerRun, is_alone, layer_run
from .step import Step, Subset, flat_indices


class LayerRunner:
    """Runs layers of a base as actions say, with bridges for what is left out.

    `dearest`: actions, one a layer, of tokens that nobody decides about; None: PROCESS.

    Raises:
        ValueError: an action asks for a variant that nobody knows.
    """

    def __init__(
        self, stack: BaseStack, bridges: Bridges, costs: CostTable, table: ActionTable, dearest: list[int] | None
    ) -> None:
        self.costs, self.table = costs, table
        self.blocks = {variant: stack.blocks_of(variant) for variant in sorted(table.variants)}
        layers = range(len(stack.blocks))
        self._dearest = [PROCESS] * len(layers) if dearest is None else dearest
        self._bridges = [[bridges.stand_in(action, layer) for action in table] for layer in layers]
        self._runs = {
            (layer, place): layer_run(action, {name: own[layer] for name, own in self.blocks.items()}, bridge)
            for layer in layers
            for place, (action, bridge) in enumerate(zip(table, self._bridges[layer], strict=True))
        }

    def run(self, hidden: Tensor, step: Step, ledger: Ledger, layers: range, keep: list[Tensor] | None = None) -> Tensor:
        """Execute decided actions. Padding goes with the majority: it is never gathered and nobody sees it."""
        if len(layers) == 0:
            return hidden
        actions = ledger.actions[..., layers.start : layers.stop]
        ledger.spent += self.costs.of_actions(actions, layers.start)
        shared = self._shared_actions(actions, step, ledger, layers)
        if keep is None and runs_alone(hidden, step):
            return self.run_alone(layers, hidden, step, shared)
        for layer, only in zip(layers, shared, strict=True):
            if keep is not None:
                keep.append(hidden)
            hidden = self._mixed(layer, hidden, step, ledger) if only is None else self.alike(layer, hidden, step, only)
        return hidden

    def together(self, actions: Sequence[int]) -> list[LayerRun] | None:
        """What runs each layer under an action, also for a few tokens that follow each other; None where one takes a single."""
        runs = [self._runs[layer, action] for layer, action in enumerate(actions)]
        return [run for run in runs if run is not None] if all(run and run.takes_several for run in runs) else None

    def run_alone(self, layers: range, hidden: Tensor, step: Step, actions: Sequence[Any]) -> Tensor:
        """One token's hidden state [1, 1, D] through layers, with an action for each; its cache is ours."""
        row, cache = hidden.view(-1), cast(AneeCache, step.cache)
        with torch.inference_mode():  # a tenth of the time of small kernels goes to what gradients would need
            for layer, action in zip(layers, actions, strict=True):
                run = self._runs[layer, action]
                if run is None:
                    row = self.alike(layer, row.view(1, 1, -1), step, action).view(-1)
                else:
                    row = run(row, step.rotations[layer], cache.layers[layer])
        return row.view(1, 1, -1).clone()  # outside, so that it is an ordinary tensor again

    def _shared_actions(self, actions: Tensor, step: Step, ledger: Ledger, layers: range) -> list[int | None]:
        """For each of n layers the one action that every real token takes, None where they differ; actions [B, T, n]."""
        if not ledger.decided or step.real_tokens == 0:
            return [*self._dearest[layers.start : layers.stop]]
        real = actions.flatten(0, 1) if step.real_tokens == step.valid.numel() else actions[step.valid]  # [N, n]
        first = real[0]
        if len(real) == 1:
            return first.tolist()
        alike = (real == first).all(dim=0).tolist()
        return [action if same else None for action, same in zip(first.tolist(), alike, strict=True)]

    def alike(self, layer: int, hidden: Tensor, step: Step, action: int) -> Tensor:
        """One layer for tokens that all take the same action, [B, T, D] -> [B, T, D]."""
        row = self.table[action]
        if row.attention == NONE:
            attended = hidden
            self._note(layer, hidden, step, row.keys_values)
        else:
            attended = self.attend(layer, hidden, step, row.attention)
        if row.feed_forward != NONE:
            return self.blocks[row.feed_forward][layer].add_feed_forward(hidden, attended)
        return bridged(self._bridges[layer][action], attended)

    def attend(self, layer: int, hidden: Tensor, step: Step, variant: str) -> Tensor:
        """Attention of every token in a variant, [B, T, D] -> [B, T, D]."""
        block = self.blocks[variant][layer]
        queries, keys_values = block.queries_keys_values(hidden, step.rotations[layer])
        keys, values = step.store(keys_values, layer)
        return block.add_attention(hidden, queries, keys, values, step.masks[layer])

    def _note(self, layer: int, hidden: Tensor, step: Step, variant: str) -> None:
        """Nobody attends: only keys and values are due, all in one variant, and our own cache can wait for them."""
        rotation = step.rotations[layer]
        if isinstance(step.cache, AneeCache):
            step.cache.defer(hidden, rotation, layer, variant)
        elif step.cache is not None:
            step.store(self.blocks[variant][layer].keys_values(hidden, rotation), layer)

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
                return attended if alike else torch.where(column(mask, hidden), attended, hidden)
        keys, values = self._keys_values(layer, hidden, step, due)
        attended = hidden
        for variant, mask in attends.items():
            subset = Subset.of(mask, hidden.device)
            part = self._attend_some(self.blocks[variant][layer], hidden, step, subset, layer, keys, values)
            attended = subset.scatter(attended, part)
        return attended

    def _keys_values(self, layer: int, hidden: Tensor, step: Step, due: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of every token so far, [B, G, S, E]: each in its own variant."""
        rotation, keys_values = step.rotations[layer], None
        for variant, mask in due.items():
            more = self.blocks[variant][layer].keys_values(hidden, rotation)
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
                result = torch.where(column(actions == action, result), bridge(attended), result)
        return result

    def _fed(
        self, layer: int, hidden: Tensor, attended: Tensor, result: Tensor, feeds: dict[str, Tensor], dense: bool
    ) -> Tensor:
        """The result [B, T, D] with the feed-forward of those tokens that have one."""
        for variant, mask in feeds.items():
            block = self.blocks[variant][layer]
            if dense:
                result = torch.where(column(mask, hidden), block.add_feed_forward(hidden, attended), result)
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

    def _gathering_pays(
        self, layer: int, tokens: int, attends: dict[str, Tensor], feeds: dict[str, Tensor], device: torch.device
    ) -> bool:
        """Whether leaving tokens out of a layer saves more arithmetic than gathering the others costs."""
        if len(attends) > 1 or len(feeds) > 1:  # a dense run would run every variant for every token
            return True
        attending, feeding = (sum(int(mask.sum()) for mask in group.values()) for group in (attends, feeds))
        work = self.costs.works[FULL][layer]
        saved = (tokens - attending) * work.attention.flops + (tokens - feeding) * work.feed_forward.flops
        return gathering_pays(saved, device, self.costs.hardware.gathering_flops)


def column(mask: Tensor, hidden: Tensor) -> Tensor:
    """A mask [B, T] from the CPU, as [B, T, 1] beside hidden states."""
    return mask.to(hidden.device).unsqueeze(-1)


def bridged(bridge: Bridge | None, hidden: Tensor) -> Tensor:
    """What a bridge makes of hidden states [..., D]; without one, they themselves."""
    return hidden if bridge is None else bridge(hidden)


def runs_alone(hidden: Tensor, step: Step) -> bool:
    """Whether there is one token alone, whose keys and values go into a cache of ours."""
    return isinstance(step.cache, AneeCache) and is_alone(hidden, step.masks)
