"""Which kernels weights of few bits run in on this machine: compiled ones or torch's, as was measured once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .base_compiled import CompiledInt4, CompiledInt8, CompiledLinear
from .base_int4 import Int4Linear
from .base_int8 import Int8Linear
from .base_kernels import ROWS, TORCH, best_times
from .compiled import COMPILED, library, rows_that_pay


OUTPUTS, INPUTS = 3072, 1536  # of the map that is measured
PREFERRED = 1.25  # so many times as slow compiled kernels may be: torch's want weights of their own beside them


def int8_linear(weight: Tensor, bias: Tensor | None) -> CompiledLinear | Int8Linear:
    """A linear map of a weight [out, in] and a bias [out] in 8 bits."""
    most = rows_that_pay("compiled int8", partial(measure, CompiledInt8.of, Int8Linear)) if compiles(weight) else 0
    return up_to(CompiledInt8.of(weight, bias), most) if most else Int8Linear(weight, bias)


def int4_linear(weight: Tensor, bias: Tensor | None, small: bool = False) -> CompiledLinear | Int4Linear:
    """A linear map of a weight [out, in] and a bias [out] in 4 bits.

    A `small` one keeps 4 bits a weight and nothing else: many rows run in the kernel for a few, too, which may be slower.
    """
    most = rows_that_pay("compiled int4", partial(measure, CompiledInt4.of, Int4Linear)) if compiles(weight) else 0
    if not most:
        return Int4Linear(weight, bias, small)
    made = CompiledInt4.of(weight, bias)
    return made if small else up_to(made, most)


def compiles(weight: Tensor) -> bool:
    """Whether there are compiled kernels for a weight."""
    return weight.device.type == "cpu" and library() is not None


def up_to(made: CompiledLinear, most: int) -> CompiledLinear:
    """A map whose compiled kernel takes so many rows."""
    made.most = most
    return made


def measure(compiled: Callable[..., Any], other: Callable[..., Any]) -> list[str]:
    """The kernel to take for each number of `ROWS`.

    Args:
        compiled: weight, bias -> map in compiled kernels.
        other: the same in torch's.
    """
    weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    one, two = compiled(weight, None), other(weight, None)
    fastest = []
    for rows in ROWS:
        x = torch.ones(rows, INPUTS, device="cpu")
        own, others = best_times(lambda x=x: one(x), lambda x=x: two(x))  # type: ignore[misc]
        fastest.append(COMPILED if own < PREFERRED * others else TORCH)
    return fastest
