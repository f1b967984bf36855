"""Bridges in closed form: ridge regression of what a layer adds on its normalised input, at a given rank.

Best affine map of rank r in the norm of the outputs (reduced-rank regression): solve the ridge regression, then keep
the leading r directions of what it predicts. Tokens weigh as the inverse mean square of their hidden state, since later
layers see states over their norm; so a few tokens with massive activations don't decide.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...actions import FULL
from ...bridges import EPSILON, Bridge, normalised
from ...evaluation.rollout import begin
from ..run import Run


NAME = "closed_form"
BATCH_WINDOWS = 4


class Moments:
    """Sums of outer products of inputs (with a constant) and of inputs with outputs, float64."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.inputs = torch.zeros(size + 1, size + 1, dtype=torch.float64, device=device)
        self.outputs = torch.zeros(size + 1, size, dtype=torch.float64, device=device)

    def add(self, hidden: Tensor, delta: Tensor, counts: Tensor | float = 1.0) -> None:
        """Count N tokens: hidden states [N, D] that enter, what is to be added [N, D], as how many each counts [N, 1]."""
        weight = torch.rsqrt(hidden.float().square().mean(dim=-1, keepdim=True) + EPSILON) * counts**0.5
        x = torch.cat((normalised(hidden), torch.ones_like(weight)), dim=-1) * weight
        self.inputs += (x.T @ x).double()
        self.outputs += (x.T @ (delta.float() * weight)).double()


def solve(moments: Moments, rank: int, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """The best map of a rank: down [rank, D], up [D, rank], bias [D], float32.

    The rank is split evenly between the two maps, so that an optimiser finds both of the same size.
    """
    size = moments.outputs.shape[1]
    penalty = ridge * moments.inputs.diagonal()[:size].mean()
    gram = moments.inputs + penalty * torch.eye(size + 1, dtype=torch.float64, device=moments.inputs.device)
    full = torch.linalg.solve(gram, moments.outputs)
    values, vectors = torch.linalg.eigh(full[:size].T @ moments.inputs[:size, :size] @ full[:size])
    basis = vectors[:, values.argsort(descending=True)[:rank]]  # [D, rank]: directions of what is predicted
    down = full[:size] @ basis
    scale = (down.norm(dim=0).clamp(min=1e-12)).sqrt()
    return (down / scale).T.float(), (basis * scale).float(), full[size].float()


def fill(bridge: Bridge, moments: Moments, ridge: float) -> None:
    """Set a bridge to its closed form."""
    down, up, bias = solve(moments, bridge.down.out_features, ridge)
    with torch.no_grad():
        bridge.down.weight.copy_(down)
        bridge.up.weight.copy_(up)
        bridge.up.bias.copy_(bias)


def run_stage(run: Run) -> dict:
    """Pass over some windows once, layer by layer, and solve for all bridges, or those that have learned nothing."""
    settings, model = run.settings(NAME), run.model
    windows = run.windows("train")[: settings.windows].to(run.device)
    size = model.config.text_config.hidden_size
    solved = {
        (kind, name): bridge
        for kind in ("skip", "skip_ffn")
        for name, bridge in getattr(model.bridges, kind).items()
        if not (settings.keep_trained and has_learned(bridge))
    }
    sums = {which: Moments(size, run.device) for which in solved}
    batches = windows.split(BATCH_WINDOWS * run.accelerator.num_processes)
    for batch in run.track(len(batches), "statistics for bridges"):
        share = run.share(batches[batch])
        for layer, hidden, attended, out in sublayers(run, share) if len(share) else ():
            for kind, entering in (("skip", hidden), ("skip_ffn", attended)):
                if (kind, str(layer)) in sums:
                    sums[kind, str(layer)].add(entering, out - entering)
    for which, moments in sums.items():
        moments.inputs, moments.outputs = run.sum(moments.inputs), run.sum(moments.outputs)
        fill(solved[which], moments, settings.ridge)
    return {}


def has_learned(bridge: Bridge) -> bool:
    """Whether it changes anything."""
    return bool(bridge.up.weight.any() or bridge.up.bias.any())


@torch.no_grad()
def sublayers(run: Run, ids: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Every layer's hidden states as the base has them: that enter, after attention, that leave; kept first tokens left out.

    Token ids [B, T] -> layer, three of [B * (T - kept), D].
    """
    model = run.model
    kept = model.config.keep_first_tokens
    hidden, step = begin(model, ids)
    for layer, block in enumerate(model.stack.blocks):
        attended = model.executor.layers.attend(layer, hidden, step, FULL)
        out = block.add_feed_forward(hidden, attended)
        entering, between, leaving = (x[:, kept:].flatten(0, 1) for x in (hidden, attended, out))
        yield layer, entering, between, leaving
        hidden = out
