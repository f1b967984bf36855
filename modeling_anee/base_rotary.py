"""Rotary position embedding (RoFormer, arXiv:2104.09864) with cos and sin from the base's own module."""

from collections.abc import Callable

import torch
from torch import Tensor


Rotation = tuple[Tensor, Tensor]  # cos and sin, each [B or 1, T, 1, R]; sin is negated where a rotation subtracts


def prepare_rotation(cos: Tensor, sin: Tensor, interleaved: bool = False) -> Rotation:
    """Bring cos and sin [B, T, R] of a base's rotary embedding into the form that `rotate` takes."""
    sign = torch.ones(sin.shape[-1], dtype=sin.dtype, device=sin.device)
    if interleaved:
        sign[::2] = -1
    else:
        sign[: sin.shape[-1] // 2] = -1
    return cos.unsqueeze(2), (sin * sign).unsqueeze(2)


def rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Rotate the first R of E channels of x [B, T, heads, E]; channel i is paired with i + R / 2."""
    if rotation is None:
        return x
    cos, sin = rotation
    size = cos.shape[-1]
    turned, kept = x[..., :size], x[..., size:]
    swapped = turned.roll(size // 2, dims=-1)
    turned = (turned * cos + swapped * sin).to(x.dtype)  # olmo2's cos and sin are float32
    return turned if size == x.shape[-1] else torch.cat((turned, kept), dim=-1)


def rotate_in_place(x: Tensor, rotation: Rotation | None) -> None:
    """`rotate`, written over x [B, T, heads, E], which has the dtype of cos and sin; rounded alike."""
    if rotation is None:
        return
    cos, sin = rotation
    size = cos.shape[-1]
    turned = x if size == x.shape[-1] else x[..., :size]
    swapped = turned.roll(size // 2, dims=-1).mul_(sin)
    turned.mul_(cos).add_(swapped)


def rotate_interleaved(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Rotate all channels of x [B, T, heads, E] in float32, as cohere does; channel 2i is paired with 2i + 1."""
    if rotation is None:
        return x
    cos, sin = rotation
    full = x.float()
    swapped = full.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (full * cos + swapped * sin).to(x.dtype)


def rotate_function(interleaved: bool) -> Callable[[Tensor, Rotation | None], Tensor]:
    """How a family pairs channels."""
    return rotate_interleaved if interleaved else rotate
