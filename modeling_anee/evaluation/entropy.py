"""Entropy and mutual information in bits, as pure functions of tensors."""

import math

import torch
from torch import Tensor


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in bits of distributions [..., K] -> [...]."""
    return torch.special.entr(probabilities).sum(dim=-1) / math.log(2)


def information(counts: Tensor) -> float:
    """Mutual information in bits of rows and columns, from counts int64 [C, A].

    What chance alone gives in the mean is taken off, to first order (Miller and Madow): few tokens would seem to tell much.
    """
    total = counts.sum()
    joint = counts.double() / total
    rows, columns = joint.sum(dim=1), joint.sum(dim=0)
    chance = (rows.count_nonzero() - 1) * (columns.count_nonzero() - 1) / (2 * math.log(2) * total)
    return max(float(entropy(rows) + entropy(columns) - entropy(joint.flatten()) - chance), 0.0)
