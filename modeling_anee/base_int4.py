"""Linear maps with weights in 4 bits: groups of 32 inputs share a scale and an offset, made from the frozen weights.

The range of a group is the one, among its own and some that are cut shorter, that loses least (clip search, as in AWQ,
arXiv:2306.00978). A few rows run in torch's kernel, which reads 4 bits a weight and rounds activations and sums to bfloat16;
many rows run in the same weights as integers of 8 bits, and what these lose as such integers again, by the exact kernel of
`base_int8.py`: there arithmetic counts, not reading. The two differ by the roundings of bfloat16.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from .base_int8 import Int8Linear
from .base_kernels import KERNELS_VARIABLE, ROWS, best_times, cold_bytes, machine_table


GROUP = 32  # inputs that share a scale and an offset
LEVELS, MIDDLE = 15, 8  # integers are 0 to 15; the kernel takes 8 off
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)  # of a group's range
OUTPUTS = 16  # the kernel wants a multiple of so many
PART = 1 << 20  # weights that are rounded at once
BLOCK = 64  # outputs that are packed together, whatever the CPU
FEW = 4  # rows on CUDA: on an H100 one row took half of the time of bfloat16, 16 took half as long again
FEW_ON_CPU = 16  # rows, without a measurement: at 16 a Xeon was as fast as with integers of 8 bits, an EPYC faster
MANY = 256  # rows of one call of the kernel
CUDA_INPUTS = 128  # the kernel of CUDA wants a multiple of so many
SLOW = ("DEFAULT", "NO AVX")  # instructions with which torch's kernel is a plain loop
PACKED, INTEGERS = "packed", "integers"
_int4_linear = getattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", None)

Wide = tuple[Int8Linear, Int8Linear]  # the same weights as integers of 8 bits, and what these lose


class Int4Linear:
    """`F.linear` with a weight [out, in] in 4 bits and a bias [out]: x [..., in] -> [..., out], in the dtype of x.

    A `small` one keeps 4 bits a weight and nothing else: many rows run in the kernel for a few, too, which is slower then.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, small: bool = False) -> None:
        self._small = small
        outputs, inputs = weight.shape
        padded = _padded(weight, (-inputs % GROUP, -outputs % OUTPUTS))
        parts = [quantise(part) for part in padded.split(max(PART // inputs, 1))]
        pairs = torch.cat([_paired(integers) for integers, _ in parts])
        scales = torch.cat([part for _, part in parts]).transpose(0, 1).contiguous()  # [groups, out, 2]
        self._settle(pairs, scales, bias, weight.shape)

    def _settle(
        self, pairs: Tensor, scales: Tensor, bias: Tensor | None, shape: Sequence[int], wider: Callable[[], Wide] | None = None
    ) -> None:
        """Pack integers for a few rows; for many, `wider` makes others when they are first needed, of these by default."""
        self._pairs: Tensor | None = pairs
        self.scales, self.bias, self._wider = scales, bias, wider
        self._outputs, self._inputs = shape
        self._padding = -self._inputs % GROUP, -self._outputs % OUTPUTS
        self._few, self._packed = 0, None
        if pairs.device.type == "cpu" and few_rows():
            self._few, self._kernel = few_rows(), _int4_linear
            parts = pairs.split(max(PART // self._inputs // BLOCK * BLOCK, BLOCK))
            convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
            self._packed = torch.cat([convert(_unpaired(part).to(torch.int32), 1) for part in parts])
        elif pairs.device.type == "cuda" and 2 * pairs.shape[1] % CUDA_INPUTS == 0:
            self._few, self._kernel = FEW, torch._weight_int4pack_mm
            self._packed = torch._convert_weight_to_int4pack(pairs, CUDA_INPUTS // 16)
        if self._small and self._packed is not None:
            self._few, self._pairs = sys.maxsize, None

    @cached_property
    @torch.inference_mode(False)
    @torch.no_grad()
    def _wide(self) -> Wide:
        """The map in 8 bits, and what is missing of it then: made when many rows first come, since decoding needs neither."""
        if self._wider is not None:
            return self._wider()
        exact = self.dequantised(torch.float32)
        many = Int8Linear(exact, self.bias)
        return many, Int8Linear(exact - many.dequantised(exact.dtype), None, coarse=True)

    def _integers(self) -> Tensor:
        """The integers, padded, uint8 [out, in]."""
        if self._pairs is not None:
            return _unpaired(self._pairs)
        # How they are packed is the kernel's affair, which gives them back where all scales are 1.
        groups, outputs, _ = self.scales.shape
        one = torch.eye(groups * GROUP, dtype=torch.bfloat16, device=self.scales.device)
        scales = torch.ones_like(self.scales)
        scales[..., 1] = MIDDLE
        assert self._kernel is not None
        columns = [self._kernel(part, self._packed, GROUP, scales) for part in one.split(MANY)]
        return torch.cat(columns).t().to(torch.uint8)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights, scales, offsets and bias that a row reads."""
        return self._outputs * self._inputs // 2 + self.scales.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def rows(self, start: int, stop: int | None) -> "Int4Linear":
        """The map to outputs `start:stop`, in the same integers."""
        start, stop, _ = slice(start, stop).indices(self._outputs)
        part, missing = object.__new__(Int4Linear), -(stop - start) % OUTPUTS
        part._small = self._small
        pairs = F.pad(_paired(self._integers()[start:stop]), (0, 0, 0, missing))
        scales = F.pad(self.scales[:, start:stop], (0, 0, 0, missing)).contiguous()
        bias, shape = None if self.bias is None else self.bias[start:stop], (stop - start, self._inputs)
        part._settle(pairs, scales, bias, shape, lambda: (self._wide[0].rows(start, stop), self._wide[1].rows(start, stop)))
        return part

    def row(self, x: Tensor) -> Tensor:
        """Outputs [out] of one row [in], a new tensor, with nothing checked."""
        if self._few == 0 or self._padding != (0, 0) or self.bias is not None:
            return self(x)
        return self._kernel(x.to(torch.bfloat16).unsqueeze(0), self._packed, GROUP, self.scales).view(-1).to(x.dtype)  # type: ignore[misc]

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [..., out] for inputs [..., in]."""
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, self.dequantised(x.dtype), self.bias)
        rows = x.numel() // x.shape[-1]
        if rows > self._few:
            many, rest = self._wide
            return many(x) + rest(x)
        flat = x.reshape(rows, -1).to(torch.bfloat16)
        inputs, outputs = self._padding
        if inputs:
            flat = F.pad(flat, (0, inputs))
        assert self._kernel is not None
        out = self._kernel(flat, self._packed, GROUP, self.scales)
        if outputs:
            out = out[:, :-outputs]
        out = out.to(x.dtype)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], -1)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weights as numbers, [out, in]."""
        return torch.cat([part.to(dtype) for part in self.parts()])

    def parts(self) -> Iterator[Tensor]:
        """The weights as numbers, some outputs after the others, float32 [n, in]."""
        integers, step = self._integers()[: self._outputs], max(PART // self._inputs, 1)
        for start in range(0, self._outputs, step):
            part = slice(start, start + step)
            yield dequantise(integers[part], self.scales[:, : self._outputs][:, part])[:, : self._inputs]


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [out, in] -> integers int32 [out, in], and scale and offset of each group, bfloat16 [out, groups, 2]."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    best: tuple[Tensor, ...] | None = None
    least = None
    for shrink in SHRINKS:
        scale = _rounded(2 * half * shrink / LEVELS).clamp(min=torch.finfo(torch.bfloat16).tiny)
        offset = _rounded(middle - half * shrink + MIDDLE * scale)
        integers = ((groups - offset) / scale + MIDDLE).round().clamp(0, LEVELS)
        lost = ((integers - MIDDLE) * scale + offset - groups).square().sum(dim=-1, keepdim=True)
        found = integers, scale, offset
        best = found if best is None else tuple(torch.where(lost < least, a, b) for a, b in zip(found, best, strict=True))
        least = lost if least is None else torch.minimum(lost, least)
    assert best is not None
    integers, scale, offset = best
    return integers.flatten(1).to(torch.int32), torch.cat((scale, offset), dim=-1).to(torch.bfloat16)


def dequantise(integers: Tensor, scales: Tensor) -> Tensor:
    """Integers [out, in], scales and offsets [groups, out, 2] -> weights float32 [out, in]."""
    scale, offset = scales.float().transpose(0, 1).unsqueeze(2).unbind(-1)  # each [out, groups, 1]
    groups = integers.unflatten(1, (-1, GROUP))
    return torch.addcmul(offset, groups - float(MIDDLE), scale).flatten(1)


def _paired(integers: Tensor) -> Tensor:
    """Integers [out, in] -> two in a byte, uint8 [out, in / 2]."""
    return (integers[:, ::2] << 4 | integers[:, 1::2]).to(torch.uint8)


def _unpaired(pairs: Tensor) -> Tensor:
    """Integers uint8 [out, in] of pairs."""
    return torch.stack((pairs >> 4, pairs & LEVELS), dim=-1).flatten(1)


def _rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def _padded(weight: Tensor, padding: tuple[int, int]) -> Tensor:
    inputs, outputs = padding
    return F.pad(weight, (0, inputs, 0, outputs)) if inputs or outputs else weight


def few_rows() -> int:
    """Up to how many rows the kernel that reads 4 bits is used: where it was measured to be the faster one, once per machine.

    0: never. What it rounds shows in the result, so it must not be chosen anew every time.
    """
    if _int4_linear is None or torch.backends.cpu.get_cpu_capability() in SLOW:
        return 0
    if os.environ.get(KERNELS_VARIABLE) == "default":
        return FEW_ON_CPU
    return machine_table().limits("int4 rows", measure, PACKED)[1]


def measure() -> list[str]:
    """The faster kernel for each number of `ROWS`, this one or that for integers of 8 bits, which is called twice."""
    outputs, inputs = 2048, 1024
    copies = max(2, cold_bytes() // (outputs * inputs))
    packed = cycle(torch.ones(copies, outputs, inputs // 2, dtype=torch.uint8, device="cpu"))
    wide = cycle(torch.ones(copies, outputs, inputs, dtype=torch.int8, device="cpu"))
    scales = torch.ones(inputs // GROUP, outputs, 2, dtype=torch.bfloat16, device="cpu")
    fastest: list[str] = []
    for rows in ROWS:
        if fastest and fastest[-1] == INTEGERS:
            break
        x = torch.ones(rows, inputs, dtype=torch.bfloat16, device="cpu")
        digits = torch.ones(2 * rows, inputs, dtype=torch.int8, device="cpu")

        def products(digits: Tensor = digits, coarse: Tensor = digits[:rows]) -> Tensor:
            torch._int_mm(digits, next(wide).t())
            return torch._int_mm(coarse, next(wide).t())

        own, other = best_times(lambda x=x: _int4_linear(x, next(packed), GROUP, scales), products)  # type: ignore[misc]
        fastest.append(PACKED if own < other else INTEGERS)
    return fastest + fastest[-1:] * (len(ROWS) - len(fastest))
