"""Linear maps in the base's own weights: a few rows run in a compiled kernel, which reads each weight once for all of them.

A row's outputs are the same bits in every number of rows, so what is decoded alone is what is decoded with others: for drafts
that are verified together, see `lossless.py`.
"""

from itertools import cycle

import torch
from torch import Tensor

from .base_kernels import ROWS, TORCH, LinearKernel, best_times, cold_bytes
from .compiled import COMPILED, FLOAT, Map, always, kernels, library, rows_that_pay, run_map


MOST = 16  # rows; many more are arithmetic, which torch's kernels are better at
OUTPUTS, INPUTS = 3072, 576  # of the map that is measured
FEWEST = 1 << 16  # weights of a map from which calling the kernel is worth it


class FloatLinear(LinearKernel):
    """`LinearKernel`, up to `most` rows in the compiled kernel."""

    def __init__(self, weight: Tensor, bias: Tensor | None, most: int) -> None:
        super().__init__(weight, bias)
        outputs, inputs = weight.shape
        self._most, self._kernel = most, kernels().anee_linear
        self.map = Map(
            kind=FLOAT,
            outputs=outputs,
            inputs=inputs,
            weight=weight.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [..., out] for inputs [..., in]."""
        outputs, inputs = self.weight.shape
        rows = x.numel() // inputs
        if (
            not 0 < rows <= self._most
            or (torch.is_grad_enabled() and x.requires_grad)
            or torch.is_autocast_enabled("cpu")
            or x.dtype != torch.float32
            or not x.is_cpu
        ):
            return super().__call__(x)
        return run_map(self._kernel, self.map, x.contiguous(), x.new_empty(*x.shape[:-1], outputs), rows)

    def rows(self, start: int, stop: int | None) -> LinearKernel:
        """The map to outputs `start:stop`, on a view of the weight."""
        return full_linear(self.weight[start:stop], None if self.bias is None else self.bias[start:stop])


def full_linear(weight: Tensor, bias: Tensor | None) -> LinearKernel:
    """A linear map of the base's own weight [out, in] and bias [out]."""
    most = most_rows() if _fits(weight) and (bias is None or _is_row_major(bias)) else 0
    return FloatLinear(weight, bias, most) if most else LinearKernel(weight, bias)


def _fits(weight: Tensor) -> bool:
    large = weight.numel() >= FEWEST or always()
    return weight.dim() == 2 and _is_row_major(weight) and large and library() is not None


def _is_row_major(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()


def most_rows() -> int:
    """Up to how many rows the compiled kernel is used; 0: never."""
    return min(rows_that_pay("compiled float rows", measure), MOST)


def measure() -> list[str]:
    """The faster kernel for each number of `ROWS`, of weights that no cache holds; one row goes with the next number."""
    copies = max(2, cold_bytes() // (4 * OUTPUTS * INPUTS))
    weights = torch.ones(copies, OUTPUTS, INPUTS, device="cpu")
    own, others = (
        cycle([FloatLinear(weight, None, MOST) for weight in weights]),
        cycle([LinearKernel(one, None) for one in weights]),
    )
    fastest = [TORCH] * len(ROWS)
    for place, rows in enumerate(ROWS):
        if 1 < rows <= MOST:
            x = torch.ones(rows, INPUTS, device="cpu")
            compiled, torchs = best_times(lambda x=x: next(own)(x), lambda x=x: next(others)(x))  # type: ignore[misc]
            fastest[place] = COMPILED if compiled < torchs else TORCH
    fastest[0] = fastest[1]
    return fastest
