"""Randomness that is a function of names and numbers, so there is no state to keep."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def derive_seed(*parts: str | int) -> int:
    """A seed below 2**63 for, say, a recipe's seed, a stage and a step."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """PyTorch's global generators are seeded inside, and as before after."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.random.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
