"""What `anee perplexity` measures and prints; the scores themselves are `evaluation/perplexity.py`'s."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..capacity import budgets_of
from ..checks import check_budget
from ..data.windows import Window
from ..evaluation.decode_time import Timing
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


def budgets_at(model: AneeForCausalLM, capacities: Sequence[float]) -> list[float]:
    """Budgets of capacities, highest first; 1.0 is always among them.

    Raises:
        ValueError: the model's controller has no capacities.
    """
    kind = model.config.controller
    return sorted({1.0, *(float(budgets_of(model.controller, kind, one, 1)) for one in capacities)}, reverse=True)


def timed(report: dict[str, Any], times: dict[float, float], timing: Timing) -> dict[str, Any]:
    """A report whose rows have the milliseconds of a token, too."""
    rows = [row | {"milliseconds": times[row["budget"]]} for row in report["rows"]]
    return report | {"rows": rows, "timing": asdict(timing)}


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
    timing = "timing" in report
    lines = [
        f"{report['controller']} controller, {report['dtype']}, cost unit {report['cost_unit']}, {report['windows']} windows "
        f"of {report['length']} tokens; +- is one standard error, ratio = perplexity / that at budget 1.0",
        "",
        f"{'budget':>6s}{'cost':>8s}{'perplexity':>22s}{'ratio':>20s}{'tokens':>9s}" + timing * "  ms/token   speed",
    ]
    for row in report["rows"]:
        perplexity = plus_minus(row["perplexity"], row["standard_error"], 3)
        times = plus_minus(row["ratio"], row["ratio_standard_error"], 4)
        line = f"{row['budget']:6.4g}{row['mean_cost']:8.3f}{perplexity:>22s}{times:>20s}{row['tokens']:9d}"
        if timing:
            line += f"{row['milliseconds']:10.2f}{report['rows'][0]['milliseconds'] / row['milliseconds']:8.2f}"
        lines.append(line)
    return "\n".join(lines)


def draw_plot(report: dict[str, Any], file: Path) -> None:
    """Draw perplexity against cost."""
    from ..pictures.budget_curve import draw_budget_curve, quality

    draw_budget_curve(quality(report), file)
