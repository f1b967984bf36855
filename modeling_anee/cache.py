"""KV cache that grows by doubling and writes the keys and values of skipped tokens only when a layer needs them.

Deferred alignment: when every token of a step skips a layer, their hidden states are noted as pending for that
layer. Once a later token needs the layer, the keys and values of all pending tokens are computed in one projection,
so its weights are read once instead of once a token. The result is that of writing at once.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from .actions import FULL
from .base_block import Block
from .base_rotary import Rotation
from .execution_log import ExecutionLog, LoggedCache


MIN_CAPACITY = 64


class GrowingTensor:
    """A tensor [B, G, n, E] that is appended to along n; its storage at least doubles when it is full."""

    def __init__(self) -> None:
        self._storage: Tensor | None = None  # [B, G, capacity, E]

    def append(self, length: int, new: Tensor) -> Tensor:
        """Put `new` [B, G, T, E] after the first `length`; return the first length + T."""
        end, old = length + new.shape[2], self._storage
        if torch.is_grad_enabled() and (new.requires_grad or (old is not None and old.requires_grad)):
            # A later backward needs what was there before: nothing is written over.
            self._storage = new if old is None or length == 0 else torch.cat((old[:, :, :length], new), dim=2)
            return self._storage
        storage = self.room(length, new)
        storage[:, :, length:end] = new
        return storage[:, :, :end]

    def first(self, length: int) -> Tensor | None:
        """The first `length`, None when nothing was ever appended."""
        return None if self._storage is None else self._storage[:, :, :length]

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of rows."""
        if self._storage is not None:
            self._storage = change(self._storage)

    def room(self, length: int, new: Tensor) -> Tensor:
        """The storage [B, G, capacity, E], with room for `new` [B, G, T, E] after the first `length`."""
        old, needed = self._storage, length + new.shape[2]
        capacity = 0 if old is None else old.shape[2]
        # What was made in inference mode can't be written to outside of it, nor what a backward may need.
        frozen = old is not None and (old.requires_grad or (old.is_inference() and not torch.is_inference_mode_enabled()))
        if old is not None and length == 0 and len(old) != len(new):  # emptied, and begun again with other rows
            old, capacity = None, 0
        if old is not None and needed <= capacity and not frozen:
            return old
        if needed > capacity:
            capacity = max(needed, 2 * capacity, MIN_CAPACITY)
        self._storage = new.new_empty((*new.shape[:2], capacity, new.shape[3]))
        if old is not None:
            self._storage[:, :, :length] = old[:, :, :length]
        return self._storage


@dataclass(frozen=True)
class Pending:
    """Tokens that all skipped a layer: hidden states [B, T, D], rotation of their positions, variant of keys and values."""

    hidden: Tensor
    rotation: Rotation | None
    variant: str = FULL

    @property
    def length(self) -> int:
        """Number of tokens T."""
        return self.hidden.shape[1]

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> "Pending":
        """Apply a change of rows; a rotation shared by all rows stays."""
        if self.rotation is None or self.rotation[0].shape[0] == 1:
            return replace(self, hidden=change(self.hidden))
        cos, sin = self.rotation
        return replace(self, hidden=change(self.hidden), rotation=(change(cos), change(sin)))

    def first(self, count: int) -> "Pending":
        """The first `count` tokens."""
        rotation = self.rotation and (self.rotation[0][:, :count], self.rotation[1][:, :count])
        return replace(self, hidden=self.hidden[:, :count], rotation=rotation)

    @staticmethod
    def concatenate(parts: list["Pending"]) -> "Pending":
        """Pending tokens of the same rows and variant, one after the other in time."""
        if len(parts) == 1:
            return parts[0]
        rotations = [part.rotation for part in parts if part.rotation is not None]
        rotation = None
        if rotations:
            rotation = (_cat_in_time([cos for cos, _ in rotations]), _cat_in_time([sin for _, sin in rotations]))
        return Pending(torch.cat([part.hidden for part in parts], dim=1), rotation, parts[0].variant)


def _cat_in_time(parts: list[Tensor]) -> Tensor:
    """Concatenate cos or sin [B or 1, T, 1, R] in time."""
    rows = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(rows, -1, -1, -1) for part in parts], dim=1)


class AneeCacheLayer(CacheLayerMixin):
    """Keys and values [B, G, S, E] of one layer, in one storage [B, 2 G, S, E]: a written part, then pending tokens."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, block: Block) -> None:
        # The parent's __init__ would assign `keys` and `values`, which are computed here.
        self.block = _Shared(block)
        self.reset()

    def __getstate__(self) -> dict[str, Tensor | None]:
        """Keys and values alone: no block, which is the base's."""
        keys, values = self.keys, self.values
        return {"keys": None if keys is None else keys.clone(), "values": None if values is None else values.clone()}

    def __setstate__(self, state: dict[str, Tensor | None]) -> None:
        """Without a block until the cache is bound to a model's."""
        self.block = _Shared(None)
        self.reset()
        keys, values = state["keys"], state["values"]
        if keys is not None and values is not None:
            self._append(torch.cat((keys, values), dim=1))

    def __deepcopy__(self, memo: dict[int, Any]) -> "AneeCacheLayer":
        """A copy that shares the block; not by way of the state: what is pending stays pending."""
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def reset(self) -> None:
        """Forget every token; the storage is released."""
        self._storage = GrowingTensor()  # keys, then values
        self._written = 0
        self._pending: list[Pending] = []
        self._pending_length = 0

    @property
    def is_initialized(self) -> bool:
        """Whether the layer holds tokens."""
        return self.get_seq_length() > 0

    @property
    def keys(self) -> Tensor | None:
        """Keys of every token, [B, G, S, E]."""
        return self._half(0)

    @property
    def values(self) -> Tensor | None:
        """Values of every token, [B, G, S, E]."""
        return self._half(1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the shape of the first keys and values."""
        self._storage.append(0, torch.cat((key_states[:, :, :0], value_states[:, :, :0]), dim=1))

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, G, T, E]; return those of every token."""
        return self.append(torch.cat((key_states, value_states), dim=1))

    def append(self, keys_values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values together [B, 2 G, T, E]; return the keys and the values of every token."""
        if self._pending:
            self._align()
        return self._append(keys_values)

    def room(self, like: Tensor) -> tuple[Tensor, int]:
        """Room for T more tokens of a single row, to be written by the caller: storage [1, 2 G, capacity, E] and new length.

        Args:
            like: keys and values [1, 2 G, T, E], of which the shape and the dtype count.
        """
        if self._pending:
            self._align()
        storage = self._storage.room(self._written, like)
        self._written += like.shape[2]
        return storage, self._written

    def defer(self, hidden: Tensor, rotation: Rotation | None, variant: str = FULL) -> None:
        """Note tokens with hidden states [B, T, D] as pending, for keys and values in a variant."""
        self._pending.append(Pending(hidden, rotation, variant))
        self._pending_length += hidden.shape[1]

    def get_seq_length(self) -> int:
        """Number of tokens held, the pending ones included."""
        return self._written + self._pending_length

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `query_length` new tokens will see."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove} is not allowed: it must be 0 or negative")
        left = max(self.get_seq_length() + tokens_to_remove, 0)
        self._written = min(self._written, left)
        while self.get_seq_length() > left:
            last = self._pending.pop()
            self._pending_length -= last.length
            kept = left - self.get_seq_length()
            if kept > 0:
                part = last.first(kept)
                self.defer(part.hidden, part.rotation, part.variant)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows at `beam_idx`."""
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows at `indices` (positions or a mask)."""
        self._map_rows(lambda x: x[indices])

    def offload(self) -> None:
        """Refused: the storage follows the model."""
        raise NotImplementedError("AneeCache does not offload; use cache_implementation='offloaded' in generate")

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self._storage.map_rows(change)
        self._pending = [part.map_rows(change) for part in self._runs()]

    def _half(self, half: int) -> Tensor | None:
        """Keys (0) or values (1) of every token."""
        self._align()
        both = self._storage.first(self._written)
        return None if both is None else both.chunk(2, dim=1)[half]

    def _align(self) -> None:
        """Write the keys and values of all pending tokens."""
        for part in self._runs():
            block = self.block.value.in_variant(part.variant)
            self._append(block.keys_values(part.hidden, part.rotation))
        self._pending, self._pending_length = [], 0

    def _runs(self) -> list[Pending]:
        """What is pending, tokens of one variant that follow each other put together."""
        return [Pending.concatenate(list(parts)) for _, parts in groupby(self._pending, key=attrgetter("variant"))]

    def _append(self, keys_values: Tensor) -> tuple[Tensor, Tensor]:
        both = self._storage.append(self._written, keys_values)
        self._written += keys_values.shape[2]
        groups = both.shape[1] // 2
        return both[:, :groups], both[:, groups:]


class _Shared:
    """Holds a block of the model; a deep copy of a cache shares it instead of copying the base's weights."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict) -> "_Shared":
        return _Shared(self.value)


class AneeCache(LoggedCache, DynamicCache):
    """Cache of an `AneeForCausalLM`: one `AneeCacheLayer` per decoder layer, and an `ExecutionLog` beside them."""

    layers: list[AneeCacheLayer]  # type: ignore[assignment]

    def __init__(self, blocks: Sequence[Block]) -> None:
        Cache.__init__(self, layers=[AneeCacheLayer(block) for block in blocks])
        self.execution_log = ExecutionLog()

    def bind(self, blocks: Sequence[Block]) -> None:
        """Compute what is pending with these blocks; a cache that was read from a file has none yet."""
        for layer, block in zip(self.layers, blocks, strict=True):
            layer.block.value = block

    def defer(self, hidden: Tensor, rotation: Rotation | None, layer_idx: int, variant: str = FULL) -> None:
        """Note tokens with hidden states [B, T, D] as pending for a layer that all of them skip."""
        self.layers[layer_idx].defer(hidden, rotation, variant)
