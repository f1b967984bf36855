"""What a controller must beat at equal realised cost: random skips (or random layers in cheaper variants) and static plans.

Each control decides actions for whole windows at once and is scored as `perplexity.score` scores a model.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..actions import PROCESS
from ..bridges import Bridges
from ..budget import TOLERANCE
from ..data.windows import Window
from ..executor import Executor
from ..modeling_anee import AneeForCausalLM
from ..plans import PlanTable, plan_table
from .perplexity import Scores, score_with
from .rollout import begin, with_plan


class Followed(NamedTuple):
    """Final hidden states [B, T, D], actions uint8 [B, T, L], and variants of the head uint8 [B, T]; None: in full."""

    hidden: Tensor
    actions: Tensor
    head: Tensor | None = None


@dataclass(frozen=True)
class Control:
    """One way to spend a budget.

    Args:
        name: as it stands in tables.
        run: a batch of token ids int64 [B, T] and a budget -> what left the stack, and what was done.
        executor: what runs it; default: the model's own.
    """

    name: str
    run: Callable[[Tensor, float], Followed]
    executor: Executor | None = None

    def executor_of(self, model: AneeForCausalLM) -> Executor:
        """What runs it over a model, and knows what that costs."""
        return self.executor or model.executor


def score_control(
    model: AneeForCausalLM,
    control: Control,
    windows: Sequence[Window],
    budget: float,
    progress: Callable[[int], Any] | None = None,
) -> Scores:
    """Score windows under a control."""
    costs = control.executor_of(model).costs

    def run(ids: Tensor) -> tuple[Iterable[Tensor], Tensor]:
        hidden, actions, head = control.run(ids.to(model.device), budget)
        heads = [None] * len(hidden) if head is None else head
        rows = zip(model.stack.final_norm(hidden), heads, strict=True)
        # Row by row, since logits are large.
        return (model.head_logits(row, own) for row, own in rows), costs.of_plans(actions, head)

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
        Control("static plan, no bridges", bare.static, bare.executor),
        Control("static plan, same bridges", lambda ids, budget: static(model, ids, budget)),
    ]
    return found


def static(
    model: AneeForCausalLM, ids: Tensor, budget: float, table: PlanTable | None = None, executor: Executor | None = None
) -> Followed:
    """Run ids [B, T] by the plans nearest to the budget, of the model's own table unless another is given."""
    table = table or plan_table(model.config, model.costs)
    plans = plans_at(table, budget, ids.shape[1])
    return follow(model, ids, table.actions[plans], table.heads[plans], executor)


def plans_at(table: PlanTable, budget: float, tokens: int) -> Tensor:
    """The plan nearest to a budget of each of T tokens, int64 [T]."""
    index = torch.arange(tokens)
    return table.places(torch.full(index.shape, budget, dtype=torch.float64), index)


def random_skip(model: AneeForCausalLM, ids: Tensor, budget: float) -> Followed:
    """Every token of ids [B, T] gives up random layers, until it costs what its static plan would, its head that plan's.

    Layers are given up step by step, as `steps_down` has them: each token is between two steps.
    """
    generator = torch.Generator().manual_seed(0)
    table, steps = plan_table(model.config, model.costs), steps_down(model)
    plans = plans_at(table, budget, ids.shape[1])
    costs, goal = model.costs.of_actions(steps), model.costs.of_actions(table.actions[plans])  # [steps], [T]
    above = (costs >= goal.unsqueeze(1) - TOLERANCE).sum(dim=1).clamp(1, len(steps) - 1) - 1  # the step before, [T]
    dear, cheap = steps[above], steps[above + 1]  # [T, L]
    saving = of_each_layer(model, dear) - of_each_layer(model, cheap)
    noise = torch.rand(*ids.shape, saving.shape[-1], generator=generator).masked_fill(saving <= 0, 2.0)
    order = noise.argsort(dim=-1)
    ordered = saving.expand(*noise.shape).gather(-1, order)
    # The last layer is given up with the probability that makes the mean right.
    excess = ordered.cumsum(dim=-1) - (costs[above] - goal).unsqueeze(-1)
    keep = torch.rand(*ids.shape, 1, generator=generator, dtype=torch.float64) * ordered < excess
    chosen = torch.zeros_like(noise, dtype=torch.bool).scatter(-1, order, (excess < ordered) & ~keep)
    return follow(model, ids, torch.where(chosen & (saving > 0), cheap, dear), table.heads[plans])


def steps_down(model: AneeForCausalLM) -> Tensor:
    """From everything processed to the cheapest plan, actions uint8 [steps, L]; at least two.

    Each layer goes through the cheaper variants that any plan runs it in, whole, and ends with its action of the cheapest.
    """
    table = plan_table(model.config, model.costs)
    complete, ladders = model.config.table.complete, []
    for layer, last in enumerate(table.actions[0].tolist()):
        cost = model.costs.layers[layer].tolist()
        taken = {PROCESS, *(action for action in table.actions[:, layer].tolist() if complete[action])}
        ladders.append([*sorted((a for a in taken if cost[a] > cost[last]), key=lambda a: -cost[a]), last])
    height = max(2, *map(len, ladders))
    return torch.tensor([ladder + ladder[-1:] * (height - len(ladder)) for ladder in ladders], dtype=torch.uint8).T


def of_each_layer(model: AneeForCausalLM, actions: Tensor) -> Tensor:
    """Cost at each layer of actions [..., L], float64 [..., L]."""
    return model.costs.layers[torch.arange(actions.shape[-1]), actions.long()]


def follow(
    model: AneeForCausalLM, ids: Tensor, actions: Tensor, head: Tensor | None = None, executor: Executor | None = None
) -> Followed:
    """Run ids [B, T] by actions uint8 [..., L] and heads uint8 [...], of each token or of all, the kept first ones whole.

    The model's own executor runs them, unless another is given.
    """
    actions = with_plan(model, ids, actions)
    if head is not None:
        head = head.expand(ids.shape)
    hidden, step = begin(model, ids)
    hidden, _ = (executor or model.executor).run(hidden, step, given=actions)
    return Followed(hidden, actions, head)


class WithoutBridges:
    """The same model without its bridges: an executor of its own over the same base."""

    def __init__(self, model: AneeForCausalLM) -> None:
        model.prepare()  # the base may have been changed since it was wrapped
        self.model = model
        costs = model.stack.measure_costs(model.costs.hardware, table=model.config.table)
        none = Bridges(type(model.config)(text_config=model.config.text_config))  # of rank 0
        self.executor = Executor(model.stack, model.controller, none, costs, model.config.table)
        self.table = plan_table(model.config, costs)

    def static(self, ids: Tensor, budget: float) -> Followed:
        """The plans nearest to the budget."""
        return static(self.model, ids, budget, self.table, self.executor)
