"""Kernels compiled on this machine, by the C compiler that is there: once, kept in the cache folder, loaded without Python.

What torch offers for weights of 8 and 4 bits on a CPU reads them at half of the memory's speed, and decoding a small model
spends as long around its kernels as in them. A machine without a compiler, or where torch's are faster, runs torch's.
`ANEE_KERNELS=default` compiles nothing, `ANEE_KERNELS=compiled` uses them without measuring.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from sys import maxsize

import torch
from torch import Tensor
from transformers.utils import logging

from .base_kernels import KERNELS_VARIABLE, machine, machine_table
from .compiled_source import SOURCE
from .folders import cache_folder


logger = logging.get_logger("transformers.anee")  # follows the verbosity of transformers

COMPILED = "compiled"  # the kernel's name in what was measured
COMPILERS = ("cc", "gcc", "clang")
# Not -ffast-math, which at linking would change how the whole process treats tiny numbers.
MATHS = ("-fno-math-errno", "-fno-trapping-math")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-Wno-psabi", *MATHS)
PATIENCE = 120  # seconds
FLOAT, INT8, INT4 = 0, 1, 2  # kinds of a map
SILU, GELU_TANH = 0, 1
MOST_RANK = 64  # of a correction
_pointer, _number, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Map(ctypes.Structure):
    """A linear map, see the source."""

    _fields_ = [
        *((name, _number) for name in ("kind", "outputs", "inputs", "rank")),
        *((name, _pointer) for name in ("weight", "scales", "bias", "directions", "lost")),
        ("largest", _float),
    ]


class Attention(ctypes.Structure):
    """The first half of a layer."""

    _fields_ = [
        ("qkv", Map),
        ("output", Map),
        ("norm", _pointer),
        *((name, _number) for name in ("heads", "groups", "size")),
        ("epsilon", _float),
        ("scaling", _float),
        ("group", _pointer),
    ]


class FeedForward(ctypes.Structure):
    """The second half."""

    _fields_ = [("gate_up", Map), ("down", Map), ("norm", _pointer), ("activation", _number), ("epsilon", _float)]


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none, or are to be none."""
    return None if os.environ.get(KERNELS_VARIABLE) == "default" else _loaded()


def kernels() -> ctypes.CDLL:
    """The compiled kernels, where there are some."""
    found = library()
    assert found is not None
    return found


def run_map(kernel: Callable[..., int], map_: Map, x: Tensor, out: Tensor, rows: int) -> Tensor:
    """Outputs [..., out] of a linear map for rows [..., in], contiguous float32 on the CPU, written to `out`.

    Args:
        kernel: `anee_linear` of `kernels()`.
        map_: the map.
        x: the rows.
        out: contiguous, of as many rows.
        rows: how many they are.

    Raises:
        MemoryError: there is none for so many rows.
    """
    if kernel(ctypes.addressof(map_), x.data_ptr(), out.data_ptr(), rows, torch.get_num_threads()):
        raise MemoryError(f"there is no memory for {rows} rows of {map_.inputs} activations")
    return out


def rows_that_pay(name: str, measured: Callable[[], list[str]]) -> int:
    """Up to how many rows compiled kernels are used; 0: never. A machine is measured once.

    Args:
        name: under which that is kept.
        measured: the faster kernel for each of `base_kernels.ROWS`.
    """
    if always():
        return maxsize
    low, high = machine_table().limits(name, measured, COMPILED)
    return high if low == 1 else 0


def always() -> bool:
    """Whether compiled kernels are to run without having been measured."""
    return os.environ.get(KERNELS_VARIABLE) == "compiled"


@cache
def _loaded() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none, which is said once."""
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        logger.info("there is no C compiler (cc): weights of 8 and 4 bits run in torch's kernels, which are slower")
        return None
    try:
        loaded = ctypes.CDLL(str(built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning_once(f"kernels for weights of 8 and 4 bits could not be compiled, torch's take their place: {error}")
        return None
    _declare(loaded)
    return loaded


def built(compiler: str) -> Path:
    """The file of the kernels, made where it is not there yet.

    Raises:
        OSError: there is no place to keep it, or it can't be written.
        subprocess.SubprocessError: compiling failed; the message has the compiler's words.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    key = hashlib.sha256("\0".join((SOURCE, *FLAGS, version, machine())).encode()).hexdigest()[:16]
    file = cache_folder() / "kernels" / f"anee-{key}.so"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            part = Path(folder) / "kernels.so"
            _compile(compiler, Path(folder), part)
            os.replace(part, file)  # another process may have been as quick
    return file


def _compile(compiler: str, folder: Path, out: Path) -> None:
    source, unlinked = folder / "kernels.c", folder / "kernels.o"
    source.write_text(SOURCE, encoding="utf-8")
    # Linked without OpenMP: its functions are those of the library that torch has loaded, so there is one set of threads.
    for arguments in ((*FLAGS, "-c", source, "-o", unlinked), ("-shared", unlinked, "-o", out, "-lm")):
        done = subprocess.run([compiler, *arguments], capture_output=True, text=True, timeout=PATIENCE)
        if done.returncode != 0:
            raise subprocess.SubprocessError(f"{compiler} says: {done.stderr.strip()[:400]}")


def _declare(loaded: ctypes.CDLL) -> None:
    loaded.anee_linear.argtypes = [_pointer, _pointer, _pointer, _number, _number]
    loaded.anee_attend.argtypes = [*[_pointer] * 4, _number, _pointer, _number, _number, _pointer, _number, _number]
    loaded.anee_feed.argtypes = [_pointer, _pointer, _pointer, _number, _number]
    for function in (loaded.anee_linear, loaded.anee_attend, loaded.anee_feed):
        function.restype = ctypes.c_int
