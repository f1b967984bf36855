"""Traces as examples for the controllers: every token once, with its teacher."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..modeling_anee import AneeForCausalLM
from .ladder import Ladder, ladder_of
from .stages.traces import read_shards
from .teacher import Teacher, layer_weights, pair_scores


LOWEST, HIGHEST = 0.35, 0.98  # budgets to learn at; the lowest where no precision is cheaper


@dataclass(frozen=True)
class Examples:
    """N tokens of all traces, kept first ones left out.

    Args:
        states: float16 [S + 1, N, D], the embeddings and what enters each decision.
        scores: log(loss / saving) of each step down of each layer, ascending, float32 [N, L, steps]; infinite where there is
            none.
        bridge_error: float32 [N, L].
        targets: entropy / log V and max probability of the base, float32 [N, 2].
        ladder: the steps.
        weights: KL that leaving out each layer costs per bridge error, float32 [L].
        teacher: thresholds.
    """

    states: Tensor
    scores: Tensor
    bridge_error: Tensor
    targets: Tensor
    ladder: Ladder
    weights: Tensor
    teacher: Teacher

    def budgets(self, drawn: Tensor) -> Tensor:
        """Budgets to learn at, float64 [N], for uniform random numbers in [0, 1): half of them where something is left out."""
        if self.ladder.whole >= 1.0:
            return LOWEST + drawn * (HIGHEST - LOWEST)
        lowest, middle = (self.ladder.whole + self.ladder.floor) / 2, self.ladder.whole
        low, high = lowest + 2 * drawn * (middle - lowest), middle + (2 * drawn - 1) * (HIGHEST - middle)
        return torch.where(drawn < 0.5, low, high)

    def __len__(self) -> int:
        """Number of tokens N."""
        return len(self.scores)


def read_examples(folder: Path, model: AneeForCausalLM) -> Examples:
    """All traces in the folder of a run, for a model with the run's bridges.

    Raises:
        ValueError: the run has no traces, or none with the KL of actions.
    """
    shards = read_shards(folder)
    measured = [shard for shard in shards if "action_kl" in shard]
    if not measured:
        raise ValueError(f"{folder} has no traces with the KL of actions: the stage 'traces' needs kl_windows of at least 1")
    kept = model.config.keep_first_tokens
    weights = layer_weights(*(torch.cat([s[name][kept:] for s in measured]) for name in ("action_kl", "bridge_error")))
    errors = torch.cat([shard["bridge_error"][kept:] for shard in shards])
    ladder = ladder_of(model)
    scores = ladder.scores(pair_scores(errors, weights, ladder.of_gaps))
    return Examples(
        states=torch.cat([shard["states"][:, kept:] for shard in shards], dim=1),
        scores=scores,
        bridge_error=errors,
        targets=torch.cat([torch.stack((s["entropy"], s["max_probability"]), dim=-1)[kept:] for s in shards]),
        ladder=ladder,
        weights=weights,
        teacher=Teacher.of(scores.flatten(1), ladder.savings.flatten(), ladder.start),
    )
