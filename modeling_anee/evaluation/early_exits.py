"""Early exits replayed on the logits of all heads: which head each row leaves at, what that costs, how right it is.

The logits of all heads are computed once; every rule and setting follows from them without the model.

Shapes: N rows, E heads, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..exit_rules import exit_scores, leaves


@dataclass(frozen=True)
class HeadLogits:
    """What every head says of every row.

    Args:
        logits: calibrated, float32 [N, E, C].
        labels: int64 [N].
        tokens: of each row, int64 [N].
    """

    logits: Tensor
    labels: Tensor
    tokens: Tensor

    @property
    def right(self) -> Tensor:
        """Whether each head is right about each row, bool [N, E]."""
        return self.logits.argmax(dim=-1) == self.labels.unsqueeze(1)

    def scores(self, rule: str) -> Tensor:
        """Scores of an exit rule at every head, were all heads before asked, float64 [N, E]."""
        probabilities = self.logits.softmax(dim=-1)
        heads = range(1, probabilities.shape[1] + 1)
        return torch.stack([exit_scores(rule, probabilities[:, :count]) for count in heads], dim=1).double()


@torch.no_grad()
def head_logits(
    model: Any,
    rows: Sequence[Sequence[int]],
    labels: Sequence[int],
    batch_size: int = 32,
    done: Callable[[int], Any] | None = None,
) -> HeadLogits:
    """Ask every head of a classifier about rows of token ids, batches of like lengths.

    Args:
        model: an `AneeForSequenceClassification`.
        rows: ids of each row, at least one.
        labels: of each.
        batch_size: rows that are run together.
        done: called with the number of rows that have just been run.
    """
    logits = torch.zeros(len(rows), len(model.exit_costs.layers), model.config.num_labels)
    for places, ids, mask in batches(rows, batch_size):
        features = model.features(ids.to(model.device), mask.to(model.device))
        logits[places] = model.heads.all(features).cpu()
        if done is not None:
            done(len(places))
    return HeadLogits(logits, torch.tensor(labels), torch.tensor([len(row) for row in rows]))


def batches(rows: Sequence[Sequence[int]], batch_size: int) -> Any:
    """Batches of like lengths: places int64 [B], ids and mask int64 [B, T], padded on the right."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        width = max(len(rows[place]) for place in places)
        ids = torch.zeros(len(places), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, place in enumerate(places):
            ids[line, : len(rows[place])] = torch.tensor(rows[place])
            mask[line, : len(rows[place])] = 1
        yield torch.tensor(places), ids, mask


def replay(rule: str, scores: Tensor, settings: Tensor) -> Tensor:
    """The heads, int64 [N], where rows whose scores are float64 [N, E] leave by a rule with settings float64 [E - 1]."""
    leave = torch.cat((leaves(rule, scores[:, :-1], settings), torch.ones(len(scores), 1, dtype=torch.bool)), dim=1)
    return leave.long().argmax(dim=1)


@dataclass(frozen=True)
class Outcome:
    """What leaving at certain heads gives.

    Args:
        cost: mean over all tokens, as a share of all layers and heads.
        accuracy: share of the rows that are right.
        standard_error: of the accuracy.
        gap: accuracy minus that of the last head.
        gap_error: standard error of the gap, row by row.
        used: share of the rows that leave at each head, [E].
        shuffled: accuracy to be expected if as many rows left at each head, but at random ones.
    """

    cost: float
    accuracy: float
    standard_error: float
    gap: float
    gap_error: float
    used: list[float]
    shuffled: float


def mean_cost(costs: Any, places: Tensor, tokens: Tensor) -> float:
    """Mean cost of a token of rows that left at heads int64 [N]; `costs`: an `ExitCosts`."""
    return float((costs.of_rows(places, tokens) * tokens).sum() / tokens.sum())


def outcome(rows: HeadLogits, places: Tensor, costs: Any) -> Outcome:
    """What rows that left at heads int64 [N] cost and how right they are; `costs`: an `ExitCosts`."""
    right = rows.right.double()
    own, last = right.gather(1, places.unsqueeze(1)).squeeze(1), right[:, -1]
    used = torch.bincount(places, minlength=right.shape[1]) / len(places)
    error, gap_error = (float(x.std() / len(x) ** 0.5) if len(x) > 1 else 0.0 for x in (own, own - last))
    cost = mean_cost(costs, places, rows.tokens)
    shuffled = float(used.double() @ right.mean(dim=0))
    return Outcome(cost, float(own.mean()), error, float((own - last).mean()), gap_error, used.tolist(), shuffled)


def calibration_bins(rows: HeadLogits, head: int, count: int = 15) -> list[tuple[float, float, int]]:
    """Reliability of a head: for each of `count` even bins of confidence that has rows: mean confidence, accuracy, rows."""
    confidence = rows.logits[:, head].softmax(dim=-1).amax(dim=-1).double()
    place = (confidence * count).long().clamp(max=count - 1)
    right = rows.right[:, head].double()
    bins = []
    for number in range(count):
        inside = place == number
        if inside.any():
            bins.append((float(confidence[inside].mean()), float(right[inside].mean()), int(inside.sum())))
    return bins


def expected_calibration_error(rows: HeadLogits, head: int, count: int = 15) -> float:
    """Mean distance between confidence and accuracy over `count` even bins, weighted by rows (Naeini et al. 2015)."""
    bins = calibration_bins(rows, head, count)
    return sum(abs(confidence - accuracy) * size for confidence, accuracy, size in bins) / len(rows.labels)
