"""Kernels that torch has twice: for each shape the one that was measured to be faster here, with the same result.

On a CPU `F.linear` in float32 goes to one library and oneDNN to another. Which wins depends on the machine, the shape and
the number of rows: by 3 for every shape on one CPU, not at all on another. So it is measured when a base is prepared, once
per machine, and kept in the cache folder, by CPU, torch and number of threads. `ANEE_KERNELS=default` measures nothing.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from .folders import keep, kept_file, read_kept


logger = logging.get_logger("transformers.anee")  # follows the verbosity of transformers

KERNELS_VARIABLE = "ANEE_KERNELS"
ROWS = (1, 4, 8, 16, 64, 512)  # numbers of rows that are measured; one in between runs as the next of them
LARGEST = 1 << 31  # multiplications of one measurement; shapes and rows with more run as the last measured
SMALLEST = 1 << 16  # weights from which a shape is worth measuring
REPEATS = 5  # of each kernel, at least, and for at least so many seconds:
LEAST = 0.1
LEAST_COLD, MOST_COLD = 1 << 26, 1 << 29  # bytes that no cache holds, see `cold_bytes`
PATIENCE = 2.0  # seconds for one shape
WIDE, FEW_TOKENS = 2048, 64  # without a measurement: oneDNN for at least so many outputs and at most so many rows
TORCH, ONEDNN = "torch", "onednn"
_onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class LinearKernel:
    """`F.linear` with a fixed weight [out, in] and bias [out]: x [..., in] -> [..., out], by the kernel of its shape."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self._limits = limits_of(weight)

    @property
    def weight_bytes(self) -> None:
        """Those of the base's own parameters."""

    def row(self, x: Tensor) -> Tensor:
        """Outputs [out] of one row [in], a new tensor, with nothing checked."""
        if self._limits[0] == 1 and self._limits[1]:
            return _onednn_linear(x.unsqueeze(0), self.weight, self.bias, "none", [], "").view(-1)  # type: ignore[misc]
        return F.linear(x, self.weight, self.bias)

    def rows(self, start: int, stop: int | None) -> "LinearKernel":
        """The map to outputs `start:stop`, on a view of the weight."""
        return LinearKernel(self.weight[start:stop], None if self.bias is None else self.bias[start:stop])

    def parts(self) -> Iterator[Tensor]:
        """The weights as numbers, float32 [out, in], at once."""
        yield self.weight.float()

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [..., out] for inputs [..., in]."""
        low, high = self._limits
        rows = x.numel() // x.shape[-1]
        if (
            not low <= rows <= high
            or (torch.is_grad_enabled() and x.requires_grad)  # the kernel has no gradient
            or torch.is_autocast_enabled("cpu")  # nor does it know autocast
            or x.dtype != torch.float32
        ):
            return F.linear(x, self.weight, self.bias)
        return _onednn_linear(x, self.weight, self.bias, "none", [], "")  # type: ignore[misc]


def limits_of(weight: Tensor) -> tuple[int, int]:
    """The fewest and the most rows for which oneDNN's kernel is the faster one; (1, 0) where it is not to be used."""
    usable = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
    if _onednn_linear is None or not usable or weight.dim() != 2:
        return 1, 0
    outputs, inputs = weight.shape
    if weight.numel() < SMALLEST or os.environ.get(KERNELS_VARIABLE) == "default":
        return (1, FEW_TOKENS) if outputs >= WIDE else (1, 0)
    return machine_table().limits(f"{outputs}x{inputs}", partial(measure, outputs, inputs), ONEDNN)


class KernelTable:
    """What was measured on this machine: by shape, the kernel for each number of `ROWS`.

    Args:
        file: where it is kept; None for nowhere.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.fastest: dict[str, list[str]] = _read(file)

    def limits(self, name: str, measured: Callable[[], list[str]], kernel: str) -> tuple[int, int]:
        """The fewest and the most rows for which `kernel` is the faster one.

        Args:
            name: what is asked about, a shape for example.
            measured: the faster kernel for each number of `ROWS`, called where the table has nothing by that name.
            kernel: its name.
        """
        if name not in self.fastest:
            self.fastest[name] = measured()
            keep(self.file, self.fastest, "which kernels are fastest")
        return span(self.fastest[name], kernel)


def span(fastest: list[str], kernel: str = ONEDNN) -> tuple[int, int]:
    """The range of rows around the smallest ones in which a kernel was faster: one switch on, one switch off."""
    wins = [place for place, winner in enumerate(fastest) if winner == kernel]
    if not wins:
        return 1, 0
    first = last = wins[0]
    while last + 1 in wins:
        last += 1
    low = 1 if first == 0 else ROWS[first - 1] + 1
    return low, LARGEST if last == len(fastest) - 1 else ROWS[last]


def measure(outputs: int, inputs: int) -> list[str]:
    """The faster kernel of a shape for each number of rows; those that would take too long are as the last measured."""
    assert _onednn_linear is not None
    fastest: list[str] = []
    copies = max(2, cold_bytes() // (4 * outputs * inputs))  # so many that each is read from memory, as a model's layers are
    weights, begin = cycle(torch.ones(copies, outputs, inputs, device="cpu")), time.perf_counter()
    for rows in ROWS:
        too_long = rows * outputs * inputs > LARGEST or time.perf_counter() - begin > PATIENCE
        if fastest and too_long:
            break
        x = torch.randn(rows, inputs, device="cpu")
        own, other = best_times(
            lambda x=x: F.linear(x, next(weights)),  # type: ignore[misc]
            lambda x=x: _onednn_linear(x, next(weights), None, "none", [], ""),  # type: ignore[misc]
        )
        fastest.append(ONEDNN if other < own else TORCH)
    return fastest + fastest[-1:] * (len(ROWS) - len(fastest))


@cache
def cold_bytes() -> int:
    """Bytes that the caches of this CPU don't hold, as far as the system tells."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20}
    try:
        texts = [size.read_text(encoding="ascii").strip() for size in sizes]
        largest = max((int(text[:-1]) * units[text[-1]] for text in texts), default=0)
    except (OSError, ValueError, KeyError):
        largest = 0
    return min(max(2 * largest, LEAST_COLD), MOST_COLD)


@torch.inference_mode()
def best_times(*functions: Callable[[], Tensor]) -> list[float]:
    """Seconds of the fastest of some calls of each, in turn: what else runs on the machine only makes a call slower."""
    times = [float("inf")] * len(functions)
    begin, rounds = time.perf_counter(), 0
    while rounds < REPEATS or time.perf_counter() - begin < LEAST:
        for place, function in enumerate(functions):
            start = time.perf_counter()
            function()
            times[place] = min(times[place], time.perf_counter() - start)
        rounds += 1
    return times


@cache
def machine_table() -> KernelTable:
    """The table of this machine."""
    return KernelTable(kept_file("kernels", f"{machine()}.json"))


def machine() -> str:
    """What kernels depend on, as a file name: CPU, its instructions, torch, threads."""
    parts = [platform.machine(), cpu_name(), torch.backends.cpu.get_cpu_capability(), torch.__version__]
    text = "-".join([*parts, f"{torch.get_num_threads()}threads"])
    return "".join(character if character.isalnum() or character in "-.+" else "_" for character in text)


def cpu_name() -> str:
    """The model of the CPU, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _read(file: Path | None) -> dict[str, list[str]]:
    """A table from a file; an empty one where there is none, or where it is no such file."""
    found = read_kept(file)
    return {shape: kernels for shape, kernels in found.items() if isinstance(kernels, list) and len(kernels) == len(ROWS)}
