"""What `anee perplexity` measures and prints; the scores themselves are `evaluation/perplexity.py`'s."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..checks import check_budget
from ..data.windows import Window
from ..evaluation.perplexity import ratio, score
from ..evaluation.processes import ALONE, Processes
from ..evaluation.report import plus_minus
from ..modeling_anee import AneeForCausalLM


def parse_budgets(text: str) -> list[float]:
    """Budgets of a list like `1.0,0.8`, highest first; 1.0 is always among them, since it is the base.

    Raises:
        ValueError: something that is not a number between 0 and 1.
    """
    budgets = {1.0}
    for part in text.split(","):
        try:
            budgets.add(check_budget(float(part)))
        except ValueError as error:
            raise ValueError(f"--budgets {text}: {part.strip()!r} is not a number between 0 and 1") from error
    return sorted(budgets, reverse=True)


def measure(
    model: AneeForCausalLM,
    windows: Sequence[Window],
    budgets: Sequence[float],
    batch_size: int,
    progress: Callable[[int], Any],
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Figures of every budget, ready for JSON; the first budget is what the others are compared with."""
    scores = [score(model, windows, budget, batch_size, progress, processes) for budget in budgets]
    rows = []
    for budget, own in zip(budgets, scores, strict=True):
        times, times_error = ratio(own, scores[0])
        rows.append(
            {
                "budget": budget,
                "mean_cost": own.mean_cost,
                "perplexity": own.perplexity,
                "standard_error": own.standard_error,
                "ratio": times,
                "ratio_standard_error": times_error,
                "tokens": int(own.tokens.sum()),
            }
        )
    return {
        "controller": model.config.controller,
        "cost_unit": model.config.cost_unit,
        "dtype": str(model.dtype).removeprefix("torch."),
        "windows": len(windows),
        "windows_sha256": scores[0].digest,
        "rows": rows,
    }


def as_text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [
        f"{report['controller']} controller, {report['dtype']}, cost unit {report['cost_unit']}, {report['windows']} windows "
        f"of {report['length']} tokens; +- is one standard error, ratio = perplexity / that at budget 1.0",
        "",
        f"{'budget':>6s}{'cost':>8s}{'perplexity':>22s}{'ratio':>20s}{'tokens':>9s}",
    ]
    for row in report["rows"]:
        perplexity = plus_minus(row["perplexity"], row["standard_error"], 3)
        times = plus_minus(row["ratio"], row["ratio_standard_error"], 4)
        lines.append(f"{row['budget']:6.4g}{row['mean_cost']:8.3f}{perplexity:>22s}{times:>20s}{row['tokens']:9d}")
    return "\n".join(lines)


def draw_plot(report: dict[str, Any], file: Path) -> None:
    """Draw perplexity against cost."""
    from ..pictures.budget_curve import draw_budget_curve, quality

    draw_budget_curve(quality(report), file)
