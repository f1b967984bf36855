"""Bridges tuned together: distillation from the base while budgets and actions are sampled, so one set serves every budget.

Most steps give every token a budget of its own, so that each step sees all of them and gradients vary less; the others
give a whole batch one budget, as it is when the model is used.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...evaluation.rollout import logits_of, with_plan
from ...evaluation.rollout import run as run_tokens
from ...modeling_anee import AneeForCausalLM
from ...plans import PlanTable, plan_table
from ..losses import kl_divergence
from ..optimise import batch_of, train
from ..run import Run


NAME = "bridges"
TOKENWISE = 0.75  # share of the steps in which every token has a budget of its own


def run_stage(run: Run) -> dict:
    """Tune the bridges for `steps` steps of `batch_windows` windows."""
    settings, model = run.settings(NAME), run.model
    parameters = {
        name: p for name, p in run.own_parameters().items() if name.startswith(("bridges.skip.", "bridges.skip_ffn."))
    }
    table = plan_table(model.config, model.costs)
    dearest_with_gaps(model, table)  # refuses before anything is trained
    windows = run.windows("train")

    def loss_of_step(step: int, generator: torch.Generator) -> Tensor:
        return loss_of(model, table, batch_of(windows, settings, step, run), tuple(settings.budgets), generator)

    train(run, NAME, parameters, loss_of_step)
    return {}


def sample_plans(
    model: AneeForCausalLM,
    table: PlanTable,
    ids: Tensor,
    budgets: tuple[float, float],
    generator: torch.Generator,
    dearest: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Actions uint8 [B, T, L] and heads uint8 [B, T] of plans of random budgets, up to the dearest that is of use."""
    tokenwise = float(torch.rand(1, generator=generator)) < TOKENWISE
    drawn = torch.rand(ids.numel() if tokenwise else 1, generator=generator, dtype=torch.float64)
    budget = spread(budgets, drawn).clamp(max=dearest)
    # Between two plans a random one: an index of the golden-ratio sequence.
    index = torch.randint(0, 1 << 20, drawn.shape, generator=generator)
    places = table.places(budget, index).view(ids.shape if tokenwise else 1).expand(ids.shape)
    return with_plan(model, ids, table.actions[places]), table.heads[places]


def dearest_with_gaps(model: AneeForCausalLM, table: PlanTable) -> float:
    """Cost of the dearest plan that leaves anything out, which bridges can stand for.

    Raises:
        ValueError: no plan does.
    """
    gaps = with_gaps(model, table)
    if not gaps.any():
        raise ValueError("no plan leaves anything out, so no bridge can be tuned: leave the stage out, or seek cheaper plans")
    return float(table.costs[gaps].max())


def with_gaps(model: AneeForCausalLM, table: PlanTable) -> Tensor:
    """Which plans leave anything out that bridges can stand for, bool [plans]."""
    return model.config.table.gaps[table.actions.long()].any(dim=1)


def spread(budgets: Sequence[float], drawn: Tensor) -> Tensor:
    """Budgets between the lowest and the highest, for uniform random numbers in [0, 1).

    What they leave out is uniform on a logarithmic scale: the loss at a high budget is small and would else count little.
    """
    most, least = (1.0 - budget for budget in budgets)
    return 1.0 - least * (most / least) ** drawn


def loss_of(
    model: AneeForCausalLM, table: PlanTable, ids: Tensor, budgets: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """KL to the base of a batch of windows int64 [B, T] at random budgets."""
    actions, heads = sample_plans(model, table, ids, budgets, generator, dearest_with_gaps(model, table))
    with torch.no_grad():
        target = model.stack.logits(run_tokens(model, ids))
    return kl_divergence(target, logits_of(model, run_tokens(model, ids, actions), heads)).mean()
