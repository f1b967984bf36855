"""Work: what running something takes, counted once and exactly; `hardware.py` prices it."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from .base_packed import is_packed, shape, stored_bytes


@dataclass(frozen=True)
class Work:
    """Work of one token.

    Args:
        flops: of the linear maps. Attention scores are left out: they depend on the context's length, and are saved in the
            same proportion.
        weight_bytes: of weights that are read.
        kv_bytes: of keys and values that are written.
        launches: linear maps that are called.
        context_bytes: of keys and values that are read for each token before this one.
        unknown: why its bytes can't be counted; empty where they are.
    """

    flops: float = 0.0
    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    launches: float = 0.0
    unknown: str = ""
    context_bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """Both, one after the other."""
        return Work(
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
            self.kv_bytes + other.kv_bytes,
            self.launches + other.launches,
            self.unknown or other.unknown,
            self.context_bytes + other.context_bytes,
        )

    def part(self, share: float) -> "Work":
        """The same with a share of the outputs."""
        return replace(self, flops=self.flops * share, weight_bytes=self.weight_bytes * share)


NOTHING = Work()


def work_of(modules: Iterable[nn.Module]) -> Work:
    """FLOPs of the linear maps in `modules`, bytes of all their weights."""
    parts = {id(part): part for module in modules for part in _parts(module)}.values()
    maps = sum(isinstance(part, nn.Module) or part.dim() > 1 for part in parts)
    unknown, size = "", 0
    try:
        size = sum(map(_bytes, parts))
    except ValueError as error:
        unknown = str(error)
    return Work(float(sum(map(_flops, parts))), float(size), launches=float(maps), unknown=unknown)


def norm_work(norms: Iterable[nn.Module]) -> Work:
    """Bytes of norms, which are no linear maps, whatever the shape of their weights."""
    return replace(work_of(norms), flops=0.0, launches=0.0)


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
