"""The plan to take for a speed: the best that is predicted to keep it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..plans import listed_plans
from .prediction import Predicted, Times
from .workload import Counter


@dataclass(frozen=True)
class Candidate:
    """A plan and what is predicted of it.

    Args:
        plan: in short.
        budget: what it costs, as a share of the whole model in the model's unit: the `energy_budget` that asks for it.
        times: of one token of every row.
    """

    plan: str
    budget: float
    times: Times


def candidates(model: Any, predicted: Predicted, batch: int, context: int, advance: Callable[[int], Any]) -> list[Candidate]:
    """The plans of a model with their predictions, best quality first: everything in full, then in the configuration's order.

    Plans of an artifact are listed by what was lost when they were searched for, and so are those that any base has.
    """
    table, counter = model.config.table, Counter.of(model)
    plans, heads = listed_plans(model.config)
    found: dict[str, Candidate] = {}
    for actions, head in [([0] * model.config.num_layers, 0), *zip(plans, heads, strict=True)]:
        text = table.text(actions, head)
        budget = float(model.costs.of_plans(torch.tensor(actions, dtype=torch.uint8), torch.tensor(head)))
        if text not in found:
            found[text] = Candidate(text, budget, predicted.decode(counter.workload(text), batch, context))
        advance(1)
    return list(found.values())


def choose(listed: list[Candidate], most_ms: float) -> Candidate:
    """The first plan that takes at most so many milliseconds.

    Raises:
        ValueError: none does; the message has the fastest.
    """
    chosen = next((one for one in listed if one.times.total <= most_ms), None)
    if chosen is None:
        fastest = min(listed, key=lambda one: one.times.total)
        raise ValueError(
            f"no plan is predicted to take {most_ms:.4g} ms or less: the fastest of {len(listed)} takes "
            f"{fastest.times.total:.4g} ms ({fastest.plan})"
        )
    return chosen
