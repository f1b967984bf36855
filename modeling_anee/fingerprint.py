"""A fingerprint of a base's weights, to notice a base that the controllers were not made for.

It samples a few weights, so it takes milliseconds for a base of any size. Weights are compared as bfloat16 with one
unit of tolerance, so the same weights in another floating dtype have the same fingerprint.
"""

import hashlib

import torch
from torch import nn


SAMPLED_TENSORS = 16
SAMPLES_PER_TENSOR = 4
TOLERANCE = 2.0**-7  # one unit in the last place of bfloat16, relative
UNDERFLOW = 2.0**-14  # smallest normal number of float16


def fingerprint(base: nn.Module) -> str:
    """`"<hash of names and shapes>-<sampled weights in hex>"`; samples that are not in memory read `none`."""
    shapes = [(name, tuple(p.shape)) for name, p in base.named_parameters()]
    digest = hashlib.sha256(repr([type(base).__name__, shapes]).encode()).hexdigest()[:16]
    samples = [_samples(p) for p in _sampled_tensors(base)]
    return "-".join([digest, *samples])


def same_base(first: str, second: str) -> bool:
    """Whether two fingerprints can be of the same weights."""
    if not first or not second:
        return True
    parts, others = first.split("-"), second.split("-")
    if parts[0] != others[0] or len(parts) != len(others):
        return False
    return all(_close(a, b) for a, b in zip(parts[1:], others[1:], strict=True) if "none" not in (a, b))


def _sampled_tensors(base: nn.Module) -> list[torch.Tensor]:
    matrices = [p for _, p in base.named_parameters() if p.dim() > 1]
    count = min(SAMPLED_TENSORS, len(matrices))
    return [matrices[i * (len(matrices) - 1) // max(count - 1, 1)] for i in range(count)]


def _samples(parameter: torch.Tensor) -> str:
    if parameter.is_meta or not parameter.is_floating_point():
        return "none"
    total = parameter.numel()
    places = [(2 * i + 1) * total // (2 * SAMPLES_PER_TENSOR) for i in range(SAMPLES_PER_TENSOR)]
    columns = parameter.shape[-1]
    rows = parameter.detach().reshape(-1, columns) if parameter.is_contiguous() else parameter.detach().flatten(0, -2)
    index = torch.tensor(places, device=parameter.device)
    values = rows[index // columns, index % columns].to("cpu", torch.bfloat16)
    return values.view(torch.int16).numpy().tobytes().hex()


def _close(first: str, second: str) -> bool:
    a, b = (torch.frombuffer(bytearray.fromhex(text), dtype=torch.bfloat16).float() for text in (first, second))
    return bool(((a - b).abs() <= TOLERANCE * torch.maximum(a.abs(), b.abs()) + UNDERFLOW).all())
