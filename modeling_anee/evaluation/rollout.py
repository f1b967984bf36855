"""Running token windows through a model with given actions, with gradients where its modules want them.

Shapes: B rows, T tokens, L layers, D hidden size.
"""

import torch
from torch import Tensor

from ..actions import PROCESS
from ..executor import Ledger, Step
from ..modeling_anee import AneeForCausalLM
from ..positions import token_places


def begin(model: AneeForCausalLM, ids: Tensor) -> tuple[Tensor, Step]:
    """Token ids int64 [B, T] -> hidden states [B, T, D] that enter the first layer, and the step to run them in."""
    model.prepare()
    stack = model.stack
    rows, tokens = ids.shape
    positions = stack.positions(None, 0, tokens, ids.device)
    hidden = stack.add_positions(stack.embed_tokens(ids), positions)
    step = Step(
        budget=torch.zeros(rows, tokens, dtype=torch.float64),
        places=token_places(None, None, 0, rows, tokens, has_cache=False),
        rotations=stack.rotations(hidden, positions),
        masks=stack.masks(hidden, None, None, positions),
        cache=None,
        past=0,
    )
    return hidden, step


def run_layers(
    model: AneeForCausalLM, hidden: Tensor, step: Step, actions: Tensor, layers: range, keep: list[Tensor] | None = None
) -> Tensor:
    """Hidden states [B, T, D] through some of the layers, with actions uint8 [B, T, L]; `keep` gets what enters each."""
    ledger = Ledger(actions=actions, spent=torch.zeros(actions.shape[:2], dtype=torch.float64))
    return model.executor.run_layers(hidden, step, ledger, layers, keep)


def run(model: AneeForCausalLM, ids: Tensor, actions: Tensor | None = None, keep: list[Tensor] | None = None) -> Tensor:
    """Token ids [B, T] -> hidden states [B, T, D] that enter the final norm; without actions, those of the base."""
    if actions is None:
        actions = processed(model, ids)
    hidden, step = begin(model, ids)
    hidden = run_layers(model, hidden, step, actions, range(actions.shape[-1]), keep)
    return model.executor.translate(hidden, actions)


def processed(model: AneeForCausalLM, ids: Tensor) -> Tensor:
    """PROCESS for every token and layer, uint8 [B, T, L]."""
    return torch.full((*ids.shape, model.config.num_layers), PROCESS, dtype=torch.uint8)


def with_plan(model: AneeForCausalLM, ids: Tensor, plan: Tensor) -> Tensor:
    """Actions uint8 [B, T, L] in which every token but the kept first ones follows a plan uint8 [L] (or [B, T, L])."""
    actions = plan.expand(*ids.shape, -1).clone()
    actions[:, : model.config.keep_first_tokens] = PROCESS
    return actions
