"""The two halves of a layer for one token alone, or for a few that follow each other, each one call of a compiled kernel.

Norm, projections, rotation, keys and values, attention and residual run without coming back to Python. What the kernel doesn't
know (maps in torch's kernels, other activations) runs as in `plan_runner.py`.

Shapes: D hidden size, G key/value heads, E head size; a hidden state is a row [D], those of T tokens one after the other [T D].
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from .base_block import Block, PlainParts
from .base_compiled import CompiledLinear
from .base_linear import JointLinear
from .base_rotary import Rotation
from .base_watch import is_untouched
from .cache import AneeCacheLayer
from .compiled import GELU_TANH, MOST_RANK, SILU, Attention, FeedForward, Map, kernels, library
from .compiled_float import FloatLinear
from .corrections import CorrectedLinear


ACTIVATIONS = {"SiLU": SILU, "SiLUActivation": SILU, "PytorchGELUTanh": GELU_TANH, "GELUTanh": GELU_TANH}
NO_MEMORY = "there is no memory for the activations of a token"


class CompiledAttention:
    """The first half of a layer: rows, their rotation, the layer's cache -> rows."""

    def __init__(self, block: Block, plain: PlainParts, maps: list[Map]) -> None:
        norm = plain.attention_norm
        groups = torch.arange(block.kv_heads, device="cpu") if block.groups is None else block.groups
        group = groups.repeat_interleave(block.heads // len(groups))  # of each head
        self._half = Attention(
            qkv=maps[0],
            output=maps[1],
            norm=norm.weight.data_ptr(),
            heads=block.heads,
            groups=block.kv_heads,
            size=block.head_size,
            epsilon=norm.variance_epsilon,
            scaling=plain.scaling,
            group=group.data_ptr(),
        )
        self._like = torch.empty(1, 2 * block.kv_heads, 1, block.head_size, device="cpu", dtype=torch.float32)
        self._kernel, self._address, self._width = kernels().anee_attend, ctypes.addressof(self._half), norm.weight.numel()
        self._kept = maps, norm, group  # whose numbers the half points to

    def __call__(self, row: Tensor, rotation: Rotation | None, cache: AneeCacheLayer) -> Tensor:
        """Rows after attention; their keys and values go into the cache."""
        out = torch.empty_like(row)
        tokens = row.numel() // self._width
        storage, length = cache.room(self._like if tokens == 1 else self._like.expand(-1, -1, tokens, -1))
        turned = (None, None, 0) if rotation is None else _pointers(*rotation)
        place = storage.data_ptr(), storage.shape[2], length, out.data_ptr(), tokens
        if self._kernel(self._address, row.data_ptr(), *turned, *place, torch.get_num_threads()):
            raise MemoryError(NO_MEMORY)
        return out


class CompiledFeedForward:
    """The second half of a layer: rows -> rows."""

    def __init__(self, plain: PlainParts, maps: list[Map], activation: int) -> None:
        norm = plain.mlp_norm
        self._half = FeedForward(
            gate_up=maps[0],
            down=maps[1],
            norm=norm.weight.data_ptr(),
            activation=activation,
            epsilon=norm.variance_epsilon,
        )
        self._kernel, self._address, self._width = kernels().anee_feed, ctypes.addressof(self._half), norm.weight.numel()
        self._kept = maps, norm  # whose numbers the half points to

    def __call__(self, row: Tensor) -> Tensor:
        """Rows after the feed-forward."""
        out = torch.empty_like(row)
        tokens = row.numel() // self._width
        if self._kernel(self._address, row.data_ptr(), out.data_ptr(), tokens, torch.get_num_threads()):
            raise MemoryError(NO_MEMORY)
        return out


def compiled_attention(block: Block) -> CompiledAttention | None:
    """The first half of a layer, None where the kernel doesn't know it."""
    maps = None if block.plain is None else maps_of(block.qkv, block.output)
    return None if block.plain is None or maps is None else CompiledAttention(block, block.plain, maps)


def compiled_feed_forward(block: Block) -> CompiledFeedForward | None:
    """The second half of a layer, None where the kernel doesn't know it."""
    kind = None if block.plain is None else activation_kind(block.plain.activation)
    maps = None if kind is None else maps_of(*block.mlp_maps)
    return None if block.plain is None or kind is None or maps is None else CompiledFeedForward(block.plain, maps, kind)


def activation_kind(activation: nn.Module) -> int | None:
    """The kernel's number for an activation, None for one that it doesn't know."""
    return ACTIVATIONS.get(type(activation).__name__) if is_untouched(activation) else None


def maps_of(*joined: JointLinear) -> list[Map] | None:
    """What the kernel has to know about linear maps, None where it can't run one of them."""
    if library() is None:
        return None
    maps = [map_of(one.maps[0]) if one.maps else None for one in joined]
    return None if any(one is None for one in maps) else maps  # type: ignore[return-value]


def map_of(linear: Any) -> Map | None:
    """What the kernel has to know about a linear map; it keeps the tensors that its pointers are of."""
    if isinstance(linear, CorrectedLinear):
        return _corrected(linear)
    return _copy(linear.map, linear) if isinstance(linear, CompiledLinear | FloatLinear) else None


def _corrected(linear: CorrectedLinear) -> Map | None:
    inner = map_of(linear.rounded)
    rank = len(linear.directions)
    if inner is None or rank > MOST_RANK:
        return None
    directions, lost = linear.directions.float().contiguous(), linear.lost.contiguous()  # [rank, in], [rank, out]
    inner.rank, inner.directions, inner.lost = rank, directions.data_ptr(), lost.data_ptr()
    return _copy(inner, (linear, directions, lost))


def _copy(found: Map, keep: Any) -> Map:
    """A copy that keeps what it points to alive."""
    made = Map.from_buffer_copy(found)
    made.kept = keep
    return made


def _pointers(cosine: Tensor, sine: Tensor) -> tuple[int, int, int]:
    """Cos and sin [1, T, 1, R], and R."""
    assert cosine.is_contiguous() and sine.is_contiguous() and cosine.dtype == sine.dtype == torch.float32
    return cosine.data_ptr(), sine.data_ptr(), cosine.shape[-1]
