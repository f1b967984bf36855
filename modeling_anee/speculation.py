"""What is kept of a draft: speculative decoding as tensor functions (Leviathan et al., arXiv:2211.17192).

Shapes: B rows, N logits, V tokens of the vocabulary.
"""

import math

import torch
from torch import Tensor


PART = 256  # entries of which the largest is found first: torch finds places far slower than values
CLOSE = {torch.float32: 5e-5, torch.float64: 1e-12}  # of the largest logit: three times what other kernels were seen to change


def largest_two(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first place of the largest of logits [N, V], int64 [N], the logit there, and the next to it in size, [N]."""
    size = math.gcd(logits.shape[-1], PART)
    if size * size < logits.shape[-1] // 4 or logits.shape[-1] // size < 2:  # parts that are too small, or only one
        two = logits.topk(2, dim=-1).values
        return logits.argmax(dim=-1), two[:, 0], two[:, 1]
    parts = logits.unflatten(-1, (-1, size))  # [N, parts, size]
    tops = parts.amax(dim=-1)
    part = tops.argmax(dim=-1, keepdim=True)
    inside = parts.gather(1, part.unsqueeze(-1).expand(-1, 1, size)).squeeze(1)
    place = inside.argmax(dim=-1, keepdim=True)
    top = inside.gather(1, place)
    lowest = torch.finfo(logits.dtype).min
    second = torch.maximum(tops.scatter(1, part, lowest).amax(dim=-1), inside.scatter(1, place, lowest).amax(dim=-1))
    return (part * size + place).squeeze(1), top.squeeze(1), second


def is_near_tie(top: Tensor, second: Tensor) -> Tensor:
    """Where two largest logits [N] are so near that rounding alone may decide which token is the likelier one, bool [N]."""
    return top - second <= top.abs() * CLOSE.get(top.dtype, torch.finfo(top.dtype).eps)


def accept(drafted: Tensor, draft: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    """Keep drafted tokens or draw others in their place: what comes out has the full model's distribution exactly.

    A token is kept with the probability min(1, full / draft); else another is drawn from what the draft left over of the full
    model's distribution, max(0, full - draft), normalised.

    Args:
        drafted: tokens drawn from `draft`, int64 [B].
        draft: probabilities of the draft, [B, V].
        full: probabilities of the full model, [B, V].

    Returns:
        tokens int64 [B], and which of them are those that were drafted and kept, bool [B].
    """
    place = drafted.unsqueeze(1)
    ratio = full.gather(1, place) / draft.gather(1, place)
    kept = (torch.rand_like(ratio) < ratio).squeeze(1)
    left = (full - draft).clamp_(min=0.0)
    left = torch.where(left.sum(dim=1, keepdim=True) > 0.0, left, full)  # the same distribution: nothing is ever refused
    other = torch.multinomial(left, num_samples=1).squeeze(1)
    return torch.where(kept, drafted, other), kept
