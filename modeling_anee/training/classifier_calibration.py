"""Temperatures of the heads of a classifier, and its dials from budgets to thresholds, on rows that no head was fitted on.

A dial is a list of settings, one number for each head but the last, by what they cost; dearer ones are more often right. Deep
heads need not be better than those before them: where going on buys nothing, no budget pays for it.

Shapes: N rows, E heads, C classes.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..configuration_classifier import EXIT_RULES
from ..evaluation.early_exits import HeadLogits, mean_cost, replay
from ..exit_rules import fixed_settings, without_end


PRICES = (0.0, *(1e-3 * 1.2**step for step in range(40)))  # of all layers, in errors a row
STEPS = 40  # budgets between the first head and the last
HALVINGS = 40
COLDEST, HOTTEST = 0.05, 20.0


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature by which logits [N, C] are likeliest, arXiv:1706.04599; found between `COLDEST` and `HOTTEST`.

    The loss is convex in 1 / temperature: ternary search.
    """
    low, high = 1 / HOTTEST, 1 / COLDEST
    for _ in range(100):
        third = (high - low) / 3
        left, right = (float(cross_entropy(logits.double() * scale, labels)) for scale in (low + third, high - third))
        low, high = (low, high - third) if left <= right else (low + third, high)
    return 2 / (low + high)


def temperatures(rows: HeadLogits) -> Tensor:
    """The temperature of every head, float32 [E]."""
    return torch.tensor([temperature(rows.logits[:, head], rows.labels) for head in range(rows.logits.shape[1])])


@torch.no_grad()
def calibrate(model: Any, rows: HeadLogits) -> None:
    """Give a classifier the temperatures and the dials of held-out rows; `rows`: what `head_logits` says of them."""
    raw = replace(rows, logits=rows.logits * model.heads.temperature.cpu().view(1, -1, 1))
    found = temperatures(raw)
    model.heads.temperature.copy_(found)
    calibrated = replace(raw, logits=raw.logits / found.view(1, -1, 1))
    model.config.classifier = model.config.classifier | {"dials": dials(calibrated, model.exit_costs)}
    model.config.check()


def dials(rows: HeadLogits, costs: Any) -> dict[str, dict[str, list]]:
    """The dials of all rules, from calibrated logits of all heads; `costs`: an `ExitCosts`."""
    return {rule: dial(rule, rows, costs) for rule in EXIT_RULES}


def dial(rule: str, rows: HeadLogits, costs: Any) -> dict[str, list]:
    """Settings of an exit rule that are right more often than all that cost less, by their cost on these rows."""
    scores, right = rows.scores(rule), rows.right.double()

    def measured(settings: Tensor) -> tuple[float, float]:
        places = replay(rule, scores, without_end(rule, settings))
        return mean_cost(costs, places, rows.tokens), float(right.gather(1, places.unsqueeze(1)).mean())

    if rule == "patience":
        candidates = list(torch.arange(scores.shape[1]).double().unsqueeze(1).expand(-1, scores.shape[1] - 1))
    elif rule == "fixed":
        candidates = list(fixed_settings(scores.shape[1]))
    else:
        policies = [optimal_thresholds(scores, right, rows.tokens, costs, price) for price in PRICES]
        candidates = [*policies, *_between(policies, lambda settings: measured(settings)[0])]
    best: dict[float, list[float]] = {}
    most = -1.0
    for (cost, accuracy), number in sorted((measured(settings), number) for number, settings in enumerate(candidates)):
        if accuracy > most and cost <= 1.0:
            best[cost], most = candidates[number].tolist(), accuracy
    return {"budgets": list(best), "settings": list(best.values())}


def optimal_thresholds(scores: Tensor, right: Tensor, tokens: Tensor, costs: Any, price: float) -> Tensor:
    """A threshold for each head but the last, float64 [E - 1], by backward induction (optimal stopping).

    From the last head backwards, each threshold is the one where the errors of those that leave, and what the others lose and
    pay later, add up to the least; 1 where it is best that nobody leaves.

    Args:
        scores: float64 [N, E].
        right: 1 where a head is right, float64 [N, E].
        tokens: of each row, int64 [N].
        costs: an `ExitCosts`.
        price: of all layers, in errors a row.
    """
    weights, reached = tokens / tokens.double().mean(), costs.reached
    later, found = 1.0 - right[:, -1], torch.ones(scores.shape[1] - 1, dtype=torch.float64)
    for head in range(scores.shape[1] - 2, -1, -1):
        now = 1.0 - right[:, head]
        later = later + price * weights * (reached[head + 1] - reached[head])
        order = scores[:, head].argsort(descending=True, stable=True)
        own, saved = scores[order, head], (now - later)[order].cumsum(dim=0)  # if all up to here leave
        # Rows with the same score leave together.
        ends = torch.cat((own[1:] < own[:-1], torch.ones(1, dtype=torch.bool)))
        saved = torch.where(ends, saved, torch.inf)
        last = int(saved.argmin())
        if saved[last] < 0:
            found[head] = (own[last] + own[last + 1]) / 2 if last + 1 < len(own) else -1.0
        later = torch.where(scores[:, head] > found[head], now, later)
    return found


def _between(policies: list[Tensor], cost: Any) -> Iterator[Tensor]:
    """Thresholds that are lowered alike, in logits, until they cost no more than budgets between those of policies."""
    known = sorted((cost(policy), number) for number, policy in enumerate(policies))
    for step in range(1, STEPS):
        budget = step / STEPS
        dearer = next((number for price, number in known if price > budget), None)
        if dearer is None:
            return
        low, high = 0.0, 40.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if cost(_lowered(policies[dearer], middle)) <= budget else (middle, high)
        yield _lowered(policies[dearer], high)


def _lowered(thresholds: Tensor, by: float) -> Tensor:
    return torch.sigmoid(torch.logit(thresholds.clamp(1e-9, 1 - 1e-9)) - by)
