"""Controls that anybody can have: the whole base in 8 or in 4 bits, all tokens alike.

Each is a `plan` wrapper over the very base that is measured, with a single cost; nothing of the base is copied, its weights
are only rounded once more beside it.
"""

from dataclasses import dataclass

import torch
from transformers.utils import logging

from ..modeling_anee import AneeForCausalLM


logger = logging.get_logger("transformers.anee")  # follows the verbosity of transformers

INT8, INT4, ALL_INT4 = "uniform INT8", "uniform INT4, INT8 head", "uniform INT4"
PLANS = {INT8: "INT8 / int8", INT4: "INT4 / int8", ALL_INT4: "INT4 / int4"}  # of one layer
PRECISIONS = ("int8", "int4")


@dataclass(frozen=True)
class Uniform:
    """The base in one precision.

    Args:
        name: as it stands in tables.
        model: runs the base so at `budget`, every token, the first ones too.
        budget: the one that chooses this precision.
        cost: of a token, as a share of the whole model, in the unit of the model that it is compared with.
    """

    name: str
    model: AneeForCausalLM
    budget: float
    cost: float


def uniform_precisions(model: AneeForCausalLM) -> list[Uniform]:
    """The base of a model in each precision; none, and a warning why, where it can't be run so."""
    layers = model.config.num_layers
    plans = {name: f"{layers}*{plan}" for name, plan in PLANS.items()}
    try:
        wrapper = AneeForCausalLM.from_base(
            model.base, controller="plan", precisions=[*PRECISIONS], plans=list(plans.values()), keep_first_tokens=0
        )
        for precision in PRECISIONS:
            wrapper.stack.head_of(precision)
    except ValueError as error:
        logger.warning(f"uniform INT8 and INT4 are left out of the controls: {error}")
        return []
    table = wrapper.config.table
    actions = torch.tensor([table.plan(plan, layers) for plan in plans.values()], dtype=torch.uint8)
    heads = torch.tensor([table.head_of(plan) for plan in plans.values()], dtype=torch.uint8)
    budgets = wrapper.costs.of_plans(actions, heads).tolist()  # in bytes, in which they differ
    same_unit = model.costs.unit == wrapper.costs.unit
    own = wrapper.costs if same_unit else wrapper.stack.measure_costs(model.costs.hardware, table=table)
    costs = own.of_plans(actions, heads).tolist()
    return [Uniform(name, wrapper, *figures) for name, *figures in zip(plans, budgets, costs, strict=True)]
