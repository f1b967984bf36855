"""How long an early-exit classifier takes at each budget, run by itself, and in the plain base run in full."""

import statistics
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

from ..exit_rules import NEVER
from .classification import rules_of
from .early_exits import batches


def measure(
    model: Any, rows: Sequence[Sequence[int]], budgets: Sequence[float], batch_size: int = 1, repeats: int = 3
) -> list[dict[str, Any]]:
    """Milliseconds of a row by rule and budget; the plain base, its layers called by transformers, comes first.

    Every round takes all cases in turn, so that what slows the machine for a while slows all of them; the median counts.

    Args:
        model: an `AneeForSequenceClassification`.
        rows: token ids.
        budgets: for each rule that has a dial, fixed exits among them.
        batch_size: rows that are run together, of like lengths.
        repeats: rounds, after one that does not count.
    """
    made = [(ids.to(model.device), mask.to(model.device)) for _, ids, mask in batches(rows, batch_size)]
    rules = rules_of(model.config)
    cases: list[tuple[str, float]] = [("plain base", NEVER)]
    cases += [(rule, budget) for rule in rules for budget in budgets]
    taken: dict[tuple[str, float], list[float]] = {case: [] for case in cases}
    for _ in range(repeats + 1):
        for case in cases:
            start = perf_counter()
            _run(model, made, *case)
            taken[case].append(perf_counter() - start)
    medians = {case: 1000 * statistics.median(times[1:]) / len(rows) for case, times in taken.items()}
    plain = medians[cases[0]]
    return [
        {"rule": rule, "budget": min(budget, 1.0), "batch_size": batch_size, "milliseconds": ms, "speedup": plain / ms}
        for (rule, budget), ms in medians.items()
    ]


@torch.inference_mode()
def _run(model: Any, made: Sequence[tuple[Any, Any]], rule: str, budget: float) -> None:
    for ids, mask in made:
        if budget == NEVER:
            model.base.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        else:
            model(ids, mask, exit_rule=rule, energy_budget=budget)


def times_as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The times as a Markdown table."""
    lines = [
        f"| exit rule | budget | ms a row (batches of {rows[0]['batch_size']}) | speed, plain base = 1 |",
        "|---|---|---|---|",
    ]
    lines += [f"| {row['rule']} | {row['budget']:g} | {row['milliseconds']:.2f} | {row['speedup']:.2f} |" for row in rows]
    return "\n".join(lines)
