"""Corrections: what the rounding of weights loses along a few directions of their inputs, added again.

Inputs of a linear map lie mostly along a few directions (their mean is one), so that most of what rounded weights lose of the
outputs is lost there. An artifact has the directions alone; what the base's weights lose along them follows from the weights
when a variant is made. Low-rank error reconstruction, as in LQER (arXiv:2402.02446), with the left factor left out. Of a map
that is given a part of its inputs, how far these lie along each direction tells what the others would have added.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


HEAD, PART = "head", "part_"  # before the name of a map: where it is given a part of its inputs
SEEN = 0.1  # of what is seen of the clearest direction in a part of the inputs: of less nothing is concluded
LEVELS = 127  # of what is lost, on both sides of zero


class Corrections(nn.Module):
    """Directions of the inputs of linear maps, by the map's name: orthonormal rows [L, rank, in], of the head [rank, in].

    Zeros, as they are before they are found or loaded, correct nothing.

    Args:
        shapes: by name, as `config.corrections` has them; None for none.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]] | None = None) -> None:
        super().__init__()
        for name, shape in (shapes or {}).items():
            self.register_buffer(name, torch.zeros(*shape))

    @classmethod
    def of(cls, directions: Mapping[str, Tensor]) -> "Corrections":
        """Those of such directions."""
        made = cls()
        for name, own in directions.items():
            made.register_buffer(name, own)
        return made

    @property
    def shapes(self) -> dict[str, list[int]]:
        """What `config.corrections` has to be for them."""
        return {name: list(own.shape) for name, own in self.named_buffers()}

    def of_layer(self, layer: int) -> dict[str, Tensor]:
        """Directions [rank, in] of the maps of a layer, by name."""
        return {name: own[layer] for name, own in self.named_buffers() if name != HEAD}

    def of_head(self) -> Tensor | None:
        """Directions [rank, in] of the head, None without any."""
        return self._buffers.get(HEAD)


class Rounded(Protocol):
    """A linear map in rounded weights."""

    weight_bytes: Any
    row: Any
    rows: Any

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [..., out] for inputs [..., in]."""

    def parts(self) -> Iterator[Tensor]:
        """The weights as numbers, some outputs after the others, float32 [n, in]."""


class CorrectedLinear:
    """A linear map in rounded weights, and a map of low rank for what they lose: x [..., in] -> [..., out].

    Args:
        rounded: the map.
        directions: [rank, in], each as long as one step of `lost`.
        lost: what is lost of the outputs along each, in steps, int8 [rank, out]: of a wide head it is the larger part.
    """

    def __init__(self, rounded: Rounded, directions: Tensor, lost: Tensor) -> None:
        self.rounded, self.directions, self.lost = rounded, directions, lost

    @classmethod
    def of(cls, rounded: Rounded, weight: Tensor, directions: Tensor, inputs: Tensor | None = None) -> "CorrectedLinear":
        """Correct a map.

        Args:
            rounded: the map.
            weight: what it was made of, [out, in].
            directions: orthonormal rows [rank, in].
            inputs: places of those that the map is given, int64 [n]; None: all.
        """
        directions = directions.to(weight.device, weight.dtype)
        seen = own = directions if inputs is None else directions[:, inputs]
        if inputs is not None:
            seen = torch.linalg.pinv(own.float().T, rtol=SEEN).to(weight.dtype)
        lost = lost_along(rounded, weight, directions, own).float()
        steps = (lost.abs().amax(dim=0) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)  # [rank]
        return cls(rounded, seen * steps.unsqueeze(1).to(seen.dtype), (lost / steps).round().to(torch.int8).t())

    @property
    def weight_bytes(self) -> int | None:
        """Bytes of weights that a row reads; None: those of the base's own, and `extra_bytes`."""
        return None if self.rounded.weight_bytes is None else self.rounded.weight_bytes + self.extra_bytes

    @property
    def extra_bytes(self) -> int:
        """Bytes of the correction."""
        return self.directions.nbytes + self.lost.nbytes

    @property
    def extra_flops(self) -> float:
        """Floating point operations of the correction of a row."""
        return 2.0 * (self.directions.numel() + self.lost.numel())

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [..., out] for inputs [..., in]."""
        return F.linear(x, self.directions) @ self.lost.to(x.dtype) + self.rounded(x)

    def row(self, x: Tensor) -> Tensor:
        """Outputs [out] of one row [in], a new tensor, with nothing checked."""
        return self.rounded.row(x).addmv_(self.lost.t().to(x.dtype), torch.mv(self.directions, x))

    def rows(self, start: int, stop: int | None) -> "CorrectedLinear":
        """The map to outputs `start:stop`."""
        return CorrectedLinear(self.rounded.rows(start, stop), self.directions, self.lost[:, start:stop])


@torch.no_grad()
def lost_along(rounded: Rounded, weight: Tensor, directions: Tensor, own: Tensor) -> Tensor:
    """What a map takes from outputs [out] along directions [rank, in], in its own inputs [rank, n]; [out, rank]."""
    lost, start = weight.new_empty(len(weight), len(directions)), 0
    for part in rounded.parts():
        stop = start + len(part)
        lost[start:stop] = weight[start:stop].float() @ directions.T.float() - part @ own.T.float()
        start = stop
    return lost
