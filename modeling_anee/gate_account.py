"""How a text keeps its capacity: thresholds follow what its routers have run above or below their shares so far.

Every layer keeps an account of its own, so that a token's decision needs nothing but what was decided for earlier tokens at
the same layer, and scoring a text is decoding it. What is calibrated on one kind of text so holds on another.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .step import Step


FEEDBACK = 0.1  # of a threshold (a logarithm of a loss), for each token that a layer has run too many


def choose(score: float, limits: Sequence[float], over: float) -> int:
    """Which of the variants a token takes, dearest first, whose layer has run `over` tokens too many before it."""
    limit_moved = score - FEEDBACK * over
    return sum(limit_moved <= limit for limit in limits)


def choose_in_turn(
    counts_as: Sequence[float], score: Tensor, limits: Tensor, shares: Tensor, row: Tensor, account: Tensor, asked: Tensor
) -> Tensor:
    """Variants int64 [N] of tokens chosen one after the other, in plain numbers.

    Args:
        counts_as: as how much of a feed-forward each variant counts.
        score: of the router, float64 [N].
        limits: thresholds, float64 [N, V - 1].
        shares: what tokens like each are to count as in the mean, float64 [N].
        row: number of each token's sequence, ascending, int64 [N]; within a sequence tokens come in their order.
        account: what the layer had run too many in each token's row before this forward, float64 [N].
        asked: False for tokens that leave instead, bool [N].
    """
    own: dict[int, float] = {}
    chosen = []
    columns = (row, score, limits, shares, account, asked)
    for number, said, levels, share, before, is_asked in zip(*(column.tolist() for column in columns), strict=True):
        over = own.get(number, before)
        choice = choose(said, levels, over)
        if is_asked:
            own[number] = over + counts_as[choice] - share
        chosen.append(choice)
    return torch.tensor(chosen, dtype=torch.int64, device="cpu")


def account_before(step: Step, layer: int) -> Tensor:
    """What a layer has run too many in each row before a step, float64 [B, T]."""
    if isinstance(step.account, float):
        return torch.zeros_like(step.budget)
    return step.account[..., layer].expand_as(step.budget)


def account_after(step: Step, above: Tensor) -> Tensor:
    """What each layer has run too many, up to and with each token, float64 [B, T, L]; `above`: by that token itself."""
    return step.account + step.places.running_sum(above)
