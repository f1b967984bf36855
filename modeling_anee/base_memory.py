"""Bytes of weights that a model holds in memory: what is left of the base, every variant, and what is ours."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .base_model import BaseStack


def held_bytes(stack: BaseStack, own: Iterable[nn.Module]) -> dict[str, int]:
    """Bytes by what holds them: `embeddings`, the rest of the `base`, `own` modules, and each variant by its name.

    What several share counts for the first of them: a head that is the embeddings for these. Weights that are kept on a disk,
    or were dropped, hold nothing.
    """
    seen: set[int] = set()
    held = {
        "embeddings": _count(_state_of([stack.embed_tokens]), seen),
        "base": _count(_state_of([stack.base]), seen),
        "own": _count(_state_of(own), seen),
    }
    return held | {name: _count(_tensors_in(stack.maps_of(name)), seen) for name in stack.rounded}


def as_text(held: dict[str, int]) -> str:
    """The same for people."""
    parts = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in held.items() if size)
    return f"{sum(held.values()) / 2**20:.1f} MiB of weights in memory: {parts}"


def _state_of(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def _count(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the storages of tensors that are not among those seen, and are from now on."""
    size = 0
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            size += _count([getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]], seen)  # type: ignore[attr-defined]
        elif not tensor.is_meta and tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            size += tensor.untyped_storage().nbytes()
    return size


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors of a linear map and of those that it is made of, in whatever collections."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors_in(part)
    elif hasattr(value, "weight_bytes"):
        yield from _tensors_in(list(vars(value).values()))
