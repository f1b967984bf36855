"""The probes of a `learned` controller: entropy, max probability and bridge errors from hidden states alone."""

import torch
from torch import Tensor

from ...controller_learned import LearnedController
from ...modeling_anee import AneeForCausalLM
from ..examples import Examples, read_examples
from ..kinds import controller_as
from ..optimise import train
from ..run import Run
from ..teacher import LEAST


NAME = "probe"
BATCH_TOKENS = 1024


def run_stage(run: Run) -> dict:
    """Fit every segment's probe by least squares on traces, step by step."""
    controller, examples = controller_of(run.model), read_examples(run.folder, run.model)
    parameters = {name: p for name, p in run.own_parameters().items() if name.startswith("controller.probes.")}

    def loss_of_step(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = torch.randint(len(examples), (BATCH_TOKENS,), generator=generator)
        losses = probe_losses(controller, examples, run.rows(chosen), run.device)
        return losses.sum(), dict(zip(("entropy_mse", "max_probability_mse", "log_error_mse"), losses, strict=True))

    train(run, NAME, parameters, loss_of_step)
    return {}


def controller_of(model: AneeForCausalLM) -> LearnedController:
    """The controller, if it is one that learns.

    Raises:
        ValueError: another kind.
    """
    return controller_as(model, LearnedController, "learned", "nothing to train")


def probe_losses(controller: LearnedController, examples: Examples, chosen: Tensor, device: torch.device) -> Tensor:
    """Mean squared errors of entropy, max probability and log bridge errors over all segments, float32 [3]."""
    rows = []
    for segment, (start, stop) in enumerate(controller.segments):
        answers = controller.probes[segment](examples.states[segment + 1, chosen].to(device))
        targets = examples.targets[chosen].to(device)
        errors = examples.bridge_error[chosen, start:stop].clamp(min=LEAST).log().to(device)
        misses = ((answers[:, :2] - targets).square().mean(dim=0), (answers[:, 2:] - errors).square().mean().view(1))
        rows.append(torch.cat(misses))
    return torch.stack(rows).mean(dim=0)
