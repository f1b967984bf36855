"""Temperatures of the heads of a classifier, and its dials from budgets to thresholds, on rows that no head was fitted on.

Shapes: N rows, E heads, C classes.
"""

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from ..configuration_classifier import DIALLED
from ..evaluation.early_exits import HeadLogits, first_exits, mean_cost


STEPS = 40  # budgets of a dial, from the first head to the last
HALVINGS = 50
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


def dial(rule: str, rows: HeadLogits, costs: Any) -> dict[str, list[float]]:
    """Settings of an exit rule by the cost that they have on these rows, ascending.

    Args:
        rule: of `DIALLED`.
        rows: calibrated logits of all heads.
        costs: an `ExitCosts`.
    """
    scores = rows.scores(rule)

    def cost(setting: float) -> float:
        return mean_cost(costs, first_exits(rule, scores, setting), rows.tokens)

    if rule == "patience":
        settings = [float(count) for count in range(scores.shape[1])]
        found = {cost(setting): setting for setting in reversed(settings)}  # of those that cost the same the least patient
        found = {budget: setting for budget, setting in found.items() if budget < 1.0}
        found[1.0] = float(scores.shape[1])
        budgets = sorted(found)
        return {"budgets": budgets, "settings": [found[budget] for budget in budgets]}
    floor = cost(-1.0)
    budgets = [floor + (1.0 - floor) * step / STEPS for step in range(STEPS)]
    settings = [_threshold(cost, budget) for budget in budgets]
    return {"budgets": [*budgets, 1.0], "settings": [*settings, 1.0]}


def dials(rows: HeadLogits, costs: Any) -> dict[str, dict[str, list[float]]]:
    """The dials of all rules that need one."""
    return {rule: dial(rule, rows, costs) for rule in DIALLED}


def _threshold(cost: Any, budget: float) -> float:
    """The highest threshold in [0, 1] whose cost is at most the budget."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low
