"""Routers by supervision: what leaving out one feed-forward of the base would lose, token by token.

As in Dr.LLM (arXiv:2510.12773) gates are flipped one at a time, here around the base itself: what lies below the flipped layer
stays as it is, so only the layers above it run again. That tells how much each layer is missed in the mean. Which tokens miss
it is learned from what one backward says of every token and layer: the logarithm of that is regressed on what the router
reads. (Of labels from flips alone there would be a fraction as many in the same time.) Scores are right in the mean, which
makes layers comparable.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...bridges import normalised
from ...evaluation.rollout import processed, run_layers
from ...modeling_anee import AneeForCausalLM
from ..losses import kl_divergence
from ..mixing import controller_of, in_variant
from ..run import Run
from ..sensitivity import Sensitivities, sensitivities


NAME = "flips"
SMALLEST = 1e-6  # KL, before a logarithm


@dataclass(frozen=True)
class Regressions:
    """Sums over tokens for ridge regressions of logarithms of losses, one for each of L layers, float64.

    Args:
        inputs: of outer products of what is read, with a constant, [L, D + 1, D + 1].
        outputs: of what is read times the logarithm, [L, D + 1].
        losses: of what flips lose in each of V - 1 variants, the cheapest last, [V - 1, L].
        flips: of one for each token that was flipped, [L].
    """

    inputs: Tensor
    outputs: Tensor
    losses: Tensor
    flips: Tensor

    @classmethod
    def of(cls, layers: int, size: int, variants: int, device: torch.device) -> "Regressions":
        """No tokens yet."""
        shapes = (layers, size + 1, size + 1), (layers, size + 1), (variants - 1, layers), (layers,)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, layer: int, read: Tensor, loss: Tensor) -> None:
        """Count N tokens: what is read of them [N, D], and their losses [N] in nats, up to a factor."""
        x = torch.cat((read.float(), torch.ones_like(read[:, :1], dtype=torch.float32)), dim=-1)
        self.inputs[layer] += (x.T @ x).double()
        self.outputs[layer] += (x.T @ loss.float().clamp(min=SMALLEST).log()).double()

    def add_flips(self, layer: int, losses: Tensor) -> None:
        """Count flips of N tokens: their losses [V - 1, N] in nats."""
        self.losses[:, layer] += losses.double().sum(dim=-1)
        self.flips[layer] += losses.shape[-1]

    def solve(self, layer: int, ridge: float) -> tuple[Tensor, Tensor]:
        """Weight [D] and bias [] of a layer's router, float64.

        The penalty is relative to the variance of each input. The mean of the exponential of what is said, for inputs that
        vary normally, is the mean loss.
        """
        count = self.inputs[layer, -1, -1]
        second, first = self.inputs[layer] / count, self.outputs[layer] / count
        mean = second[-1, :-1]
        covariance = second[:-1, :-1] - mean.outer(mean)
        joint = first[:-1] - mean * first[-1]
        penalty = ridge * covariance.diagonal() + SMALLEST
        weight = torch.linalg.solve(covariance + penalty.diag(), joint)
        spread = weight @ covariance @ weight
        level = (self.losses[-1, layer] / self.flips[layer]).clamp(min=SMALLEST).log() - spread / 2
        return weight, level - weight @ mean


def run_stage(run: Run) -> dict:
    """Look at `windows` windows, flip `layers` gates of each, and solve for the routers.

    Raises:
        ValueError: the controller has no gates.
    """
    settings, model = run.settings(NAME), run.model
    controller = controller_of(model)
    windows = run.windows("train")[: settings.windows].to(run.device)
    size, variants = model.config.text_config.hidden_size, len(controller.variants)
    sums = Regressions.of(model.config.num_layers, size, variants, run.device)
    together = torch.arange(len(windows)).split(run.accelerator.num_processes)
    for step in run.track(len(together), "flipping gates", restore(run, sums)):
        for number in run.share(together[step]).tolist():
            add_window(run, sums, windows[number].unsqueeze(0), number)
        if (step + 1) % settings.checkpoint_every == 0:
            gather(run, sums)
            run.save(NAME, step + 1, vars(sums))
    gather(run, sums)
    fill(run, sums)
    return {}


def restore(run: Run, sums: Regressions) -> int:
    """Take the sums of the checkpoint, if there is one, into the main process; returns the step to go on with."""
    saved = run.load(NAME)
    if saved is None:
        return 0
    if run.accelerator.is_main_process:
        for name, value in vars(sums).items():
            value.copy_(saved[1][name])
    return saved[0]


def gather(run: Run, sums: Regressions) -> None:
    """Move the sums of all processes into the main one."""
    for value in vars(sums).values():
        total = run.sum(value)
        value.copy_(total if run.accelerator.is_main_process else torch.zeros_like(total))


def layers_of(run: Run, number: int) -> list[int]:
    """Which layers are flipped in a window: every one once before any comes again."""
    layers = controller_of(run.model).gated_layers
    each = min(run.settings(NAME).layers, len(layers))
    places = range(number * each, (number + 1) * each)
    turns = {place // len(layers) for place in places}
    orders = {turn: torch.randperm(len(layers), generator=run.generator(NAME, turn)) for turn in turns}
    return sorted({layers[int(orders[p // len(layers)][p % len(layers)])] for p in places})


def add_window(run: Run, sums: Regressions, ids: Tensor, number: int) -> None:
    """Count what every layer loses on token ids [B, T], the window of a number, and flips of some."""
    model, kept = run.model, run.model.config.keep_first_tokens
    seen = sensitivities(model, ids, run.generator(f"{NAME}/tokens", number))
    for layer in controller_of(model).gated_layers:
        sums.add(layer, normalised(seen.entering[layer][:, kept:]).flatten(0, 1), seen.losses[layer][:, kept:].flatten())
    for layer in layers_of(run, number):
        sums.add_flips(layer, flipped(model, seen, layer)[:, :, kept:].flatten(1))


@torch.no_grad()
def flipped(model: AneeForCausalLM, seen: Sensitivities, layer: int) -> Tensor:
    """What the feed-forward of one layer alone would lose in each of the cheaper variants, KL to the base [V - 1, B, T]."""
    above = range(layer + 1, model.config.num_layers)
    everything = processed(model, seen.logits[..., 0])

    def loss(variant: str) -> Tensor:
        hidden = in_variant(model, variant, layer, seen.entering[layer], seen.attended[layer], seen.step)
        return kl_divergence(seen.logits, model.stack.logits(run_layers(model, hidden, seen.step, everything, above)))

    return torch.stack([loss(variant) for variant in controller_of(model).variants[1:]])


@torch.no_grad()
def fill(run: Run, sums: Regressions) -> None:
    """Set the routers to what the main process, which has the sums, solves for, and what fewer bits lose beside none."""
    controller, settings = controller_of(run.model), run.settings(NAME)
    keep = settings.keep_trained and bool(controller.routers.weight.any())
    counted = [layer for layer in controller.gated_layers if sums.flips[layer] > 0]
    solved = torch.zeros_like(sums.outputs)
    for layer in counted:
        weight, bias = sums.solve(layer, settings.ridge)
        solved[layer] = torch.cat((weight, bias.view(1)))
    solved, losses = run.sum(solved), run.sum(sums.losses).clamp(min=SMALLEST)
    for layer in controller.gated_layers:
        if solved[layer].any():
            if not keep:
                controller.routers.weight[layer].copy_(solved[layer, :-1])
                controller.routers.bias[layer].copy_(solved[layer, -1])
            if len(losses) > 1:
                controller.relative[:, layer].copy_((losses[:-1, layer] / losses[-1, layer]).log())
