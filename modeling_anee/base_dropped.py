"""Full weights that were let go: what stands where they were, and how their memory goes back to the system.

A base is wrapped by reference, so dropping its weights changes the base itself: it can't be run by itself any more. Where a
weight was there is its shape and dtype, and whoever computes with it is told why that is not possible.
"""

import ctypes
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from mmap import PAGESIZE
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn


MESSAGE = (
    "the full weights of this base were dropped (drop_full=True): only what was made from them runs, through the model that "
    "wraps it. Load the base anew to run it by itself, wrap it again, change it, move it or cast it"
)
MADV_DONTNEED = 4
# What may be asked of a weight that is gone, by torch itself too when a module is moved to where it is.
ANSWERED = frozenset(
    {
        "__get__",
        "__set__",
        "__hash__",
        "__len__",
        "__repr__",
        "_has_compatible_shallow_copy_type",
        "data_ptr",
        "dim",
        "element_size",
        "get_device",
        "is_complex",
        "is_contiguous",
        "is_floating_point",
        "is_inference",
        "nelement",
        "numel",
        "requires_grad_",
        "size",
        "storage_offset",
        "stride",
    }
)


@dataclass(frozen=True)
class Drop:
    """What runs when the full weights are gone.

    Args:
        variants: all of the actions.
        layers: those of them that plans run layers in, and so are kept.
        heads: the same of the head, the full one among them if it is needed.
    """

    variants: tuple[str, ...]
    layers: frozenset[str]
    heads: frozenset[str]


class DroppedWeight(nn.Parameter):
    """Shape and dtype of a weight, on the meta device; computing with it is refused.

    Raises:
        ValueError: something would compute with it, move it or cast it.
    """

    home: torch.device | None = None  # where the weight was

    @classmethod
    def of(cls, weight: Tensor) -> "DroppedWeight":
        """What stands where a weight was."""
        dropped = cls(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), requires_grad=False)
        dropped.home = weight.device
        return dropped

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Whatever torch is asked to do with it; a plain linear map would give numbers out of nowhere."""
        name, kwargs = func.__name__, kwargs or {}
        if name == "detach" or (name == "to" and _stays(*args, **kwargs)):
            return args[0]
        if name not in ANSWERED:
            raise ValueError(MESSAGE)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def _stays(weight: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether `weight.to(...)` asks for what it was."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    return device in (None, weight.home) and dtype in (None, weight.dtype)


class DroppedLinear:
    """Stands for a linear map that is gone, with what it cost.

    Raises:
        ValueError: it is called.
    """

    def __init__(self, weight_bytes: int | None = None) -> None:
        self.weight_bytes = weight_bytes

    @classmethod
    def make(cls, weight: Tensor, bias: Tensor | None) -> "DroppedLinear":
        """A map in full, whose weight is about to go."""
        return cls()

    def __call__(self, x: Tensor) -> NoReturn:
        """Refused."""
        raise ValueError(MESSAGE)

    row = __call__

    def rows(self, start: int, stop: int | None) -> "DroppedLinear":
        """The same."""
        return self


def check_whole(base: nn.Module) -> None:
    """Check that a base has its weights.

    Raises:
        ValueError: they were dropped.
    """
    if any(isinstance(parameter, DroppedWeight) for parameter in base.parameters()):
        raise ValueError(MESSAGE)


def drop_weights(modules: Iterable[Any]) -> None:
    """Let the weights of linear modules go; biases stay."""
    for module in modules:
        module.weight = DroppedWeight.of(module.weight)


class FilePages:
    """Files of weights that are mapped into memory, whose pages else stay as long as any weight of the file does.

    Only mappings that nobody has written to count, so whoever still holds such a weight just reads it from the file again. Only
    Linux tells which these are.
    """

    def __init__(self) -> None:
        self._ranges = list(_unwritten_files())
        self._libc = ctypes.CDLL(None, use_errno=True) if self._ranges else None

    def leave(self, weights: Iterable[Tensor]) -> None:
        """Tell the system that these weights are not needed any more."""
        if self._libc is None:
            return
        for weight in weights:
            start = -(-weight.data_ptr() // PAGESIZE) * PAGESIZE
            size = (weight.data_ptr() + weight.nbytes) // PAGESIZE * PAGESIZE - start
            mapped = any(low <= start and start + size <= high for low, high in self._ranges)
            if size > 0 and mapped and weight.is_cpu and weight.is_contiguous():
                self._libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_DONTNEED)


def _unwritten_files() -> Iterator[tuple[int, int]]:
    """First and last address of every mapping of a file that holds no page of its own."""
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    mapping, inode = (0, 0), "0"
    for line in lines:
        first, *rest = line.split(maxsplit=5)
        if not first.endswith(":"):  # addresses, permissions, offset, device, inode, path
            low, high = (int(address, 16) for address in first.split("-"))
            mapping, inode = (low, high), rest[3]
        elif first == "Anonymous:" and rest[0] == "0" and inode != "0":
            yield mapping


def return_memory() -> None:
    """Give what was freed back to the system, where the C library keeps it for later."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another library, or another system
        return
    trim(0)
