"""Running token windows through a model with given actions, with gradients where its modules want them.

Shapes: B rows, T tokens, L layers, D hidden size.
"""

import torch
from torch import Tensor

from ..actions import PROCESS
from ..ledger import Ledger
from ..modeling_anee import AneeForCausalLM, AneeModel
from ..step import Step


def begin(model: AneeModel, ids: Tensor, budget: float = 0.0) -> tuple[Tensor, Step]:
    """Token ids int64 [B, T] -> hidden states [B, T, D] that enter the first layer, and the step to run them in.

    The budget matters where a controller decides; given actions ask for none.
    """
    model.prepare()  # the base may have been changed since it was wrapped
    return model.begin(input_ids=ids, energy_budget=budget)


def run_layers(
    model: AneeModel, hidden: Tensor, step: Step, actions: Tensor, layers: range, keep: list[Tensor] | None = None
) -> Tensor:
    """Hidden states [B, T, D] through some of the layers, with actions uint8 [B, T, L]; `keep` gets what enters each."""
    ledger = Ledger(actions=actions, spent=torch.zeros(actions.shape[:2], dtype=torch.float64))
    return model.executor.layers.run(hidden, step, ledger, layers, keep)


def run(model: AneeModel, ids: Tensor, actions: Tensor | None = None, keep: list[Tensor] | None = None) -> Tensor:
    """Token ids [B, T] -> hidden states [B, T, D] that enter the final norm; without actions, those of the base."""
    if actions is None:
        actions = processed(model, ids)
    hidden, step = begin(model, ids)
    hidden = run_layers(model, hidden, step, actions, range(actions.shape[-1]), keep)
    return model.executor.translate(hidden, actions)


def logits_of(model: AneeForCausalLM, hidden: Tensor, heads: Tensor) -> Tensor:
    """Logits [..., V] of hidden states [..., D] that enter the final norm, by heads in variants uint8 [...]."""
    return model.head_logits(model.stack.final_norm(hidden), heads)


def processed(model: AneeModel, ids: Tensor) -> Tensor:
    """PROCESS for every token and layer, uint8 [B, T, L]."""
    return torch.full((*ids.shape, model.config.num_layers), PROCESS, dtype=torch.uint8)


def with_plan(model: AneeModel, ids: Tensor, plan: Tensor) -> Tensor:
    """Actions uint8 [B, T, L] in which every token follows a plan uint8 [L] (or [B, T, L]), the kept first ones whole."""
    actions, kept = plan.expand(*ids.shape, -1).clone(), model.config.keep_first_tokens
    actions[:, :kept] = model.config.table.whole[actions[:, :kept].long()]
    return actions
