"""What a controller must beat at equal realised cost: random skips and static plans.

Each control decides actions for whole windows at once and is scored as `perplexity.score` scores a model.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..actions import PROCESS
from ..bridges import Bridges
from ..costs import CostTable
from ..data.windows import Window
from ..executor import Executor
from ..modeling_anee import AneeForCausalLM
from ..plans import PlanTable, plan_table
from .perplexity import Scores, score_with
from .rollout import begin, run_layers, with_plan


@dataclass(frozen=True)
class Control:
    """One way to spend a budget.

    Args:
        name: as it stands in tables.
        run: a batch of token ids int64 [B, T] and a budget -> final hidden states [B, T, D] and actions uint8 [B, T, L].
        bridged: whether its skips are charged for bridges.
    """

    name: str
    run: Callable[[Tensor, float], tuple[Tensor, Tensor]]
    bridged: bool = True


def score_control(
    model: AneeForCausalLM,
    control: Control,
    windows: Sequence[Window],
    budget: float,
    progress: Callable[[int], Any] | None = None,
) -> Scores:
    """Score windows under a control."""
    costs = model.costs if control.bridged else bare_costs(model)

    def run(ids: Tensor) -> tuple[Iterable[Tensor], Tensor]:
        hidden, actions = control.run(ids.to(model.device), budget)
        return (model.stack.logits(row) for row in hidden), costs.of_plans(actions)  # row by row: logits are large

    where = f"budget {budget:g}, {control.name}"
    return score_with(run, windows, True, where, progress=progress)


def controls(model: AneeForCausalLM) -> list[Control]:
    """Every control of an artifact with plans and bridges.

    Raises:
        ValueError: the cheapest plan exits, so its layers can't be left out one by one.
    """
    if model.config.table.leaving[plan_table(model.config, model.costs).actions[0].long()].any():
        raise ValueError("plans with EXIT are not allowed for the controls: they leave out layers one by one")
    bare = WithoutBridges(model)
    found = [
        Control("random skip, same bridges", lambda ids, budget: random_skip(model, ids, budget)),
        Control("static plan, no bridges", bare.static, bridged=False),
        Control("static plan, same bridges", lambda ids, budget: static(model, ids, budget)),
    ]
    return found


def static(model: AneeForCausalLM, ids: Tensor, budget: float, table: PlanTable | None = None) -> tuple[Tensor, Tensor]:
    """Run ids [B, T] by the plans nearest to the budget: hidden states [B, T, D] and actions [B, T, L]."""
    table = table or plan_table(model.config, model.costs)
    index = torch.arange(ids.shape[1])
    plan = table.choose(torch.full(index.shape, budget, dtype=torch.float64), index)
    return follow(model, ids, plan.expand(len(ids), -1, -1))


def random_skip(model: AneeForCausalLM, ids: Tensor, budget: float) -> tuple[Tensor, Tensor]:
    """Every token leaves out random layers, among those that the cheapest plan leaves out, until it meets the budget.

    Takes ids [B, T]; returns hidden states [B, T, D] and actions [B, T, L].
    """
    generator = torch.Generator().manual_seed(0)
    cheapest = plan_table(model.config, model.costs).actions[0]
    saving = model.costs.layers[:, PROCESS] - model.costs.layers.gather(1, cheapest.long().unsqueeze(1)).squeeze(1)
    noise = torch.rand(*ids.shape, len(saving), generator=generator).masked_fill(saving <= 0, 2.0)
    order = noise.argsort(dim=-1)
    saved = saving[order].cumsum(dim=-1)
    # The last layer is left out with the probability that makes the mean right.
    excess = saved - (1.0 - budget)
    keep = torch.rand(*ids.shape, 1, generator=generator, dtype=torch.float64) * saving[order] < excess
    chosen = torch.zeros_like(noise, dtype=torch.bool).scatter(-1, order, (excess < saving[order]) & ~keep)
    return follow(model, ids, torch.where(chosen & (saving > 0), cheapest, PROCESS).to(torch.uint8))


def follow(model: AneeForCausalLM, ids: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Run ids [B, T] by actions uint8 [B, T, L], the kept first tokens in full: hidden states [B, T, D] and the actions."""
    actions = with_plan(model, ids, actions)
    hidden, step = begin(model, ids)
    return run_layers(model, hidden, step, actions, range(actions.shape[-1])), actions


def bare_costs(model: AneeForCausalLM) -> CostTable:
    """Costs of the model without its bridges."""
    return model.stack.measure_costs(model.config.cost_unit, table=model.config.table)


class WithoutBridges:
    """The same model, its bridges taken out while it runs."""

    def __init__(self, model: AneeForCausalLM) -> None:
        self.model = model
        costs = bare_costs(model)
        none = Bridges(type(model.config)(text_config=model.config.text_config))  # of rank 0
        self.executor = Executor(model.stack, model.controller, none, costs, model.config.table)
        self.table = plan_table(model.config, costs)

    def static(self, ids: Tensor, budget: float) -> tuple[Tensor, Tensor]:
        """The plans nearest to the budget."""
        model = self.model
        executor, model.executor = model.executor, self.executor
        try:
            return static(model, ids, budget, self.table)
        finally:
            model.executor = executor
