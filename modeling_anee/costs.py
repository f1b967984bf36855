"""What an action costs, as a share of the whole model run in full, head included; counted once, from what the variants run.

Two units: `"flops"` (of the linear maps, per token) and `"bytes"` (of weights read, what decoding at batch 1 pays
for). Attention scores are left out of both: they depend on the context length and are saved in the same proportion.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .actions import DEFAULT_TABLE, FULL, NONE, PROCESS, Action, ActionTable
from .blocks import Block
from .bridges import Bridges
from .packed import is_packed, shape, stored_bytes
from .projections import JointLinear


def work(modules: Iterable[nn.Module], unit: str) -> float:
    """FLOPs per token of the linear maps in `modules`, or bytes of all their weights."""
    parts = {id(part): part for module in modules for part in _parts(module)}.values()
    return float(sum(map(_bytes if unit == "bytes" else _flops, parts)))


def _parts(module: nn.Module) -> Iterator[nn.Parameter | nn.Module]:
    """Parameters, and the linear maps whose weights can't be read."""
    if is_packed(module):
        yield module
        return
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    for child in module.children():
        yield from _parts(child)


def _bytes(part: nn.Parameter | nn.Module) -> int:
    return stored_bytes(part) if isinstance(part, nn.Module) else part.numel() * part.element_size()


def _flops(part: nn.Parameter | nn.Module) -> int:
    if isinstance(part, nn.Module):
        return 2 * math.prod(shape(part))
    return 2 * part.numel() if part.dim() > 1 else 0


@dataclass(frozen=True)
class LayerWork:
    """Work of one layer in one variant, per token: the attention, its keys and values alone, the feed-forward."""

    attention: float
    keys_values: float
    feed_forward: float

    @classmethod
    def of(cls, block: Block, unit: str) -> "LayerWork":
        """Count the work of a block."""
        own_norms = [norm for norm in block.mlp_norms if norm not in block.attention_norms]
        return cls(
            attention=_map_work([block.qkv, block.output], unit) + _norm_work(block.attention_norms, unit),
            keys_values=_map_work([block.qkv], unit) * block.keys_values_share + _norm_work(block.key_norms, unit),
            feed_forward=(_map_work(block.mlp_maps, unit) or work([block.mlp], unit)) + _norm_work(own_norms, unit),
        )


@dataclass(frozen=True)
class CostTable:
    """Costs of one wrapped base.

    Args:
        layers: cost of each action at each layer, float64 [L, actions], on the CPU; PROCESS of all layers and `head` sum to 1.
        head: cost of one call of the final norm and the head, which every token is charged once.
        total: work of the whole model in `unit`, by which everything is divided.
        unit: `"flops"` or `"bytes"`.
        translator: cost of one call of an exit translator; `layers` has it at the last layer, for actions that leave.
    """

    layers: Tensor
    head: float
    total: float
    unit: str
    translator: float = 0.0

    @classmethod
    def measure(
        cls,
        blocks: Mapping[str, Sequence[Block]],
        head_modules: list[nn.Module],
        unit: str,
        bridges: Bridges | None = None,
        table: ActionTable = DEFAULT_TABLE,
    ) -> "CostTable":
        """Count the work of every layer of a base, and of what stands in for it.

        An exit translator is charged at the last layer, where every token that leaves pays once; all have one rank.

        Args:
            blocks: the layers by variant, the full one among them.
            head_modules: final norm and head.
            unit: `"flops"` or `"bytes"`.
            bridges: what stands in, if anything.
            table: the actions.
        """
        counted = {variant: [LayerWork.of(block, unit) for block in own] for variant, own in blocks.items()}
        translator = _optional_work(next(iter(bridges.exit.values()), None) if bridges else None, unit)
        rows = []
        for layer in range(len(blocks[FULL])):
            here = {variant: own[layer] for variant, own in counted.items()}
            rows.append([_work_of(action, layer, here, bridges, unit) for action in table])
        rows[-1] = [cost + translator * action.leaves for cost, action in zip(rows[-1], table, strict=True)]
        head = work(head_modules, unit)
        total = sum(row[PROCESS] for row in rows) + head
        layers = torch.tensor(rows, dtype=torch.float64, device="cpu")
        return cls(layers / total, head / total, total, unit, translator / total)

    def of_plans(self, plans: Tensor) -> Tensor:
        """Cost of a token that takes actions [..., L] and then the head, float64 [...]."""
        return self.of_actions(plans) + self.head

    def of_actions(self, actions: Tensor, first: int = 0) -> Tensor:
        """Cost of actions [..., n] taken at the n layers from `first` on, without the head, float64 [...]."""
        return torch.take(self.layers, self._rows[first : first + actions.shape[-1]] + actions).sum(dim=-1)

    @cached_property
    def _rows(self) -> Tensor:
        """Place of each layer's first entry in the flat table."""
        return torch.arange(len(self.layers), device="cpu") * self.layers.shape[1]

    def of_module(self, module: nn.Module) -> float:
        """Cost of one call of a module of ours (a controller, a bridge)."""
        return work([module], self.unit) / self.total


def _work_of(action: Action, layer: int, here: Mapping[str, LayerWork], bridges: Bridges | None, unit: str) -> float:
    """Work of an action at a layer, for the layer's work in each variant; keys and values are computed in any case."""
    attends, feeds = action.attention != NONE, action.feed_forward != NONE
    attention = here[action.attention].attention if attends else here[FULL].keys_values
    feed_forward = here[action.feed_forward].feed_forward if feeds else 0.0
    return attention + feed_forward + _optional_work(bridges and bridges.stand_in(action, layer), unit)


def _map_work(maps: Iterable[JointLinear], unit: str) -> float:
    """Work of linear maps in their variant: one with weights of its own reads those instead of the base's."""
    own = {map_: map_.weight_bytes for map_ in maps}
    read = {map_: size for map_, size in own.items() if unit == "bytes" and size is not None}
    return sum(read.values()) + work((module for map_ in own if map_ not in read for module in map_.modules), unit)


def _optional_work(module: nn.Module | None, unit: str) -> float:
    return 0.0 if module is None else work([module], unit)


def _norm_work(norms: Iterable[nn.Module], unit: str) -> float:
    """Norms are no linear maps, whatever the shape of their weights."""
    return work(norms, unit) if unit == "bytes" else 0.0
