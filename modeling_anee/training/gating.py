"""What trains gates that open or stay shut, as pure functions of tensors: samples, schedules, losses.

A gate opens where its logit is above 0. Shapes: L layers, E exits.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus


SMALLEST = 1e-6  # of uniform random numbers, losses and spreads
NEWTON_STEPS = 30


# Samples


def logistic_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Differences of two Gumbel variables, float32 on the CPU."""
    uniform = torch.rand(shape, generator=generator).clamp_(SMALLEST, 1.0 - SMALLEST)
    return uniform.logit()


def gumbel_sigmoid(logits: Tensor, noise: Tensor, forward: float, backward: float) -> Tensor:
    """Gates [...] of 0 or 1, open with probability sigmoid(logits / forward); straight-through, with the gradient of a sigmoid.

    The two temperatures mean different things and are best apart (arXiv:2410.13331): how much is tried, and how far from its
    threshold a gate still learns.

    Args:
        logits: [...].
        noise: `logistic_noise` of the same shape.
        forward: temperature of the samples; at 0 the noise is without effect.
        backward: temperature of the sigmoid whose gradient is taken.
    """
    noisy = logits + forward * noise
    soft = torch.sigmoid(noisy / backward)
    return (noisy > 0).to(soft) + (soft - soft.detach())


# Schedules


def annealed(step: int, steps: int, first: float, last: float) -> float:
    """A temperature that falls from the first to the last of some steps, by the same factor in each."""
    return first * (last / first) ** (step / max(1, steps - 1))


def lowest_capacity(step: int, steps: int, lowest: float, falling: float) -> float:
    """The lowest capacity to train at: from 1.0 evenly down in a share `falling` of the steps, then it stays."""
    return max(lowest, 1.0 - (1.0 - lowest) * step / max(1.0, falling * steps)) if falling else lowest


def layer_dropout(layers: int, highest: float) -> Tensor:
    """Probability of shutting each layer, float32 [L]: 0 at the first, grown exponentially to `highest` (arXiv:2404.16710)."""
    depth = torch.arange(layers) / max(1, layers - 1)
    return highest * (torch.exp2(depth) - 1.0)


# Losses


def two_way(logits: Tensor) -> Tensor:
    """The logits of shut and of open [..., 2], around 0, of gates with logits [...]."""
    return torch.stack((-logits, logits), dim=-1) / 2


def z_loss(logits: Tensor) -> Tensor:
    """Mean square of the log partition function of logits [..., K]: keeps them small (ST-MoE, arXiv:2202.08906)."""
    return logits.float().logsumexp(dim=-1).square().mean()


def gate_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of gates that open with probability sigmoid(logits [...]), nats."""
    logits = logits.float()
    return (torch.sigmoid(logits) * softplus(-logits) + torch.sigmoid(-logits) * softplus(logits)).mean()


def capacity_penalty(gates: Tensor, capacity: float) -> Tensor:
    """Square of the distance between the share of open gates [...] and the asked one."""
    return (gates.float().mean() - capacity).square()


def misfit(predicted: Tensor, loss: Tensor) -> Tensor:
    """How badly predicted logarithms [...] fit losses [...]: least, on the mean, where exp(predicted) is the expected loss.

    The negative log-likelihood of an exponential distribution: losses vary in proportion to their size.
    """
    return (loss.detach() * (-predicted).exp() + predicted).mean()


def expectation(predicted: Tensor, loss: Tensor) -> tuple[float, float]:
    """Scale and shift of predicted logarithms [N] after which their exponentials are the expected losses [N]: the least misfit.

    What a regression predicts of tokens that it has not seen is too far from the mean: those said to lose least lose more.
    By Newton's method; the misfit is convex in both.
    """
    x, y = predicted.double(), loss.double().clamp(min=SMALLEST)
    mean, spread = x.mean(), x.std().clamp(min=SMALLEST)
    x = (x - mean) / spread
    basis = torch.stack((x, torch.ones_like(x)))
    solution = torch.stack((torch.zeros_like(mean), y.mean().log()))
    for _ in range(NEWTON_STEPS):
        weight = y * (-(solution @ basis)).exp()
        gradient = (basis * (1.0 - weight)).mean(dim=1)
        curvature = (basis * weight) @ basis.T / len(x)
        step = torch.linalg.solve(curvature + SMALLEST * torch.eye(2).to(curvature), gradient)
        solution -= step * (1.0 / step.abs().max()).clamp(max=1.0)
    scale = solution[0] / spread
    return float(scale), float(solution[1] - scale * mean)


# Exits


def shares_of_exits(leaves: Tensor) -> Tensor:
    """Where tokens leave: gates [..., E] of exits in their order -> shares [..., E + 1] that sum to 1, the last: at none."""
    stays = torch.cumprod(1.0 - leaves, dim=-1)
    reach = torch.cat((torch.ones_like(stays[..., :1]), stays[..., :-1]), dim=-1)
    return torch.cat((reach * leaves, stays[..., -1:]), dim=-1)


# Capacity


def threshold(scores: Tensor, capacity: float) -> float:
    """Score above which gates open, so that a share `capacity` of the scores [...] lies above."""
    flat = scores.detach().flatten().float().cpu().sort().values
    place = round((1.0 - capacity) * len(flat))
    if place <= 0:
        return -math.inf
    return math.inf if place >= len(flat) else float((flat[place - 1] + flat[place]) / 2)
