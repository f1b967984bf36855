"""The steps by which a layer gets cheaper: through the precisions that plans run it in, and at last left out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..actions import PROCESS
from ..controller_learned import allowed_actions, segments_of
from ..modeling_anee import AneeForCausalLM
from ..plans import plan_table
from .stages.traces import skip_action


SPREAD = 5.0  # of the scores of precisions, about that of layers left out, in nats


@dataclass(frozen=True)
class Ladder:
    """Steps down of L layers, at most K each.

    Args:
        actions: of each layer, dearest first, int64 [L, K + 1], filled up with the last.
        savings: cost that each step saves, float64 [L, K]; 0 where there is none.
        ranks: when plans take a step, between 0 (first) and 1, float32 [L, K]; infinite for steps that leave something out, and
            where there is none.
        gaps: which steps leave something out, bool [L, K]: at most one of each layer, its last.
        head: variant that the head runs in, place in the table's `heads`.
        start: cost of a token that takes no step.
        whole: cost of one that takes all but those that leave something out.
    """

    actions: Tensor
    savings: Tensor
    ranks: Tensor
    gaps: Tensor
    head: int
    start: float
    whole: float

    @property
    def of_gaps(self) -> Tensor:
        """What leaving out each layer saves, float64 [L]; 0 where that can't be."""
        return (self.savings * self.gaps).sum(dim=1)

    @property
    def floor(self) -> float:
        """Cost of a token that takes every step."""
        return self.start - float(self.savings.sum())

    def scores(self, gaps: Tensor) -> Tensor:
        """Scores of every step, float32 [N, L, K], for those of leaving out each layer [N, L]; infinite where there is no step.

        Those of precisions lie below all others, in the order of the plans: rounding loses next to nothing.
        """
        known = gaps[gaps.isfinite()]
        lowest = float(known.min()) if len(known) else 0.0
        rounding = lowest + SPREAD * (self.ranks - 1.0)
        return torch.where(self.gaps, gaps.unsqueeze(-1), rounding)

    def taken(self, scores: Tensor, threshold: Tensor) -> Tensor:
        """Actions int64 [..., L] after all steps whose scores [..., L, K] lie below thresholds [...]."""
        count = (scores < threshold[..., None, None]).sum(dim=-1)
        return self.actions.expand(*count.shape, -1).gather(-1, count.unsqueeze(-1)).squeeze(-1)


def ladder_of(model: AneeForCausalLM) -> Ladder:
    """The steps that a `learned` controller can take, those of precisions in the order of the model's plans."""
    costs, table = model.costs.layers, model.config.table
    decided = {layer for start, stop in segments_of(model.config) for layer in range(start, stop)}
    rungs = [_rungs(model, layer) if layer in decided else [(PROCESS, 0.0)] for layer in range(model.config.num_layers)]
    height = max(2, *map(len, rungs))
    actions = torch.tensor([[a for a, _ in own] + [own[-1][0]] * (height - len(own)) for own in rungs])
    ranks = torch.tensor([[rank for _, rank in own] + [torch.inf] * (height - len(own)) for own in rungs])[:, 1:]
    price = costs.gather(1, actions)
    savings = price[:, :-1] - price[:, 1:]
    gaps = ~table.complete[actions[:, 1:]] & (savings > 0)
    head = int(plan_table(model.config, model.costs).heads[0]) if model.config.precisions else 0
    start = 1.0 - model.costs.head + model.costs.heads[head]
    return Ladder(actions, savings, ranks, gaps, head, start, start - float((savings * ~gaps).sum()))


def _rungs(model: AneeForCausalLM, layer: int) -> list[tuple[int, float]]:
    """The actions of a layer, dearest first, with their ranks."""
    table, allowed, costs = model.config.table, allowed_actions(model.config)[layer], model.costs.layers[layer]
    plans = plan_table(model.config, model.costs).actions.flip(0)[:, layer].tolist()  # dearest first
    rungs = [(PROCESS, 0.0)]
    for number, action in enumerate(plans):
        if allowed[action] and table[action].is_whole and costs[action] < costs[rungs[-1][0]]:
            rungs.append((action, number / len(plans)))
    gap = skip_action(model, layer)
    if gap is not None and costs[gap] < costs[rungs[-1][0]]:
        rungs.append((gap, torch.inf))
    return rungs
