"""Bridges tuned together: distillation from the base while budgets and actions are sampled, so one set serves every budget.

Most steps give every token a budget of its own, so that each step sees all of them and gradients vary less; the others
give a whole batch one budget, as it is when the model is used.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..modeling_anee import AneeForCausalLM
from ..plans import PlanTable, plan_table
from .checkpoint import load_optimizer, optimizer_tensors
from .losses import kl_divergence
from .rollout import run as run_tokens
from .rollout import with_plan
from .run import Run


NAME = "bridges"
TOKENWISE = 0.75  # share of the steps in which every token has a budget of its own
CLIP = 1.0  # norm of the gradient


def run_stage(run: Run) -> dict:
    """Tune the bridges for `steps` steps of `batch_windows` windows."""
    settings, model = run.settings(NAME), run.model
    parameters = {
        name: p for name, p in run.own_parameters().items() if name.startswith(("bridges.skip.", "bridges.skip_ffn."))
    }
    table = plan_table(model.config, model.costs)
    windows = run.windows("train")
    train(run, NAME, parameters, lambda step, generator: loss_of(run, table, batch_of(windows, settings, step, run), generator))
    return {}


def sample_actions(model: AneeForCausalLM, table: PlanTable, ids: Tensor, budgets: tuple[float, float], generator) -> Tensor:
    """Actions uint8 [B, T, L] of random budgets."""
    tokenwise = float(torch.rand(1, generator=generator)) < TOKENWISE
    drawn = torch.rand(ids.numel() if tokenwise else 1, generator=generator, dtype=torch.float64)
    budget = spread(budgets, drawn).clamp(max=table.costs[-2])  # the base's own plan has nothing to train
    # Between two plans a random one: an index of the golden-ratio sequence.
    index = torch.randint(0, 1 << 20, drawn.shape, generator=generator)
    plan = table.choose(budget, index)
    return with_plan(model, ids, plan.view(*ids.shape, -1) if tokenwise else plan[0])


def spread(budgets: Sequence[float], drawn: Tensor) -> Tensor:
    """Budgets between the lowest and the highest, for uniform random numbers in [0, 1).

    What they leave out is uniform on a logarithmic scale: the loss at a high budget is small and would else count little.
    """
    most, least = (1.0 - budget for budget in budgets)
    return 1.0 - least * (most / least) ** drawn


def loss_of(run: Run, table: PlanTable, ids: Tensor, generator: torch.Generator) -> Tensor:
    """KL to the base of a batch of windows int64 [B, T] at random budgets."""
    model, settings = run.model, run.settings(NAME)
    actions = sample_actions(model, table, ids, tuple(settings.budgets), generator)
    with torch.no_grad():
        teacher = run_tokens(model, ids)
        target = model.stack.logits(teacher)
    return kl_divergence(target, model.stack.logits(run_tokens(model, ids, actions))).mean()


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
