"""What routers lose at some capacities, as a stage notes it in its log."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from ..evaluation.rollout import run as run_tokens
from .losses import kl_divergence
from .mixing import run_routed
from .run import Run


@torch.no_grad()
def measured(run: Run, capacities: Sequence[float], windows: int) -> dict[str, float]:
    """KL to the base in nats, realised capacity and threshold at some capacities, on windows of the text to choose on.

    Processes share the windows. Returns `kl_at_0.55`, `capacity_at_0.55`, `threshold_at_0.55` and so on.
    """
    model, kept = run.model, run.model.config.keep_first_tokens
    own = run.share(run.windows("choose")[:windows].to(run.device))
    sums = torch.zeros(len(capacities), 4, dtype=torch.float64, device=run.device)
    for ids in own.split(1) if len(own) else ():
        entering: list[torch.Tensor] = []
        target = model.stack.logits(run_tokens(model, ids, keep=entering))[:, kept:]
        for number, capacity in enumerate(capacities):
            hidden, share, limit = run_routed(model, ids, capacity, entering)
            kl = kl_divergence(target, model.stack.logits(hidden[:, kept:])).mean()
            sums[number] += torch.tensor([float(kl), share, limit, 1.0], device=run.device)
    rows = run.sum(sums).tolist()
    return {
        f"{name}_at_{capacity:g}": row[place] / row[-1]
        for capacity, row in zip(capacities, rows, strict=True)
        for place, name in enumerate(("kl", "capacity", "threshold"))
    }


def understated(numbers: dict[str, float], capacities: Sequence[float], gates: int) -> float:
    """By how much scores understate what a further shut gate loses, in nats of the logarithm; 0 where nothing can be said.

    Scores are those of gates that are shut alone; others beside them make it dearer. Exits are chosen by the same price.

    Args:
        numbers: what `measured` found.
        capacities: where, descending.
        gates: of a token.
    """
    found = []
    for high, low in pairwise(capacities):
        lost, shut = (numbers[f"{name}_at_{low:g}"] - numbers[f"{name}_at_{high:g}"] for name in ("kl", "capacity"))
        said = (numbers[f"threshold_at_{low:g}"] + numbers[f"threshold_at_{high:g}"]) / 2
        if lost > 0 > shut:
            found.append(math.log(lost / (-shut * gates)) - said)
    return sum(found) / len(found) if found else 0.0
