"""KV cache that grows by doubling and writes the keys and values of skipped tokens only when a layer needs them.

Deferred alignment: when every token of a step skips a layer, their hidden states are noted as pending for that
layer. Once a later token needs the layer, the keys and values of all pending tokens are computed in one projection,
so its weights are read once instead of once a token. The result is that of writing at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from .blocks import Block
from .execution_log import ExecutionLog
from .rotary import Rotation


MIN_CAPACITY = 64


@dataclass(frozen=True)
class Pending:
    """Tokens that all skipped a layer: hidden states [B, T, D] and the rotation of their positions."""

    hidden: Tensor
    rotation: Rotation | None

    @property
    def length(self) -> int:
        """Number of tokens T."""
        return self.hidden.shape[1]

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> "Pending":
        """Apply a change of rows; a rotation shared by all rows stays."""
        if self.rotation is None or self.rotation[0].shape[0] == 1:
            return Pending(change(self.hidden), self.rotation)
        cos, sin = self.rotation
        return Pending(change(self.hidden), (change(cos), change(sin)))

    def first(self, count: int) -> "Pending":
        """The first `count` tokens."""
        rotation = self.rotation and (self.rotation[0][:, :count], self.rotation[1][:, :count])
        return Pending(self.hidden[:, :count], rotation)


class AneeCacheLayer(CacheLayerMixin):
    """Keys and values [B, G, S, E] of one layer: a written part, then pending tokens."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, block: Block) -> None:
        # The parent's __init__ would assign `keys` and `values`, which are computed here.
        self._block = _Shared(block)
        self._keys: Tensor | None = None  # [B, G, capacity, E]
        self._values: Tensor | None = None
        self._written = 0
        self._pending: list[Pending] = []

    @property
    def is_initialized(self) -> bool:
        """Whether the layer holds tokens."""
        return self.get_seq_length() > 0

    @property
    def keys(self) -> Tensor | None:
        """Keys of every token, [B, G, S, E]."""
        self._align()
        return None if self._keys is None else self._keys[:, :, : self._written]

    @property
    def values(self) -> Tensor | None:
        """Values of every token, [B, G, S, E]."""
        self._align()
        return None if self._values is None else self._values[:, :, : self._written]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the shape of the first keys and values."""
        self._reserve(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, G, T, E]; return those of every token."""
        self._align()
        self._append(key_states, value_states)
        return self._keys[:, :, : self._written], self._values[:, :, : self._written]

    def defer(self, hidden: Tensor, rotation: Rotation | None) -> None:
        """Note tokens with hidden states [B, T, D] as pending."""
        self._pending.append(Pending(hidden, rotation))

    def get_seq_length(self) -> int:
        """Number of tokens held, the pending ones included."""
        return self._written + sum(part.length for part in self._pending)

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
        surplus = min(-tokens_to_remove, self.get_seq_length())
        while surplus and self._pending:
            last = self._pending.pop()
            if last.length > surplus:
                self._pending.append(last.first(last.length - surplus))
            surplus -= min(surplus, last.length)
        self._written -= surplus

    def reset(self) -> None:
        """Forget every token; the storage is released."""
        self._keys = self._values = None
        self._written, self._pending = 0, []

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
        """Not needed: the storage follows the model."""
        raise NotImplementedError("AneeCache does not offload; use cache_implementation='offloaded' in generate")

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._keys is not None:
            self._keys, self._values = change(self._keys), change(self._values)
        self._pending = [part.map_rows(change) for part in self._pending]

    def _align(self) -> None:
        """Write the keys and values of all pending tokens."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        hidden = torch.cat([part.hidden for part in pending], dim=1)
        rotation = None
        if pending[0].rotation is not None:
            rotation = tuple(_cat_rotation([part.rotation[i] for part in pending]) for i in (0, 1))
        self._append(*self._block.value.keys_values(hidden, rotation))

    def _append(self, keys: Tensor, values: Tensor) -> None:
        self._reserve(keys, values)
        end = self._written + keys.shape[2]
        self._keys[:, :, self._written : end] = keys
        self._values[:, :, self._written : end] = values
        self._written = end

    def _reserve(self, keys: Tensor, values: Tensor) -> None:
        """Make room for more keys and values, at least doubling the storage when it is full."""
        needed = self._written + keys.shape[2]
        capacity = 0 if self._keys is None else self._keys.shape[2]
        # What was made in inference mode can't be written to outside of it.
        frozen = self._keys is not None and self._keys.is_inference() and not torch.is_inference_mode_enabled()
        if needed <= capacity and not frozen:
            return
        if needed > capacity:
            capacity = max(needed, 2 * capacity, MIN_CAPACITY)
        old_keys, old_values = self._keys, self._values
        self._keys = keys.new_empty((*keys.shape[:2], capacity, keys.shape[3]))
        self._values = values.new_empty((*values.shape[:2], capacity, values.shape[3]))
        if old_keys is not None:
            self._keys[:, :, : self._written] = old_keys[:, :, : self._written]
            self._values[:, :, : self._written] = old_values[:, :, : self._written]


class _Shared:
    """Holds a block of the model; a deep copy of a cache shares it instead of copying the base's weights."""

    def __init__(self, value: Block) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict) -> "_Shared":
        return self


def _cat_rotation(parts: list[Tensor]) -> Tensor:
    """Concatenate cos or sin [B or 1, T, 1, R] in time."""
    rows = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(rows, -1, -1, -1) for part in parts], dim=1)


class AneeCache(Cache):
    """Cache of an `AneeForCausalLM`: one `AneeCacheLayer` per decoder layer, and an `ExecutionLog`."""

    def __init__(self, blocks: list[Block]) -> None:
        self._own = [AneeCacheLayer(block) for block in blocks]
        super().__init__(layers=[*self._own, ExecutionLog()])

    def defer(self, hidden: Tensor, rotation: Rotation | None, layer_idx: int) -> None:
        """Note tokens with hidden states [B, T, D] as pending for a layer that all of them skip."""
        self._own[layer_idx].defer(hidden, rotation)
