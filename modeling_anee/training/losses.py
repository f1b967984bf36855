"""Losses, as pure functions of tensors."""

import torch
from torch import Tensor


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of next-token distributions: logits [..., V] -> nats [...], at least 0 up to rounding."""
    teacher, student = teacher.float().log_softmax(dim=-1), student.float().log_softmax(dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def sampled_kl(head, teacher: Tensor, student: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Mean KL over a random sample of tokens, since the head costs as much as many layers.

    Args:
        head: final norm and head, [n, D] -> [n, V].
        teacher: final hidden states of the base, [B, T, D].
        student: the same of the model in training, [B, T, D].
        count: how many tokens to draw.
        generator: draws them.
    """
    teacher, student = teacher.flatten(0, 1), student.flatten(0, 1)
    chosen = torch.randperm(len(teacher), generator=generator)[:count].to(teacher.device)
    with torch.no_grad():
        target = head(teacher[chosen])
    return kl_divergence(target, head(student[chosen])).mean()


def relative_error(exact: Tensor, estimate: Tensor) -> Tensor:
    """Squared error of estimates [..., D] over the squared norm of what they stand for, [...]."""
    missed = (exact - estimate).float().square().sum(dim=-1)
    return missed / exact.float().square().sum(dim=-1).clamp(min=1e-12)
