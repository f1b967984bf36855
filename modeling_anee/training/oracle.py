"""A control that no controller can reach: it leaves out what its bridge turns out to miss least, after running everything."""

from pathlib import Path

import torch
from torch import Tensor

from ..actions import FULL, PROCESS
from ..evaluation.controls import Control, Followed
from ..evaluation.rollout import begin, run_layers
from ..modeling_anee import AneeForCausalLM
from ..plans import plan_table
from ..step import Step
from .examples import Examples, read_examples
from .stages.traces import bridge_error


def oracle_control(model: AneeForCausalLM, fit_folder: Path) -> Control:
    """The oracle of a model that was fitted in a folder, whose traces it needs.

    Raises:
        ValueError: the fit has no traces.
    """
    return control_of(model, read_examples(fit_folder, model))


def control_of(model: AneeForCausalLM, examples: Examples) -> Control:
    """The oracle with the examples of a fit."""

    def run(ids: Tensor, budget: float) -> Followed:
        threshold = float(examples.teacher.threshold(torch.tensor([budget], dtype=torch.float64)).exp())
        return Followed(*oracle(model, ids, examples.weights, threshold))

    return Control("oracle (not a way to save)", run)


def oracle(model: AneeForCausalLM, ids: Tensor, damage: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Run every layer, then leave it out for the tokens whose bridge turned out to miss least: not a way to save anything.

    Takes ids [B, T] and the damage [L] that an error at each layer does; returns hidden states [B, T, D], actions [B, T, L].
    """
    cheapest = plan_table(model.config, model.costs).actions[0]
    kept = model.config.keep_first_tokens
    hidden, step = begin(model, ids)
    actions = torch.zeros(*ids.shape, len(cheapest), dtype=torch.uint8)
    for layer, action in enumerate(cheapest.tolist()):
        if action != PROCESS:
            saving = float(model.costs.layers[layer, PROCESS] - model.costs.layers[layer, action])
            loss = miss(model, layer, action, hidden, step) * float(damage[layer]) / saving
            actions[..., layer] = torch.where((loss < threshold).cpu(), action, PROCESS)
            actions[:, :kept, layer] = PROCESS
        hidden = run_layers(model, hidden, step, actions, range(layer, layer + 1))
    return hidden, actions


def miss(model: AneeForCausalLM, layer: int, action: int, hidden: Tensor, step: Step) -> Tensor:
    """Relative squared error [B, T] of a layer's bridge."""
    attended = model.executor.attend(layer, hidden, step, FULL)
    out = model.stack.blocks[layer].add_feed_forward(hidden, attended)
    return bridge_error(model, layer, action, hidden, attended, out)
