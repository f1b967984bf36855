"""What a classifier would do with rows that neither its heads nor its thresholds were fitted on, from the rows of its fit.

Heads that were fitted on other folds answer every row; temperatures and thresholds are those of the other half of the rows.

Shapes: N rows, E heads, C classes.
"""

from dataclasses import asdict, replace
from typing import Any

import torch

from ..evaluation.early_exits import HeadLogits, outcome, replay
from ..evaluation.report import plus_minus
from ..exit_rules import settings_for
from .classifier_calibration import dial, temperatures


BUDGETS = (1.0, 0.5, 0.4, 0.3, 0.25, 0.2)


@torch.no_grad()
def crossed(rule: str, rows: HeadLogits, costs: Any) -> list[dict[str, Any]]:
    """Figures of a rule and of fixed exits by budget.

    Args:
        rule: of `EXIT_RULES`.
        rows: mixed logits, not calibrated, of rows in a random order, by heads that were not fitted on them.
        costs: an `ExitCosts`.
    """
    halves = torch.arange(len(rows.labels)) % 2 == 0
    found = []
    for name in dict.fromkeys((rule, "fixed")):
        places = torch.zeros(len(BUDGETS), len(rows.labels), dtype=torch.long)
        for own in (halves, ~halves):
            fitted, others = _part(rows, ~own), _part(rows, own)
            heat = temperatures(fitted).view(1, -1, 1)
            fitted, others = (replace(part, logits=part.logits / heat) for part in (fitted, others))
            settings = settings_for(
                name, torch.tensor(BUDGETS, dtype=torch.float64), {name: dial(name, fitted, costs)}, costs.reached
            )
            scores = others.scores(name)
            for number in range(len(BUDGETS)):
                places[number, own] = replay(name, scores, settings[number])
        results = (outcome(rows, places[number], costs) for number in range(len(BUDGETS)))
        found += [{"rule": name, "budget": budget} | asdict(one) for budget, one in zip(BUDGETS, results, strict=True)]
    return found


def checked_as_text(figures: list[dict[str, Any]], rows: int, folds: int) -> str:
    """The figures as a Markdown table."""
    lines = [
        f"fitted on {rows} rows; what follows is of answers by heads fitted on the other {folds - 1} of {folds} folds, with "
        "thresholds of the other half of the rows:",
        "",
        "| exit rule | budget | realised cost | accuracy | against the last head | the same exits at random |",
        "|---|---|---|---|---|---|",
    ]
    for row in figures:
        accuracy, gap = plus_minus(row["accuracy"], row["standard_error"], 4), plus_minus(row["gap"], row["gap_error"], 4)
        lines.append(f"| {row['rule']} | {row['budget']:g} | {row['cost']:.3f} | {accuracy} | {gap} | {row['shuffled']:.4f} |")
    return "\n".join(lines) + "\n"


def _part(rows: HeadLogits, chosen: torch.Tensor) -> HeadLogits:
    return HeadLogits(rows.logits[chosen], rows.labels[chosen], rows.tokens[chosen])
