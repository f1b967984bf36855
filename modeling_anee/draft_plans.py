"""Plans that draft: what they are made of, and what they cost."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .actions import FULL, PROCESS, ActionTable
from .base_block import norm_function
from .base_model import BaseStack
from .configuration_drafts import DEFAULT, draft_table
from .costs import CostTable
from .feed import StraightPlan
from .layer_runner import LayerRunner


def draft_texts(precisions: Sequence[str] | None, layers: int) -> list[str]:
    """Plans to draft with where nobody measured others: every layer in one precision, the head in it or in the dearest."""
    names = list(precisions or DEFAULT)
    pairs = dict.fromkeys((name, head) for name in names for head in (names[0], name))
    return [f"{layers}*{name.upper()} / {head}" for name, head in pairs]


def full_plan(model: Any) -> StraightPlan:
    """The whole model, as a budget of 1 runs it; made when it is first asked for."""
    known, layers = model.executor.drafts, model.config.num_layers
    text = model.config.table.text([PROCESS] * layers)
    if text not in known:
        stack = model.stack
        head = partial(_logits, stack.final_norm, stack.head_of(FULL))
        known[text] = StraightPlan(text, [PROCESS] * layers, head, model.executor.layers)
    return known[text]


def draft_plans(model: Any, texts: Sequence[str]) -> list[StraightPlan]:
    """Plans by what they are in short, ready to be run; the weights that they need are made.

    Raises:
        ValueError: a plan that the base can't run, that leaves the stack early, or that is none.
    """
    stack, config = model.stack, model.config
    table = draft_table(config.table, config.precisions)
    costs, layers = model.costs, model.executor.layers
    if table != config.table:
        costs = stack.measure_costs(costs.hardware, model.bridges, table)
        layers = LayerRunner(stack, model.bridges, costs, table, None)
    read = costs if costs.unit == "bytes" else stack.measure_costs("bytes", model.bridges, table)
    return [_plan(stack, table, layers, (costs, read), text) for text in texts]


def _plan(
    stack: BaseStack, table: ActionTable, layers: LayerRunner, costs: tuple[CostTable, CostTable], text: str
) -> StraightPlan:
    actions, place = table.plan(text, len(stack.blocks)), table.head_of(text)
    if any(table[action].leaves for action in actions):
        raise ValueError(f"plan {text!r} is not allowed as a draft: it leaves the stack early")
    taken, head = torch.tensor(actions, dtype=torch.uint8, device="cpu"), torch.tensor(place, device="cpu")
    cost, read = (float(one.of_plans(taken, head)) for one in costs)
    logits = partial(_logits, norm_function(stack.final_norm), stack.head_of(table.heads[place]))
    return StraightPlan(table.text(actions, place), actions, logits, layers, cost, read)


def _logits(norm: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """Logits [..., V] of what leaves the last layer [..., D]."""
    return head(norm(hidden))
