"""The teacher of the controllers: leave out the (token, layer) pairs whose bridge misses least, as far as a budget goes.

What a pair would lose is its bridge error, scaled so that every layer's mean is the KL that leaving it out alone costs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


LEAST = 1e-6  # of errors, before a logarithm


@dataclass(frozen=True)
class Teacher:
    """One global threshold per budget over all pairs.

    Args:
        scores: log(loss / saving) of every step that was ranked, sorted, float32 [N].
        cost: mean cost of a token when all steps up to one are taken, float64 [N].
    """

    scores: Tensor
    cost: Tensor

    @classmethod
    def of(cls, scores: Tensor, savings: Tensor, start: float = 1.0) -> "Teacher":
        """Rank steps.

        Args:
            scores: log(loss / saving), float32 [tokens, steps]; infinite where there is no such step.
            savings: cost that each step saves, float64 [steps].
            start: cost of a token that takes none.
        """
        flat, order = scores.flatten().sort()
        saved = savings.expand(len(scores), -1).flatten()[order].double().cumsum(dim=0) / len(scores)
        known = flat.isfinite()
        return cls(flat[known], start - saved[known])

    def threshold(self, budget: Tensor) -> Tensor:
        """Scores below which steps are taken at budgets float64 [...], so that the mean cost is the budget."""
        # `cost` falls along the scores: count how many still cost more than the budget.
        place = torch.searchsorted(-self.cost, -budget.contiguous()).clamp(max=len(self.scores) - 1)
        return self.scores[place]


def layer_weights(action_kl: Tensor, bridge_error: Tensor) -> Tensor:
    """KL that leaving out a layer costs per bridge error, float32 [L], from traces [tokens, L] of both."""
    return action_kl.mean(dim=0).clamp(min=LEAST) / bridge_error.mean(dim=0).clamp(min=LEAST)


def pair_scores(bridge_error: Tensor, weights: Tensor, savings: Tensor) -> Tensor:
    """log(loss / saving) of every pair, float32 [tokens, L]; infinite where a layer saves nothing."""
    loss = (bridge_error.clamp(min=LEAST) * weights).log() - savings.clamp(min=1e-9).log().float()
    return loss.masked_fill(savings <= 0, torch.inf)
