"""How long an early-exit classifier takes at each budget, run by itself, and in the plain base run in full.

Every round runs each case over the same rows, so a case takes `repeats + 1` times as many forwards as there are rows: some of
the rows, of all lengths, are enough.
"""

import statistics
from collections.abc import Callable, Sequence
from itertools import product
from time import perf_counter
from typing import Any

import torch

from ..exit_rules import NEVER, settings_for
from .early_exits import batches


PLAIN = "plain base"
Case = tuple[str, float]  # an exit rule and a budget


def measure(
    model: Any,
    rows: Sequence[Sequence[int]],
    budgets: Sequence[float],
    batch_size: int = 1,
    repeats: int = 3,
    done: Callable[[int], Any] = lambda count: None,
) -> list[dict[str, Any]]:
    """Milliseconds of a row by rule and budget; the plain base, its layers called by transformers, comes first.

    Every round takes all cases in turn, so that what slows the machine for a while slows all of them; the median counts.

    Args:
        model: an `AneeForSequenceClassification`.
        rows: token ids.
        budgets: for the rule that the model goes by, and for fixed exits; 1 beside them.
        batch_size: rows that are run together, of like lengths.
        repeats: rounds, after one that does not count.
        done: called with 1 after each case of each round.
    """
    made = [(ids.to(model.device), mask.to(model.device)) for _, ids, mask in batches(rows, batch_size)]
    found = cases(model, budgets)
    taken: dict[Case, list[float]] = {case: [] for case in found}
    for _ in range(repeats + 1):
        for case in found:
            start = perf_counter()
            _run(model, made, *case)
            taken[case].append(perf_counter() - start)
            done(1)
    medians = {case: 1000 * statistics.median(times[1:]) / len(rows) for case, times in taken.items()}
    plain = medians[found[0]]
    return [
        {"rule": rule, "budget": budget, "batch_size": batch_size, "milliseconds": ms, "speedup": plain / ms}
        for (rule, budget), ms in medians.items()
    ]


def cases(model: Any, budgets: Sequence[float]) -> list[Case]:
    """What is measured: the plain base, the last head alone, and the lowest of all budgets at which rows leave alike."""
    dials = model.config.classifier["dials"]
    known: dict[tuple[str | float, ...], Case] = {}
    rules = dict.fromkeys(rule for rule in (model.config.exit_rule, "fixed") if rule == "fixed" or rule in dials)
    for rule, budget in product(rules, sorted({*budgets, 1.0}, reverse=True)):
        settings = settings_for(rule, torch.full((1,), budget, dtype=torch.float64), dials, model.exit_costs.reached)
        if not (settings == NEVER).all():
            known[rule, *settings[0].tolist()] = (rule, budget)
        elif budget == 1.0:  # to the last head, whatever the rule
            known.setdefault((), (rule, budget))
    return [(PLAIN, 1.0), *known.values()]


def spread(rows: Sequence[Sequence[int]], count: int) -> list[int]:
    """Places of so many rows, evenly spread over their lengths."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    count = min(count, len(rows))
    return [order[(2 * number + 1) * len(rows) // (2 * count)] for number in range(count)]


@torch.inference_mode()
def _run(model: Any, made: Sequence[tuple[Any, Any]], rule: str, budget: float) -> None:
    for ids, mask in made:
        if rule == PLAIN:
            model.base.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        else:
            model(ids, mask, exit_rule=rule, energy_budget=budget)


def times_as_text(times: Sequence[dict[str, Any]], outcomes: Sequence[dict[str, Any]], last: dict[str, Any]) -> str:
    """The times as a Markdown table, beside what comes of them.

    Args:
        times: what `measure` found.
        outcomes: rows of `classification.report` that have those rules and budgets.
        last: the same of the last head alone.
    """
    lines = [
        f"| exit rule | budget | ms a row (batches of {times[0]['batch_size']}) | speed, plain base = 1 | realised cost | "
        "accuracy | the same exits at random |",
        "|---|---|---|---|---|---|---|",
    ]
    known = {(row["rule"], row["budget"]): row for row in outcomes}
    for row in times:
        timed = f"| {row['rule']} | {row['budget']:g} | {row['milliseconds']:.2f} | {row['speedup']:.2f} |"
        found = last if row["budget"] == 1.0 else known[row["rule"], row["budget"]]
        said = [f"{found[name]:.{digits}f}" for name, digits in (("cost", 3), ("accuracy", 4), ("shuffled", 4))]
        lines.append(f"{timed} {' | '.join(['', '', ''] if row['rule'] == PLAIN else said)} |")
    return "\n".join(lines)
