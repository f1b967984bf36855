"""Perplexity against cost: controllers beside the controls that they must beat, on the same windows."""

from collections.abc import Callable, Sequence
from typing import Any

from ..data.windows import Window
from ..modeling_anee import AneeForCausalLM
from .controls import Control, controls, score_control
from .perplexity import Scores, ratio, score
from .report import plus_minus
from .uniform import Uniform


def compare(
    models: dict[str, AneeForCausalLM],
    windows: Sequence[Window],
    budgets: Sequence[float],
    others: Sequence[Control] = (),
    progress: Callable[[int], Any] | None = None,
    uniform: Sequence[Uniform] = (),
) -> list[dict[str, Any]]:
    """One row per budget and way to spend it: name, asked and realised cost, perplexity ratio, standard error.

    What has no dial has one row, whose budget is its cost, marked as `fixed`.

    Args:
        models: artifacts by name; the controls use the plans and bridges of the first.
        windows: of equal length.
        budgets: below 1.
        others: more controls, of the first artifact.
        progress: called with the number of windows that have just been scored.
        uniform: the base of the first artifact in other precisions.
    """
    first = next(iter(models.values()))
    listed = [*controls(first), *others]
    base = score(first, windows, 1.0, progress=progress)
    rows = [row("base", 1.0, base, base)]
    for one in uniform:
        scores = score(one.model, windows, one.budget, progress=progress)
        rows.append(row(one.name, one.cost, scores, base) | {"cost": one.cost, "fixed": True})
    for budget in budgets:
        for control in listed:
            rows.append(row(control.name, budget, score_control(first, control, windows, budget, progress), base))
        for name, model in models.items():
            rows.append(row(name, budget, score(model, windows, budget, progress=progress), base))
    return rows


def count_scores(models: int, budgets: int, others: int, uniform: int = 0) -> int:
    """How many times `compare` scores the windows."""
    return 1 + uniform + budgets * (3 + others + models)


def row(name: str, budget: float, scores: Scores, base: Scores) -> dict[str, Any]:
    """One row of the comparison."""
    times, error = ratio(scores, base)
    return {
        "name": name,
        "budget": budget,
        "cost": scores.mean_cost,
        "perplexity": scores.perplexity,
        "ratio": times,
        "standard_error": error,
    }


def with_times(rows: Sequence[dict[str, Any]], times: dict[tuple[str, float], float]) -> list[dict[str, Any]]:
    """The rows with milliseconds of a token by name and budget; None for what was not timed."""
    return [entry | {"milliseconds": times.get((entry["name"], entry["budget"]))} for entry in rows]


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table, with milliseconds if they have them."""
    timed = "milliseconds" in rows[0]
    lines = [
        "| budget | | realised cost | perplexity | ratio to the base |" + " ms/token |" * timed,
        "|---" * (5 + timed) + "|",
    ]
    for entry in rows:
        times = plus_minus(entry["ratio"], entry["standard_error"], 3)
        budget = "fixed" if entry.get("fixed") else f"{entry['budget']:g}"
        line = f"| {budget} | {entry['name']} | {entry['cost']:.3f} | {entry['perplexity']:.2f} | {times} |"
        if timed:
            line += "  |" if entry["milliseconds"] is None else f" {entry['milliseconds']:.2f} |"
        lines.append(line)
    return "\n".join(lines)
