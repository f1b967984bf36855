"""Phase 1 of a `gated` controller: its routers by gradient descent, and the bridges on what they leave out, tuned together.

The distillation loss goes through the stack with a gate at every token and layer: open or shut in the forward, with the
gradient of a sigmoid in the backward. A step has one capacity; a threshold over all layers, taken from what the routers say
of the base's hidden states, stands for it. At the end all scores are shifted so that they say what a further shut gate loses.
The log has what the routers lose before the first step (as the stage `flips`, or whatever came before, left them) and after
the last.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...evaluation.rollout import run as run_tokens
from ...modeling_anee import AneeForCausalLM
from ..capacities import measured, understated
from ..gating import (
    annealed,
    capacity_penalty,
    gate_entropy,
    gumbel_sigmoid,
    layer_dropout,
    logistic_noise,
    lowest_capacity,
    threshold,
    two_way,
    z_loss,
)
from ..losses import kl_divergence
from ..mixing import controller_of, run_mixed, scores_of
from ..optimise import batch_of, train
from ..recipe import Routers
from ..run import Run


NAME = "routers"
MEASURED = (0.9, 0.7, 0.55, 0.4)  # capacities whose loss the log has
WINDOWS = 4  # that it is measured on


@dataclass(frozen=True)
class Draw:
    """What is random or scheduled in a step.

    Args:
        capacity: share of open gates that is asked for.
        forward: temperature of the samples.
        backward: temperature of the gradient.
        dropout: probability of shutting each layer, [L].
        generator: draws noise and shut layers.
    """

    capacity: float
    forward: float
    backward: float
    dropout: Tensor
    generator: torch.Generator

    @classmethod
    def of(cls, settings: Routers, step: int, layers: int, generator: torch.Generator) -> "Draw":
        """That of a step, for so many layers."""
        low, high = settings.capacities
        low = min(lowest_capacity(step, settings.steps, low, settings.falling), high)
        forward, backward = (annealed(step, settings.steps, *pair) for pair in (settings.forward, settings.backward))
        capacity = low + (high - low) * float(torch.rand(1, generator=generator))
        return cls(capacity, forward, backward, layer_dropout(layers, settings.layer_dropout), generator)


def run_stage(run: Run) -> dict:
    """Tune routers and bridges for `steps` steps of `batch_windows` windows.

    Raises:
        ValueError: the controller has no gates.
    """
    settings, model = run.settings(NAME), run.model
    controller = controller_of(model)
    trained = ("bridges.skip_ffn.", "controller.routers.")
    parameters = {name: p for name, p in run.own_parameters().items() if name.startswith(trained)}
    windows = run.windows("train")
    if run.load(NAME) is None:
        run.log(NAME, 0, **measured(run, MEASURED, WINDOWS))

    def loss_of_step(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        ids = batch_of(windows, settings, step, run)
        return losses(model, ids, settings, Draw.of(settings, step, model.config.num_layers, generator))

    train(run, NAME, parameters, loss_of_step)
    reached = measured(run, MEASURED, WINDOWS)
    run.log(NAME, settings.steps, **reached)
    with torch.no_grad():
        controller.routers.bias[controller.gated_layers] += understated(reached, MEASURED, len(controller.gated_layers))
    return {}


class Sampled:
    """Gates that are sampled as the stack runs; remembers logits and gates [B, T - kept] of each layer."""

    def __init__(self, model: AneeForCausalLM, limit: float, draw: Draw) -> None:
        self.controller, self.kept = controller_of(model), model.config.keep_first_tokens
        self.limit, self.draw = limit, draw
        self.logits: list[Tensor] = []
        self.gates: list[Tensor] = []

    def __call__(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Gates [B, T] of hidden states [B, T, D] that enter a layer; a dropped one is shut to whole rows."""
        if layer not in self.controller.gated_layers:
            return None
        logits = self.controller.scores(layer, hidden[:, self.kept :]) - self.limit
        noise = logistic_noise(tuple(logits.shape), self.draw.generator).to(logits.device)
        gates = gumbel_sigmoid(logits, noise, self.draw.forward, self.draw.backward)
        self.logits.append(logits)
        self.gates.append(gates)
        dropped = torch.rand(len(gates), 1, generator=self.draw.generator) < self.draw.dropout[layer]
        return torch.nn.functional.pad(gates.masked_fill(dropped.to(gates.device), 0.0), (self.kept, 0), value=1.0)


def losses(model: AneeForCausalLM, ids: Tensor, settings: Routers, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
    """What a step minimises on token ids int64 [B, T], and its parts for the log."""
    kept = model.config.keep_first_tokens
    entering: list[Tensor] = []
    with torch.no_grad():
        target = model.stack.logits(run_tokens(model, ids, keep=entering))[:, kept:]
        limit = threshold(scores_of(model, entering), draw.capacity)
    sampled = Sampled(model, limit, draw)
    hidden = run_mixed(model, ids, sampled)[:, kept:]
    kl = kl_divergence(target, model.stack.logits(hidden)).mean()
    logits, gates = (torch.stack(parts, dim=-1) for parts in (sampled.logits, sampled.gates))
    penalty, z, entropy = capacity_penalty(gates, draw.capacity), z_loss(two_way(logits)), gate_entropy(logits)
    loss = kl + settings.capacity_weight * penalty + settings.z_weight * z - settings.entropy_bonus * entropy
    shares = {"capacity": kl.new_tensor(draw.capacity), "open": gates.detach().mean()}
    return loss, {"kl": kl, "z": z, "entropy": entropy} | shares
