"""Traces as examples for the controllers: every token once, with its teacher."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..actions import PROCESS
from ..controller_learned import segments_of
from ..modeling_anee import AneeForCausalLM
from .stages.traces import read_shards, skip_action
from .teacher import Teacher, layer_weights, pair_scores


@dataclass(frozen=True)
class Examples:
    """N tokens of all traces, kept first ones left out.

    Args:
        states: float16 [S + 1, N, D], the embeddings and what enters each decision.
        scores: log(loss / saving) of each pair, float32 [N, L]; infinite where a layer can't be left out.
        bridge_error: float32 [N, L].
        targets: entropy / log V and max probability of the base, float32 [N, 2].
        skips: action that leaves each layer out, int64 [L]; PROCESS where there is none.
        savings: cost that it saves, float64 [L].
        weights: KL that leaving out each layer costs per bridge error, float32 [L].
        teacher: thresholds.
    """

    states: Tensor
    scores: Tensor
    bridge_error: Tensor
    targets: Tensor
    skips: Tensor
    savings: Tensor
    weights: Tensor
    teacher: Teacher

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
    skips, savings = skips_and_savings(model)
    weights = layer_weights(*(torch.cat([s[name][kept:] for s in measured]) for name in ("action_kl", "bridge_error")))
    errors = torch.cat([shard["bridge_error"][kept:] for shard in shards])
    scores = pair_scores(errors, weights, savings)
    return Examples(
        states=torch.cat([shard["states"][:, kept:] for shard in shards], dim=1),
        scores=scores,
        bridge_error=errors,
        targets=torch.cat([torch.stack((s["entropy"], s["max_probability"]), dim=-1)[kept:] for s in shards]),
        skips=skips,
        savings=savings,
        weights=weights,
        teacher=Teacher.of(scores, savings),
    )


def skips_and_savings(model) -> tuple[Tensor, Tensor]:
    """For each layer the action that leaves it out (PROCESS if none), int64 [L], and what that saves, float64 [L]."""
    decided = {layer for start, stop in segments_of(model.config) for layer in range(start, stop)}
    layers = range(model.config.num_layers)
    chosen = [skip_action(model, layer) if layer in decided else None for layer in layers]
    skips = torch.tensor([PROCESS if action is None else action for action in chosen])
    costs = model.costs.layers
    return skips, costs[:, PROCESS] - costs.gather(1, skips.unsqueeze(1)).squeeze(1)
