"""An early-exit classifier on labelled rows: accuracy against cost by rule and budget, with controls; calibration of heads."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..configuration_classifier import EXIT_RULES
from ..exit_rules import settings_for
from .early_exits import HeadLogits, calibration_bins, expected_calibration_error, outcome, replay
from .report import plus_minus


def rules_of(config: Any) -> list[str]:
    """The rules that a classifier has a dial for, and fixed exits, which need none."""
    return [rule for rule in EXIT_RULES if rule == "fixed" or rule in config.classifier["dials"]]


def exits_at(model: Any, rule: str, rows: HeadLogits, budget: float) -> Tensor:
    """The heads, int64 [N], where rows leave by a rule at a budget."""
    budgets = torch.full((1,), budget, dtype=torch.float64)
    settings = settings_for(rule, budgets, model.config.classifier["dials"], model.exit_costs.reached)
    return replay(rule, rows.scores(rule), settings[0])


def report(model: Any, rows: HeadLogits, budgets: Sequence[float]) -> dict[str, Any]:
    """Figures of a classifier: `rows` by rule and budget, the `last` head alone, and `heads` one by one.

    Args:
        model: an `AneeForSequenceClassification`.
        rows: what its heads say of rows that nothing was fitted on.
        budgets: to replay.
    """
    measured = []
    for rule in rules_of(model.config):
        for budget in budgets:
            found = outcome(rows, exits_at(model, rule, rows, budget), model.exit_costs)
            measured.append({"rule": rule, "budget": budget} | asdict(found))
    return {
        "labels": [model.config.id2label[number] for number in range(model.config.num_labels)],
        "texts": len(rows.labels),
        "tokens": int(rows.tokens.sum()),
        "unit": model.costs.unit,
        "layers": list(model.config.classifier["layers"]),
        "last": asdict(outcome(rows, exits_at(model, "fixed", rows, 1.0), model.exit_costs)),
        "rows": measured,
        "heads": heads(model, rows),
    }


def heads(model: Any, rows: HeadLogits) -> list[dict[str, Any]]:
    """By head: the layers before it, cost, accuracy, temperature, expected calibration error with and without it, bins."""
    temperatures = model.heads.temperature.cpu()
    raw = HeadLogits(rows.logits * temperatures.view(1, -1, 1), rows.labels, rows.tokens)
    return [
        {
            "layers": layers,
            "cost": float(model.exit_costs.reached[head]),
            "accuracy": float(rows.right[:, head].double().mean()),
            "temperature": float(temperatures[head]),
            "calibration_error": expected_calibration_error(rows, head),
            "calibration_error_without_temperature": expected_calibration_error(raw, head),
            "bins": [list(entry) for entry in calibration_bins(rows, head)],
        }
        for head, layers in enumerate(model.config.classifier["layers"])
    ]


def as_text(figures: dict[str, Any]) -> str:
    """The figures as two Markdown tables."""
    last = figures["last"]
    alone = plus_minus(last["accuracy"], last["standard_error"], 4)
    lines = [
        f"{figures['texts']} rows; the last head alone (cost 1): accuracy {alone}",
        "",
        "| exit rule | budget | realised cost | accuracy | against the last head | the same exits at random | exits used |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in figures["rows"]:
        used = " ".join(
            f"{layers}:{share:.0%}" for layers, share in zip(figures["layers"], row["used"], strict=True) if share >= 0.005
        )
        accuracy, gap = plus_minus(row["accuracy"], row["standard_error"], 4), plus_minus(row["gap"], row["gap_error"], 4)
        numbers = f"{row['budget']:g} | {row['cost']:.3f} | {accuracy} | {gap} | {row['shuffled']:.4f}"
        lines.append(f"| {row['rule']} | {numbers} | {used} |")
    lines += [
        "",
        "| head after layer | cost | accuracy | temperature | calibration error | without temperature |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {head['layers']} | {head['cost']:.3f} | {head['accuracy']:.4f} | {head['temperature']:.2f} | "
        f"{head['calibration_error']:.4f} | {head['calibration_error_without_temperature']:.4f} |"
        for head in figures["heads"]
    ]
    return "\n".join(lines)
