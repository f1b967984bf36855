"""Linear maps with weights in 8 bits: one scale an output, made from the frozen weights when a base is prepared.

Activations become integers of 16 bits, with one scale a token, as two planes of 8 bits; sums are exact integers. So an output
depends on its own token alone, on no kernel, number of rows or order of sums, and what rounding adds is far below what 8 bits a
weight have lost. With bfloat16 activations (`torch._weight_int8pack_mm`) the logits of a token fed alone and of the same
token in a text differed by up to 0.27 on SmolLM2-135M (the largest is 35); so they differ by 0.02.
"""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from .base_kernels import best_times


logger = logging.get_logger("transformers.anee")  # follows the verbosity of transformers

SMALLEST = torch.finfo(torch.float32).tiny
LEVELS = 127  # of a weight, on both sides of zero
LARGEST = 32512  # of an activation: its high plane is at most 127, its low one at most 128
CARRY = 128  # what is added to both digits, see `_planes`
SHIFT = 1.5 * 2**23 + CARRY  # added to a number in float32: the last 16 bits of the sum are the number, rounded, and the carry
BLOCK, LEAST_OUTPUTS = 1 << 19, 256  # sums of one call stay in the cache; fewer outputs at once cost more calls than that saves
MOST_ROWS = 512  # of one call, for the same reason
FEWEST_ON_CUDA, MULTIPLE = 32, 8  # rows that the kernel of CUDA wants, and what all sizes must be multiples of
LEAST = 16  # inputs of a map that the kernel is used for: with a single one its sums are wrong
ONEDNN_HAS = ("AVX2", "AVX512")  # instructions for which oneDNN has such a kernel
SLOW = 3.0  # times as slow as in full, and the kernel is none that was made for this machine
PART = 1 << 22  # weights that are rounded at once, so that making a variant needs little memory


class Int8Linear:
    """`F.linear` with a weight [out, in] in 8 bits and a bias [out]: x [..., in] -> [..., out], in the dtype of x.

    A `coarse` one rounds activations to 8 bits, too: for weights that are so small beside others that it does not show.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, coarse: bool = False) -> None:
        self.weight, self.scale = round_rows(weight)
        self.bias, self.coarse = bias, coarse
        self.largest = largest_activation(self.weight)
        self._settle()

    def _settle(self) -> None:
        self._weight = self.weight.t()  # [in, out]
        self._inputs = self.weight.shape[1]
        # Tensors, since torch makes one of a plain number in each call.
        self._shift, self._carry = self.scale.new_tensor([SHIFT]), self.scale.new_tensor([CARRY], dtype=torch.int32)
        self._added = self.scale.new_zeros(1) if self.bias is None else self.bias
        on_cpu = self.weight.device.type == "cpu"
        self._integers = (self.weight.shape[1] >= LEAST and integers_pay()) if on_cpu else fits_accelerator(self.weight)
        self.row = self._row if self._integers and on_cpu and not self.coarse else self._row_of_several
        self._blocks = on_cpu
        self._product = torch._int_mm if on_cpu else padded_product

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights, scales and bias."""
        return self.weight.nbytes + self.scale.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def rows(self, start: int, stop: int | None) -> "Int8Linear":
        """The map to outputs `start:stop`: views, with the same roundings."""
        part = object.__new__(Int8Linear)
        part.weight, part.scale = self.weight[start:stop], self.scale[start:stop]
        part.bias, part.largest, part.coarse = None if self.bias is None else self.bias[start:stop], self.largest, self.coarse
        part._settle()
        return part

    def _row_of_several(self, x: Tensor) -> Tensor:
        """Outputs [out] of one row [in]."""
        return self(x.unsqueeze(0))[0]

    def _row(self, x: Tensor) -> Tensor:
        """The same, with nothing checked."""
        # Its scale is a plain number, which saves kernels.
        step = max(x.abs().max().item() / self.largest, SMALLEST)
        digits = torch.add(self._shift, x, alpha=1 / step).view(torch.int32).bitwise_xor_(self._carry).view(torch.int8)
        # Not copied: the kernel takes the two low bytes of each number as they lie.
        sums = torch._int_mm(digits.as_strided((2, self._inputs), (1, 4)), self._weight)
        return torch.addcmul(self._added, torch.add(sums[0], sums[1], alpha=256), self.scale, value=step)

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [..., out] for inputs [..., in]."""
        if not self._integers or (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, self.dequantised(x.dtype), self.bias)
        flat = x.reshape(-1, x.shape[-1]).float()
        if len(flat) == 1 and self.row == self._row:
            return self._row(flat[0]).to(x.dtype).view(*x.shape[:-1], -1)
        if not self._blocks or len(flat) <= MOST_ROWS:
            out = self._several(flat)
        else:
            out = torch.cat([self._several(part) for part in flat.split(MOST_ROWS)])
        if self.bias is not None:
            out += self.bias
        return out.to(x.dtype).view(*x.shape[:-1], -1)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weights as numbers, [out, in]."""
        return (self.weight * self.scale.unsqueeze(1)).to(dtype)

    def parts(self) -> Iterator[Tensor]:
        """The weights as numbers, float32 [out, in], at once."""
        yield self.dequantised(torch.float32)

    def _several(self, x: Tensor) -> Tensor:
        """Rows [N, in] -> [N, out]."""
        step = x.abs().amax(dim=-1, keepdim=True)  # for many rows a fourteenth of the time of torch's norm
        step = (step / (LEVELS if self.coarse else self.largest)).clamp_(min=SMALLEST)
        digits = (x / step).round_().to(torch.int8) if self.coarse else _planes(x / step)
        size = max(BLOCK // len(digits), LEAST_OUTPUTS)
        if not self._blocks or len(self.weight) <= size:
            return self._sums(digits, slice(None)).mul_(step)
        out = x.new_empty(len(x), len(self.weight))
        for start in range(0, len(self.weight), size):
            part = slice(start, start + size)
            self._sums(digits, part, out[:, part])
        return out.mul_(step)

    def _sums(self, digits: Tensor, part: slice, out: Tensor | None = None) -> Tensor:
        """Some of the outputs [N, n] of digits [N or 2 N, in], in steps of the activations."""
        sums = self._product(digits, self._weight[:, part])
        if not self.coarse:
            low, high = sums.chunk(2)
            sums = torch.add(low, high, alpha=256)
        return torch.mul(sums, self.scale[part], out=out)


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [out, in] -> integers int8 [out, in] and the scale of each output, float32 [out]."""
    scales = torch.empty(len(weight), device=weight.device)
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    step = max(PART // weight.shape[1], 1)
    for rows, scale, out in zip(*(part.split(step) for part in (weight, scales, integers)), strict=True):
        scale.copy_(rows.abs().amax(dim=1)).div_(LEVELS).clamp_(min=SMALLEST)
        out.copy_((rows.float() / scale.unsqueeze(1)).round_())
    return integers, scales


def largest_activation(integers: Tensor) -> int:
    """The largest activation, in steps, for which no sum with such weights [out, in] can leave 32 bits."""
    step = max(PART // integers.shape[1], 1)
    sums = [part.abs().sum(dim=1, dtype=torch.int64).max() for part in integers.split(step)]
    return int(min(LARGEST, (2**31 - 1) // max(1, int(torch.stack(sums).max()))))


def _planes(x: Tensor) -> Tensor:
    """Numbers [N, in] that fit in 16 bits -> all low digits, then all high ones, in [-128, 127], int8 [2 N, in]."""
    # To the base of 256, where 128 more carries into the high digit, and is taken off the low one.
    numbers = torch.add(x, SHIFT).view(torch.int32)
    planes = x.new_empty(2, *x.shape, dtype=torch.int8)
    planes[1] = numbers >> 8
    planes[0] = numbers.bitwise_xor_(CARRY)
    return planes.flatten(0, 1)


def padded_product(digits: Tensor, weight: Tensor) -> Tensor:
    """`torch._int_mm` of digits [N, in] on an accelerator, which wants more rows than decoding has."""
    rows = len(digits)
    padding = max(FEWEST_ON_CUDA - rows, -rows % MULTIPLE)
    return torch._int_mm(F.pad(digits, (0, 0, 0, padding)) if padding else digits, weight)[:rows]


def fits_accelerator(weight: Tensor) -> bool:
    """Whether the kernel of CUDA takes weights [out, in] of this shape."""
    return weight.device.type == "cuda" and all(size % MULTIPLE == 0 for size in weight.shape)


@cache
def integers_pay() -> bool:
    """Whether this machine has a kernel for integers that is worth calling: known of oneDNN on x86, else measured once.

    It must not hang on what else the machine does at the moment: the other way is many times slower.
    """
    if torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in ONEDNN_HAS:
        return True
    generator = torch.Generator("cpu").manual_seed(0)
    weights, several = torch.randn(1024, 512, generator=generator, device="cpu"), torch.ones(16, 512, device="cpu")
    integers, digits = weights.to(torch.int8).t(), torch.ones(32, 512, dtype=torch.int8, device="cpu")
    try:
        plain, own = best_times(lambda: F.linear(several, weights), lambda: torch._int_mm(digits, integers))
    except (AttributeError, NotImplementedError, RuntimeError):
        plain, own = 0.0, 1.0
    pays = own < SLOW * plain
    if not pays:
        logger.warning_once(
            "this machine has no fast kernel for weights of 8 bits: they become numbers again in each call, which saves no time"
        )
    return pays
