"""One token alone, through layers whose actions are known: a straight list of closures, made once and called without checks.

Decoding at batch 1 spends as long around the kernels of a small base as in them, so here nothing is decided, reshaped or looked
up twice. Layers that the closures don't know (other norms, biases of attention, parallel branches) run as all others do.

Shapes: D hidden size, H query heads, G key/value heads, E head size, S cached tokens; a hidden state is a row [D].
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .actions import NONE, Action
from .base_block import Block, rms_norm_of_one
from .base_rotary import Rotation, rotate_in_place
from .bridges import Bridge
from .cache import AneeCacheLayer
from .compiled_layer import CompiledAttention, CompiledFeedForward, compiled_attention, compiled_feed_forward


Attended = Callable[[Tensor, Rotation | None, AneeCacheLayer], Tensor]  # the row that enters, its rotation, the layer's cache
Half = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerRun:
    """One layer under an action.

    Args:
        attention: its first half.
        feed_forward: its second half, or what stands in; None: nothing.
    """

    attention: Attended
    feed_forward: Half | None

    @property
    def takes_several(self) -> bool:
        """Whether it also takes rows [T D] of tokens that follow each other."""
        return isinstance(self.attention, CompiledAttention) and isinstance(self.feed_forward, CompiledFeedForward)

    def __call__(self, row: Tensor, rotation: Rotation | None, cache: AneeCacheLayer) -> Tensor:
        """The row that leaves the layer."""
        row = self.attention(row, rotation, cache)
        return row if self.feed_forward is None else self.feed_forward(row)


def layer_run(action: Action, blocks: dict[str, Block], bridge: Bridge | None) -> LayerRun | None:
    """One layer under an action; None where it can't run so.

    Args:
        action: what is done.
        blocks: the layer in every variant.
        bridge: what stands in, if anything does.
    """
    attention = left_out(action) if action.attention == NONE else attention_run(blocks[action.attention])
    feed_forward: Half | None = None if bridge is None else bridge.row
    if action.feed_forward != NONE:
        feed_forward = feed_forward_run(blocks[action.feed_forward])
    if attention is None or (feed_forward is None and action.feed_forward != NONE):
        return None
    return LayerRun(attention, feed_forward)


def left_out(action: Action) -> Attended:
    """The attention is skipped; keys and values are due."""

    def run(row: Tensor, rotation: Rotation | None, cache: AneeCacheLayer) -> Tensor:
        cache.defer(row.view(1, 1, -1), rotation, action.keys_values)
        return row

    return run


def attention_run(block: Block) -> Attended | None:
    """The first half of a layer, None where it is not of the plain kind."""
    if block.plain is None:
        return None
    if compiled := compiled_attention(block):
        return compiled
    norm, project, output = row_norm(block.plain.attention_norm), block.qkv.row, block.output.row
    heads, groups, size, scaling, kept = block.heads, block.kv_heads, block.head_size, block.plain.scaling, block.groups

    def run(row: Tensor, rotation: Rotation | None, cache: AneeCacheLayer) -> Tensor:
        all_heads = project(norm(row)).view(1, 1, -1, size)
        rotate_in_place(all_heads[:, :, : heads + groups], rotation)
        keys, values = cache.append(all_heads[:, :, heads:].transpose(1, 2))
        if kept is not None:
            keys, values = keys[:, kept], values[:, kept]
        queries = all_heads[:, :, :heads].view(1, keys.shape[1], -1, size)
        return output(F.scaled_dot_product_attention(queries, keys, values, scale=scaling).view(-1)).add_(row)

    return run


def feed_forward_run(block: Block) -> Half | None:
    """The second half of a layer, None where it is not of the plain kind."""
    if block.plain is None:
        return None
    if compiled := compiled_feed_forward(block):
        return compiled
    norm, activation = row_norm(block.plain.mlp_norm), block.plain.activation
    gate_up, down = (one.row for one in block.mlp_maps)

    def run(row: Tensor) -> Tensor:
        gate, up = gate_up(norm(row)).chunk(2)
        return down(activation(gate).mul_(up)).add_(row)

    return run


def row_norm(norm: Any) -> Half:
    """Root mean square norm of a row [D] -> a new row."""
    return partial(rms_norm_of_one, weight=norm.weight, epsilon=norm.variance_epsilon)


def is_alone(hidden: Tensor, masks: list[Tensor | None]) -> bool:
    """Whether hidden states [B, T, D] are one token on a CPU that sees all that is cached, in float32, without gradients."""
    return (
        hidden.shape[0] == hidden.shape[1] == 1
        and hidden.is_cpu
        and hidden.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and all(mask is None for mask in masks)
    )
