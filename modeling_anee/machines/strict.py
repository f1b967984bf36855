"""Plans of a model as they are: every token takes the same one, whoever controls the model."""

from collections.abc import Sequence
from typing import Any

import torch

from ..base_variants import precisions
from ..modeling_anee import AneeForCausalLM


CARRIED = ("bridge_rank", "bridge_layers", "ffn_bridge_rank", "ffn_bridge_layers", "corrections", "narrow", "orders")


def strict_plans(model: AneeForCausalLM, plans: Sequence[str]) -> AneeForCausalLM:
    """A `plan` wrapper of a base with all that stands in or corrects in a model, at whose budgets all tokens take one plan.

    The variants that the plans need are made once more beside those of the model.
    """
    fields: dict[str, Any] = {name: getattr(model.config, name) for name in CARRIED}
    every = list(dict.fromkeys([*(model.config.precisions or ()), *precisions()]))
    fields |= {"precisions": every, "plans": list(plans), "budget_mode": "strict", "keep_first_tokens": 0}
    wrapper = AneeForCausalLM.from_base(model.base, controller="plan", **fields)
    kept = {name: value for name, value in model.bridges.state_dict().items() if not name.startswith("exit.")}
    wrapper.bridges.load_state_dict(kept)
    wrapper.corrections.load_state_dict(model.corrections.state_dict())
    wrapper.orders.load_state_dict(model.orders.state_dict())
    wrapper.prepare()
    return wrapper


def cost_of(model: AneeForCausalLM, plan: str) -> float:
    """What a token costs in a plan, as a share of the whole model: the budget that asks for it."""
    table, layers = model.config.table, model.config.num_layers
    actions = torch.tensor(table.plan(plan, layers), dtype=torch.uint8)
    return float(model.costs.of_plans(actions, torch.tensor(table.head_of(plan))))
