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
    ladder = examples.ladder

    def run(ids: Tensor, budget: float) -> Followed:
        threshold = examples.teacher.threshold(torch.tensor([budget], dtype=torch.float64))
        rounded = ladder.taken(examples.scores[:1].masked_fill(ladder.gaps, torch.inf), threshold)[0]
        hidden, actions = oracle(model, ids, examples.weights, float(threshold.exp()), rounded)
        return Followed(hidden, actions, torch.full(ids.shape, ladder.head, dtype=torch.uint8) if ladder.head else None)

    return Control("oracle (not a way to save)", run)


def oracle(
    model: AneeForCausalLM, ids: Tensor, damage: Tensor, threshold: float, whole: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run every layer, then leave it out for the tokens whose bridge turned out to miss least: not a way to save anything.

    Takes ids [B, T], the damage [L] that an error at each layer does, and what the layers do else, int64 [L], by default
    PROCESS; returns hidden states [B, T, D], actions [B, T, L].
    """
    cheapest = plan_table(model.config, model.costs).actions[0]
    whole = torch.full(cheapest.shape, PROCESS) if whole is None else whole
    table, costs, kept = model.config.table, model.costs.layers, model.config.keep_first_tokens
    actions = whole.to(torch.uint8).expand(*ids.shape, -1).clone()
    hidden, step = begin(model, ids)
    for layer, action in enumerate(cheapest.tolist()):
        if not table[action].runs_both:
            saving = float(costs[layer, whole[layer]] - costs[layer, action])
            loss = miss(model, layer, action, hidden, step) * float(damage[layer]) / saving
            leaves = (loss < threshold).cpu()
            leaves[:, :kept] = False
            actions[..., layer][leaves] = action
        hidden = run_layers(model, hidden, step, actions, range(layer, layer + 1))
    return hidden, actions


def miss(model: AneeForCausalLM, layer: int, action: int, hidden: Tensor, step: Step) -> Tensor:
    """Relative squared error [B, T] of a layer's bridge."""
    attended = model.executor.layers.attend(layer, hidden, step, FULL)
    out = model.stack.blocks[layer].add_feed_forward(hidden, attended)
    return bridge_error(model, layer, action, hidden, attended, out)
