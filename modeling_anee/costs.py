"""What an action costs, as a share of the whole model run in full, head included: work, counted once, at hardware's prices."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from .actions import DEFAULT_TABLE, FULL, NONE, PROCESS, Action, ActionTable
from .base_block import Block
from .base_linear import JointLinear
from .bridges import Bridges
from .hardware import Hardware
from .work import NOTHING, Work, norm_work, work_of


@dataclass(frozen=True)
class LayerWork:
    """Work of one layer in one variant, per token: the attention, its keys and values alone, the feed-forward."""

    attention: Work
    keys_values: Work
    feed_forward: Work

    @classmethod
    def of(cls, block: Block) -> "LayerWork":
        """Count the work of a block."""
        own_norms = [norm for norm in block.mlp_norms if norm not in block.attention_norms]
        written, read = Work(kv_bytes=block.kv_bytes), Work(context_bytes=block.kv_bytes)
        return cls(
            attention=map_work([block.qkv, block.output]) + norm_work(block.attention_norms) + written + read,
            keys_values=map_work([block.qkv]).part(block.keys_values_share) + norm_work(block.key_norms) + written,
            feed_forward=(map_work(block.mlp_maps) if block.mlp_maps else work_of([block.mlp])) + norm_work(own_norms),
        )


@dataclass(frozen=True)
class CostTable:
    """Costs of one wrapped base.

    Args:
        layers: cost of each action at each layer, float64 [L, actions], on the CPU; PROCESS of all layers and `head` sum to 1.
        head: cost of the final norm, the head and what projects embeddings, which every token is charged once, with what
            it takes besides.
        total: price of the whole model, by which everything is divided.
        hardware: whose prices these are.
        heads: the same for each variant of the head, in the order of the table's `heads`.
        translator: cost of one call of an exit translator; `layers` has it at the last layer, for actions that leave.
        works: the work of each layer in each variant, which the costs were counted from.
        gone: variants that layers can't run in any more, since weights were dropped.
        gone_heads: the same of the head.
        dtype: of the base; None: not known.
    """

    layers: Tensor
    head: float
    total: float
    hardware: Hardware
    translator: float = 0.0
    heads: tuple[float, ...] = ()
    works: Mapping[str, Sequence[LayerWork]] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()
    gone_heads: frozenset[str] = frozenset()
    dtype: torch.dtype | None = None

    @classmethod
    def measure(
        cls,
        blocks: Mapping[str, Sequence[Block]],
        heads: Mapping[str, Work],
        hardware: Hardware,
        bridges: Bridges | None = None,
        table: ActionTable = DEFAULT_TABLE,
    ) -> "CostTable":
        """Count the work of every layer of a base, and of what stands in for it.

        An exit translator is charged at the last layer, where every token that leaves pays once; all have one rank.

        Args:
            blocks: the layers by variant, the full one among them.
            heads: work that every token needs once, by the variant of the head.
            hardware: what prices it.
            bridges: what stands in, if anything.
            table: the actions.
        """
        counted = {variant: [LayerWork.of(block) for block in own] for variant, own in blocks.items()}
        translator = hardware.price(_optional_work(next(iter(bridges.exit.values()), None) if bridges else None))
        rows = []
        for layer in range(len(blocks[FULL])):
            here = {variant: own[layer] for variant, own in counted.items()}
            rows.append([_price(hardware, _works_of(action, layer, here, bridges)) for action in table])
        rows[-1] = [cost + translator * action.leaves for cost, action in zip(rows[-1], table, strict=True)]
        priced = [hardware.of(variant).price(heads[variant]) + hardware.token for variant in table.heads]
        total = sum(row[PROCESS] for row in rows) + priced[0]
        layers = torch.tensor(rows, dtype=torch.float64, device="cpu")
        shares = tuple(price / total for price in priced)
        return cls(layers / total, shares[0], total, hardware, translator / total, shares, counted)

    @property
    def unit(self) -> str:
        """Unit of the prices."""
        return self.hardware.unit

    def of_plans(self, plans: Tensor, heads: Tensor | None = None) -> Tensor:
        """Cost of a token that takes actions [..., L] and then the head, in full or in variants [...], float64 [...]."""
        return self.of_actions(plans) + (self.head if heads is None else self.of_heads(heads))

    def of_heads(self, heads: Tensor) -> Tensor:
        """Cost of the head in variants [...], float64 [...]."""
        return self._heads[heads.long()]

    def of_actions(self, actions: Tensor, first: int = 0) -> Tensor:
        """Cost of actions [..., n] taken at the n layers from `first` on, without the head, float64 [...]."""
        return torch.take(self.layers, self._rows[first : first + actions.shape[-1]] + actions).sum(dim=-1)

    @cached_property
    def _heads(self) -> Tensor:
        """Costs of the head's variants, float64."""
        return torch.tensor(self.heads or (self.head,), dtype=torch.float64, device="cpu")

    @cached_property
    def _rows(self) -> Tensor:
        """Place of each layer's first entry in the flat table."""
        return torch.arange(len(self.layers), device="cpu") * self.layers.shape[1]

    def of_module(self, module: nn.Module) -> float:
        """Cost of one call of a module of ours (a controller, a bridge)."""
        return self.hardware.price(work_of([module])) / self.total


Works = list[tuple[str, Work]]  # what is run, with the variant that it runs in


def _works_of(action: Action, layer: int, here: Mapping[str, LayerWork], bridges: Bridges | None) -> Works:
    """Work of an action at a layer, for the layer's work in each variant; keys and values are computed in any case."""
    attends, feeds = action.attention != NONE, action.feed_forward != NONE
    attention = here[action.attention].attention if attends else here[action.keys_values].keys_values
    works = [(action.attention if attends else action.keys_values, attention)]
    works += [(action.feed_forward, here[action.feed_forward].feed_forward)] if feeds else []
    return [*works, (FULL, _optional_work(bridges and bridges.stand_in(action, layer)))]


def _price(hardware: Hardware, works: Works) -> float:
    return sum(hardware.of(variant).price(work) for variant, work in works)


def map_work(maps: Iterable[JointLinear]) -> Work:
    """Work of linear maps in their variant: one with weights of its own reads those instead of the base's."""
    total = NOTHING
    for one in maps:
        base = work_of(one.modules)
        read = base.weight_bytes if one.weight_bytes is None else one.weight_bytes
        launches = len(one.modules) if one.runs_modules else 3 if one.extra_flops else 1
        flops = base.flops * one.kept + one.extra_flops
        total += replace(base, flops=flops, weight_bytes=read, launches=float(launches))
    return total


def _optional_work(module: nn.Module | None) -> Work:
    return NOTHING if module is None else work_of([module])
