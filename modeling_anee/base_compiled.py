"""Linear maps with weights in 8 or 4 bits in compiled kernels: the integers of `base_int8.py` and `base_int4.py`, packed anew.

One kernel runs one row, a few and many, with activations of 16 bits and exact sums, so scoring is decoding to the last bits.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from sys import maxsize

import torch
import torch.nn.functional as F
from torch import Tensor

from .base_int4 import GROUP, dequantise, quantise
from .base_int8 import LARGEST, Int8Linear, largest_activation, round_rows
from .compiled import INT4, INT8, Map, kernels, run_map
from .large_pages import LARGE_PAGES


LANES = 16  # outputs of a block
CARRY = 128  # what is added to weights in 8 bits
PART = 1 << 20  # weights that are rounded at once
ORDER8 = (0, 2, 1, 3)  # the inputs of the four bytes of a lane: halves of 16 bits, masked and shifted, are pairs of neighbours
LOW4, HIGH4 = (0, 4, 1, 5), (2, 6, 3, 7)  # of their low and of their high nibbles


class CompiledLinear:
    """`F.linear` with a weight [out, in] in few bits and a bias [out]: x [..., in] -> [..., out], in the dtype of x.

    Args:
        packed: weights in the kernel's layout, uint8 [blocks, ...].
        scales: float32 [out], or bfloat16 [blocks, groups, 2, LANES].
        shape: of the weight.
        largest: activation, in steps.
    """

    kind: int
    most = maxsize  # rows that the compiled kernel is used for

    def __init__(self, packed: Tensor, scales: Tensor, bias: Tensor | None, shape: tuple[int, int], largest: int) -> None:
        self.packed, self.scales, self.bias = packed, scales, None if bias is None else bias.float()
        self.outputs, self.inputs = shape
        self.map = Map(
            kind=self.kind,
            outputs=self.outputs,
            inputs=self.inputs,
            weight=packed.data_ptr(),
            scales=scales.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            largest=largest,
        )
        self._largest, self._kernel = largest, kernels().anee_linear

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights, scales, offsets and bias that a row reads."""
        bits = self.outputs * self.inputs * (8 if self.kind == INT8 else 4)
        return bits // 8 + self.scales.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def row(self, x: Tensor) -> Tensor:
        """Outputs [out] of one row [in], a new tensor, with nothing checked."""
        return run_map(self._kernel, self.map, x, x.new_empty(self.outputs), 1)

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [..., out] for inputs [..., in]."""
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, self.dequantised(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        rows = x.numel() // self.inputs
        if rows > self.most:
            return self._wide(x)
        flat = x.reshape(rows, self.inputs).float().contiguous()
        out = run_map(self._kernel, self.map, flat, flat.new_empty(rows, self.outputs), rows)
        return out.to(x.dtype).view(*x.shape[:-1], -1)

    def rows(self, start: int, stop: int | None) -> "CompiledLinear":
        """The map to outputs `start:stop`, in the same integers."""
        raise NotImplementedError

    def parts(self) -> Iterator[Tensor]:
        """The weights as numbers, some outputs after the others, float32 [n, in]."""
        raise NotImplementedError

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weights as numbers, [out, in]."""
        return torch.cat([part.to(dtype) for part in self.parts()])

    @cached_property
    @torch.inference_mode(False)
    @torch.no_grad()
    def _wide(self) -> Callable[[Tensor], Tensor]:
        """The map in torch's kernels, made when many rows first come where these are faster."""
        raise NotImplementedError

    def _part(self, packed: Tensor, scales: Tensor, start: int, stop: int) -> "CompiledLinear":
        bias = None if self.bias is None else self.bias[start:stop]
        part = type(self)(packed, scales, bias, (stop - start, self.inputs), self._largest)
        part.most = self.most
        return part

    def _blocks(self, blocks: int) -> Iterator[slice]:
        """Slices of so many blocks, which together hold not too many weights."""
        step = max(PART // (LANES * self.inputs), 1)
        return (slice(start, start + step) for start in range(0, blocks, step))


class CompiledInt8(CompiledLinear):
    """Weights in 8 bits, one scale an output."""

    kind = INT8

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> "CompiledInt8":
        """Made of a weight [out, in]."""
        integers, scale = round_rows(weight)
        return cls(
            LARGE_PAGES["int8"].copy(pack8(integers)), scale, bias, (len(weight), weight.shape[1]), largest_activation(integers)
        )

    def rows(self, start: int, stop: int | None) -> CompiledLinear:
        """The map to outputs `start:stop`, in the same integers."""
        start, stop, _ = slice(start, stop).indices(self.outputs)
        packed = self.packed[start // LANES : -(-stop // LANES)]
        if start % LANES or (stop % LANES and stop != self.outputs):
            first = start // LANES * LANES
            packed = pack8(unpack8(packed)[start - first : stop - first])
        return self._part(packed, self.scales[start:stop], start, stop)

    def parts(self) -> Iterator[Tensor]:
        """The weights as numbers, some outputs after the others, float32 [n, in]."""
        for part in self._blocks(len(self.packed)):
            scales = self.scales[part.start * LANES : part.stop * LANES]
            yield unpack8(self.packed[part])[: len(scales), : self.inputs] * scales.unsqueeze(1)

    @cached_property
    @torch.inference_mode(False)
    @torch.no_grad()
    def _wide(self) -> Callable[[Tensor], Tensor]:
        return Int8Linear(self.dequantised(torch.float32), self.bias)


class CompiledInt4(CompiledLinear):
    """Weights in 4 bits, a scale and an offset for each group of inputs."""

    kind = INT4

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> "CompiledInt4":
        """Made of a weight [out, in]."""
        outputs, inputs = weight.shape
        step = max(PART // (LANES * inputs), 1) * LANES
        parts = [_packed4(part) for part in weight.split(step)]
        packed, scales = (torch.cat(some) for some in zip(*parts, strict=True))
        pages = LARGE_PAGES["int4"]
        return cls(pages.copy(packed), pages.copy(scales), bias, (outputs, inputs), LARGEST)

    def rows(self, start: int, stop: int | None) -> CompiledLinear:
        """The map to outputs `start:stop`, in the same integers."""
        start, stop, _ = slice(start, stop).indices(self.outputs)
        blocks = slice(start // LANES, -(-stop // LANES))
        packed, scales = self.packed[blocks], self.scales[blocks]
        if start % LANES or (stop % LANES and stop != self.outputs):
            own = slice(start - blocks.start * LANES, stop - blocks.start * LANES)
            packed, scales = pack4(unpack4(packed)[own]), pack_scales(unpack_scales(scales)[:, own])
        return self._part(packed, scales, start, stop)

    def parts(self) -> Iterator[Tensor]:
        """The weights as numbers, some outputs after the others, float32 [n, in]."""
        for part in self._blocks(len(self.packed)):
            numbers = dequantise(unpack4(self.packed[part]), unpack_scales(self.scales[part]))
            yield numbers[: self.outputs - part.start * LANES, : self.inputs]

    @cached_property
    @torch.inference_mode(False)
    @torch.no_grad()
    def _wide(self) -> Callable[[Tensor], Tensor]:
        exact = self.dequantised(torch.float32)
        many = Int8Linear(exact, self.bias)
        rest = Int8Linear(exact - many.dequantised(exact.dtype), None, coarse=True)
        return lambda x: many(x) + rest(x)


def _packed4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Some outputs of a weight [n, in] -> packed integers and scales."""
    integers, scales = quantise(_padded(weight.float(), LANES, GROUP))
    return pack4(integers.to(torch.uint8)), pack_scales(scales.transpose(0, 1))


def pack8(integers: Tensor) -> Tensor:
    """Integers in [-127, 127], int8 [out, in] -> uint8 [blocks, in / 4, LANES, 4], of sizes filled up with zeros."""
    padded = _padded(integers, LANES, GROUP)
    fours = (padded.to(torch.int16) + CARRY).to(torch.uint8).unflatten(1, (-1, 4))[..., ORDER8]
    return fours.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()


def unpack8(packed: Tensor) -> Tensor:
    """The integers again, int8 [LANES * blocks, in], with what they were filled up with."""
    fours = packed.transpose(1, 2)[..., ORDER8]  # its own inverse
    return (fours.flatten(2).flatten(0, 1).to(torch.int16) - CARRY).to(torch.int8)


def pack4(integers: Tensor) -> Tensor:
    """Integers in [0, 15], uint8 [out, in] -> uint8 [blocks, in / 8, LANES, 4], of sizes filled up with zeros."""
    eights = _padded(integers, LANES, GROUP).unflatten(1, (-1, 8))
    fours = eights[..., LOW4] | eights[..., HIGH4] << 4
    return fours.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()


def unpack4(packed: Tensor) -> Tensor:
    """The integers again, uint8 [LANES * blocks, in], with what they were filled up with."""
    fours = packed.transpose(1, 2)  # [blocks, LANES, in / 8, 4]
    eights = fours.new_empty(*fours.shape[:-1], 8)
    eights[..., LOW4], eights[..., HIGH4] = fours & 15, fours >> 4
    return eights.flatten(2).flatten(0, 1)


def pack_scales(scales: Tensor) -> Tensor:
    """Scales and offsets [groups, out, 2] -> [blocks, groups, 2, LANES]."""
    filled = F.pad(scales, (0, 0, 0, -scales.shape[1] % LANES))
    return filled.unflatten(1, (-1, LANES)).permute(1, 0, 3, 2).contiguous()


def unpack_scales(scales: Tensor) -> Tensor:
    """Scales and offsets again, [groups, LANES * blocks, 2]."""
    return scales.permute(1, 0, 3, 2).flatten(1, 2)


def _padded(matrix: Tensor, outputs: int, inputs: int) -> Tensor:
    """A matrix [out, in] filled up with zeros to multiples of both."""
    missing = -matrix.shape[1] % inputs, -matrix.shape[0] % outputs
    return F.pad(matrix, (0, missing[0], 0, missing[1])) if any(missing) else matrix
