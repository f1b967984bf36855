"""How fast a base runs and trains on this machine: measured once, so that stages can be fitted to a time."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..data.randomness import derive_seed
from ..evaluation.rollout import run as run_tokens
from ..modeling_anee import AneeForCausalLM
from ..plans import plan_table
from .losses import kl_divergence
from .stages.bridges import sample_actions
from .stages.closed_form import Moments, solve


BUDGETS = (0.5, 0.95)  # that the step of training is measured at


@dataclass(frozen=True)
class Speed:
    """Seconds on this machine.

    Args:
        length: tokens of a window.
        forward: of the base on one window, its head included.
        step: of training on one window: the base's forward, one that leaves something out, and the backward of that.
        solve: of one bridge in closed form.
    """

    length: int
    forward: float
    step: float
    solve: float


def measure_speed(model: AneeForCausalLM, length: int) -> Speed:
    """Measure a wrapped base that has bridges, on random tokens.

    Args:
        model: where it is to be measured.
        length: tokens of a window.
    """
    device = next(model.base.parameters()).device
    generator = torch.Generator().manual_seed(derive_seed("speed", length))
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(device)
    table = plan_table(model.config, model.costs)

    def forward() -> None:
        with torch.no_grad():
            model.stack.logits(run_tokens(model, ids))

    def step() -> None:
        actions = sample_actions(model, table, ids, BUDGETS, generator)
        with torch.no_grad():
            target = model.stack.logits(run_tokens(model, ids))
        kl_divergence(target, model.stack.logits(run_tokens(model, ids, actions))).mean().backward()
        model.zero_grad()

    forward()  # the first one also chooses kernels
    step()
    return Speed(length, _seconds(forward, device), _seconds(step, device), _seconds(_solving(model, device), device))


def _solving(model: AneeForCausalLM, device: torch.device) -> Callable[[], object]:
    """What solves one bridge, of random moments."""
    size = model.config.text_config.hidden_size
    moments = Moments(size, device)
    moments.add(torch.randn(2 * size, size, device=device), torch.randn(2 * size, size, device=device))
    return lambda: solve(moments, model.config.bridge_rank, 0.001)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    """For what may still be running on a device when its call has returned."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
