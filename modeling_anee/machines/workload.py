"""What a plan runs, for one token or many: linear maps by shape and variant, and attention; counted, not priced."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from ..actions import FULL, NONE, Action
from ..base_block import Block
from ..base_model import BaseStack
from ..base_variants import precisions
from ..bridges import Bridge, Bridges
from ..configuration_drafts import draft_table
from ..costs import LayerWork, map_work
from ..work import work_of


@dataclass(frozen=True)
class Kernel:
    """One linear map.

    Args:
        name: which of a layer's it is: `qkv`, `output`, `mlp_0`, ..., `mlp` (a module that runs itself), `head`, `bridge`.
        variant: that it runs in.
        outputs: width.
        inputs: width.
        weight_bytes: that one call reads.
        flops: of one row.
    """

    name: str
    variant: str
    outputs: int
    inputs: int
    weight_bytes: float
    flops: float


@dataclass(frozen=True)
class LayerLoad:
    """What one layer runs.

    Args:
        attention: its maps; none where it is left out.
        feed_forward: the same.
        stand_in: of what is left out.
        kv_bytes: of keys and values of a token; 0 where the attention is left out.
    """

    attention: tuple[Kernel, ...] = ()
    feed_forward: tuple[Kernel, ...] = ()
    stand_in: tuple[Kernel, ...] = ()
    kv_bytes: float = 0.0

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """All of them."""
        return self.attention + self.feed_forward + self.stand_in


@dataclass(frozen=True)
class Workload:
    """What a plan runs.

    Args:
        plan: in short.
        layers: one after the other.
        head: the last map.
        width: of a hidden state.
        attention_width: query heads times their size.
    """

    plan: str
    layers: tuple[LayerLoad, ...]
    head: Kernel
    width: int
    attention_width: int

    @property
    def kernels(self) -> list[Kernel]:
        """All linear maps, the head last."""
        return [kernel for layer in self.layers for kernel in layer.kernels] + [self.head]

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights that one call reads."""
        return math.fsum(kernel.weight_bytes for kernel in self.kernels)


@dataclass
class Counter:
    """Counts what plans of a model run; what a layer runs in an action is counted once.

    Args:
        stack: the base.
        table: the actions.
        bridges: what stands in for what is left out.
    """

    stack: BaseStack
    table: Any
    bridges: Bridges | None = None
    _known: dict[tuple[int, int], LayerLoad] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any) -> "Counter":
        """That of an `AneeForCausalLM`, for its own precisions and those that any base has."""
        table = draft_table(draft_table(model.config.table, model.config.precisions), precisions())
        return cls(model.stack, table, model.bridges)

    def workload(self, plan: str) -> Workload:
        """What a plan in short runs.

        Raises:
            ValueError: it is none of this base.
        """
        actions, head = self.table.plan(plan, len(self.stack.blocks)), self.table.heads[self.table.head_of(plan)]
        block = self.stack.blocks[0]
        return Workload(
            plan=plan,
            layers=tuple(self._layer(number, action) for number, action in enumerate(actions)),
            head=self.head(head),
            width=self.stack.config.hidden_size,
            attention_width=block.heads * block.head_size,
        )

    def head(self, variant: str) -> Kernel:
        """The head in a variant."""
        work = self.stack.head_work(variant)
        return Kernel(
            "head", variant, self.stack.config.vocab_size, self.stack.config.hidden_size, work.weight_bytes, work.flops
        )

    def _layer(self, number: int, place: int) -> LayerLoad:
        if (number, place) not in self._known:
            action = self.table[place]
            bridge = None if self.bridges is None else self.bridges.stand_in(action, number)
            self._known[number, place] = layer_load(self.stack, number, action, bridge)
        return self._known[number, place]


def layer_load(stack: BaseStack, number: int, action: Action, bridge: Bridge | None) -> LayerLoad:
    """What a layer runs under an action."""
    load = LayerLoad()
    if action.attention != NONE:
        block = stack.blocks_of(action.attention)[number]
        load = replace(load, attention=attention_kernels(block, action.attention), kv_bytes=float(block.kv_bytes))
    if action.feed_forward != NONE:
        block = stack.blocks_of(action.feed_forward)[number]
        load = replace(load, feed_forward=feed_forward_kernels(block, action.feed_forward))
    if bridge is not None:
        load = replace(load, stand_in=tuple(_module_kernel("bridge", part) for part in (bridge.down, bridge.up)))
    return load


def attention_kernels(block: Block, variant: str) -> tuple[Kernel, ...]:
    """The maps of a layer's attention in a variant."""
    return tuple(_kernel(name, one, variant) for name, one in block.linear.items() if not name.startswith("mlp"))


def feed_forward_kernels(block: Block, variant: str) -> tuple[Kernel, ...]:
    """The maps of a layer's feed-forward in a variant; one for all where the base's module runs itself."""
    if block.mlp_maps:
        return tuple(_kernel(name, one, variant) for name, one in block.linear.items() if name.startswith("mlp"))
    work, width = LayerWork.of(block).feed_forward, block.output.out_features
    return (Kernel("mlp", FULL, round(work.flops / 2 / width), width, work.weight_bytes, work.flops),)


def _kernel(name: str, linear: Any, variant: str) -> Kernel:
    work = map_work([linear])
    outputs = linear.out_features
    inputs = round(work_of(linear.modules).flops / 2 / outputs)
    return Kernel(name, variant, outputs, inputs, work.weight_bytes, work.flops)


def _module_kernel(name: str, module: Any) -> Kernel:
    work = work_of([module])
    return Kernel(name, FULL, module.out_features, module.in_features, work.weight_bytes, work.flops)
