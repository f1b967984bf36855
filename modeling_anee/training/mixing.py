"""The stack with a gate at the feed-forward of every token and layer: soft ones, which gradients go through, or hard ones.

Everything runs in the base's own weights: fewer bits lose next to nothing beside what is left out.

Shapes: B rows, T tokens, D hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..actions import FULL, NONE
from ..controller_gated import GatedController
from ..evaluation.rollout import begin
from ..modeling_anee import AneeForCausalLM
from ..step import Step
from .gating import threshold
from .kinds import controller_as


# From a layer and the hidden states [B, T, D] that enter it to gates [B, T] in [0, 1] or bool; None: all of them are open.
Gates = Callable[[int, Tensor], Tensor | None]
ROUNDS = 2  # of looking for the threshold of a capacity, each on the hidden states that the one before led to


def controller_of(model: AneeForCausalLM) -> GatedController:
    """The controller, if it has gates.

    Raises:
        ValueError: another kind.
    """
    return controller_as(model, GatedController, "gated", "no gates")


def fed_in(model: AneeForCausalLM, variant: str, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
    """What leaves a layer, [..., D], whose feed-forward runs in a variant; where it is left out, the bridge stands in.

    `hidden` entered the layer, and `attended` its second half.
    """
    if variant != NONE:
        return model.stack.blocks_of(variant)[layer].add_feed_forward(hidden, attended)
    bridge = model.bridges.of_skip_ffn(layer)
    return attended if bridge is None else bridge(attended)


def in_variant(model: AneeForCausalLM, variant: str, layer: int, hidden: Tensor, attended: Tensor, step: Step) -> Tensor:
    """The same, [B, T, D], with its attention in the variant too, if there is one; `attended` has it in full."""
    if variant not in (FULL, NONE):
        attended = model.executor.layers.attend(layer, hidden, step, variant)
    return fed_in(model, variant, layer, hidden, attended)


def mixed_layer(model: AneeForCausalLM, layer: int, hidden: Tensor, step: Step, gate: Tensor | None) -> Tensor:
    """One layer, [B, T, D] -> [B, T, D]: the gate's share of it in full, the rest in the cheapest variant."""
    attended = model.executor.layers.attend(layer, hidden, step, FULL)
    if gate is None:
        return fed_in(model, FULL, layer, hidden, attended)
    cheap = in_variant(model, controller_of(model).cheapest, layer, hidden, attended, step)
    if gate.dtype != torch.bool:
        return cheap + gate.unsqueeze(-1) * (fed_in(model, FULL, layer, hidden, attended) - cheap)
    if not gate.any():
        return cheap
    return cheap.masked_scatter(gate.unsqueeze(-1), fed_in(model, FULL, layer, hidden[gate], attended[gate]))


def run_mixed(model: AneeForCausalLM, ids: Tensor, gates: Gates, keep: list[Tensor] | None = None) -> Tensor:
    """Token ids [B, T] -> hidden states [B, T, D] that enter the final norm; `keep` gets what enters each layer."""
    hidden, step = begin(model, ids)
    for layer in range(model.config.num_layers):
        if keep is not None:
            keep.append(hidden)
        hidden = mixed_layer(model, layer, hidden, step, gates(layer, hidden))
    return hidden


def scores_of(model: AneeForCausalLM, entering: list[Tensor]) -> Tensor:
    """What the routers say of what enters each layer, [B, T, D] each: [B, T - kept, gates], without the kept first tokens."""
    controller, kept = controller_of(model), model.config.keep_first_tokens
    return torch.stack([controller.scores(layer, entering[layer][:, kept:]) for layer in controller.gated_layers], dim=-1)


@torch.no_grad()
def run_routed(
    model: AneeForCausalLM, ids: Tensor, capacity: float, entering: list[Tensor], keep: list[Tensor] | None = None
) -> tuple[Tensor, float, float]:
    """Token ids [B, T] by the routers at a capacity: hidden states that enter the final norm, share of open gates, threshold.

    Args:
        model: with a `gated` controller.
        ids: int64 [B, T].
        capacity: share of the feed-forwards of these tokens that is to be run.
        entering: the base's hidden states that enter each layer, from which the threshold is first guessed.
        keep: gets what enters each layer.
    """
    for _ in range(ROUNDS):
        limit = threshold(scores_of(model, entering), capacity)
        entering = []
        hidden = run_mixed(model, ids, Above(model, limit), entering)
    if keep is not None:
        keep += entering
    return hidden, float((scores_of(model, entering) > limit).float().mean()), limit


class Above:
    """Hard gates: open where the routers say more than a limit, and to the kept first tokens."""

    def __init__(self, model: AneeForCausalLM, limit: float) -> None:
        self.controller = controller_of(model)
        self.kept, self.limit = model.config.keep_first_tokens, limit

    def __call__(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Gates bool [B, T] of hidden states [B, T, D] that enter a layer."""
        if layer not in self.controller.gated_layers:
            return None
        gates = self.controller.scores(layer, hidden) > self.limit
        gates[:, : self.kept] = True
        return gates
