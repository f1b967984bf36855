"""Rewards and advantages of the reinforced controller, as pure functions of tensors. R rollouts per window, T tokens."""

import torch
from torch import Tensor


def following_mean(values: Tensor, horizon: int) -> Tensor:
    """Mean over each token and the `horizon - 1` after it, as far as there are any: [..., T] -> [..., T]."""
    sums = torch.nn.functional.pad(values.cumsum(dim=-1), (1, 0))
    tokens = values.shape[-1]
    start = torch.arange(tokens, device=values.device)
    stop = (start + horizon).clamp(max=tokens)
    return (sums[..., stop] - sums[..., start]) / (stop - start)


def quality(kl: Tensor, horizon: int) -> Tensor:
    """What a token's actions did to it and the tokens that follow, which see its keys and values: minus the mean KL, nats."""
    return -following_mean(kl, horizon)


def savings(cost: Tensor, quality: Tensor, gate: float) -> Tensor:
    """Share of the stack that was saved; nothing where quality is lost by more than `gate` nats."""
    return (1.0 - cost) * (quality >= -gate)


def adherence(cost: Tensor, budget: Tensor) -> Tensor:
    """Minus the distance between the mean cost of each rollout and its budget: costs [..., T], budgets [...] -> [..., 1]."""
    return -(cost.mean(dim=-1) - budget).abs().unsqueeze(-1)


def advantages(rewards: Tensor) -> Tensor:
    """Rewards against a baseline, the mean of the other rollouts of the same window, at unit scale: [W, R, T] -> the same.

    Leave-one-out baseline: REINFORCE made unbiased and of low variance (Kool et al., 2019).

    Raises:
        ValueError: a single rollout per window.
    """
    rollouts = rewards.shape[1]
    if rollouts < 2:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} is not allowed: a window needs at least 2 rollouts")
    centred = (rewards - rewards.mean(dim=1, keepdim=True)) * (rollouts / (rollouts - 1))
    return centred / centred.std().clamp(min=1e-6)


def policy_loss(log_probability: Tensor, advantage: Tensor, entropy: Tensor, entropy_bonus: float) -> Tensor:
    """REINFORCE with an entropy bonus; all [...], advantages without gradient."""
    return -(advantage.detach() * log_probability).mean() - entropy_bonus * entropy.mean()
