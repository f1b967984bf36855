"""The optimiser's loop that stages of gradient descent share: batches, schedule, checkpoints, a log line per step."""

import math

import torch
from torch import Tensor

from .checkpoint import load_optimizer, optimizer_tensors
from .run import Run


CLIP = 1.0  # norm of the gradient


def batch_of(windows: Tensor, settings, step: int, run: Run, seen: int = 0) -> Tensor:
    """This process's windows int64 [B, T] of one step: every window once before any comes again, after some `seen` before."""
    size = settings.batch_windows
    position = seen + torch.arange(step * size, (step + 1) * size)
    epochs = {int(epoch): order(len(windows), int(epoch), run) for epoch in (position // len(windows)).unique()}
    rows = torch.stack([epochs[int(p) // len(windows)][int(p) % len(windows)] for p in position])
    return run.rows(windows[rows]).to(run.device)


def order(count: int, epoch: int, run: Run) -> Tensor:
    """Random order of all windows in one epoch."""
    return torch.randperm(count, generator=run.generator("order", epoch))


def train(run: Run, name: str, parameters: dict[str, torch.nn.Parameter], loss_of_step) -> None:
    """AdamW on `loss_of_step(step, generator)`, from the last checkpoint on, with a log line per step.

    Args:
        run: gives settings (`steps`, `learning_rate`, `checkpoint_every`), randomness, checkpoints and the log.
        name: of the stage.
        parameters: what is trained, by name.
        loss_of_step: returns a scalar tensor, or a pair of it and a dict of scalar tensors for the log.
    """
    settings = run.settings(name)
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    start = restore(run, name, optimizer, parameters)
    for step in run.track(settings.steps, name, start):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * schedule(step, settings.steps, settings.warmup)
        result = loss_of_step(step, run.generator(name, step))
        loss, numbers = result if isinstance(result, tuple) else (result, {})
        optimizer.zero_grad()
        loss.backward()
        run.reduce_gradients(parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        optimizer.step()
        numbers = {"loss": loss, **numbers}
        means = {key: float(run.sum(value.detach()) / run.accelerator.num_processes) for key, value in numbers.items()}
        run.log(name, step, gradient_norm=float(norm), **means)
        if (step + 1) % settings.checkpoint_every == 0:
            run.save(name, step + 1, run.own() | optimizer_tensors(optimizer, list(parameters)))


def restore(run: Run, name: str, optimizer: torch.optim.Optimizer, parameters: dict) -> int:
    """Load the stage's checkpoint, if there is one; returns the step to go on with."""
    saved = run.load(name)
    if saved is None:
        return 0
    run.load_own(saved[1])
    load_optimizer(optimizer, list(parameters), saved[1])
    return saved[0]


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate: a linear rise, then half a cosine down to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
