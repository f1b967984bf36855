"""Predictions beside measurements on this machine, at plans, batches and lengths that nothing was fitted to."""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..modeling_anee import AneeForCausalLM
from ..plans import listed_plans
from ..timing import decode_seconds, seconds_of
from .measuring import usual_mean
from .simulating import Predictor
from .strict import cost_of, strict_plans
from .workload import Counter


POINTS = 40
BATCHES = (1, 1, 1, 2, 3, 5, 6)  # one row is what most decode; 3, 5 and 6 are in no profile
CONTEXTS = (16, 320)  # fewest and most tokens before those that are decoded
PROMPTS = (24, 400)
PREFILL_SHARE = 0.25  # of the points
NEW_TOKENS = 10
AIMS = {"median": 0.08, "ninetieth": 0.20}  # of the relative error


@dataclass(frozen=True)
class Point:
    """What is predicted and measured.

    Args:
        plan: in short.
        kind: `decode`, through `generate`, or `prefill`, one forward.
        batch: rows.
        length: tokens before, or of the prompt.
    """

    plan: str
    kind: str
    batch: int
    length: int


def points_of(model: AneeForCausalLM, count: int, seed: int, positions: int) -> list[Point]:
    """Points at random: mixed plans of a model, batches and lengths."""
    table, (plans, heads) = model.config.table, listed_plans(model.config)
    texts = [table.text(plan, head) for plan, head in zip(plans, heads, strict=True)]
    texts = [text for text in dict.fromkeys(texts) if not any(table[one].leaves for one in table.plan(text, len(plans[0])))]
    chosen = random.Random(seed)
    found: list[Point] = []
    for number in range(count):
        prefill = number < PREFILL_SHARE * count
        low, high = PROMPTS if prefill else CONTEXTS
        high = min(high, positions - NEW_TOKENS)
        length = chosen.randint(min(low, high), high)
        batch = 1 if prefill else chosen.choice(BATCHES)
        found.append(Point(chosen.choice(texts), "prefill" if prefill else "decode", batch, length))
    return found


class Plain:
    """Runs plans of a model as they are, every token the same: `plan`, strict, with the model's bridges and corrections.

    Args:
        model: whose plans these are.
        points: with the plans.
    """

    def __init__(self, model: AneeForCausalLM, points: Sequence[Point]) -> None:
        self.model = strict_plans(model, list(dict.fromkeys(point.plan for point in points)))
        longest = max(point.length for point in points) + NEW_TOKENS
        rows, generator = max(point.batch for point in points), torch.Generator("cpu").manual_seed(0)
        ids = torch.randint(3, model.config.text_config.vocab_size, (rows, longest), generator=generator, device="cpu")
        self._ids = ids.to(model.device)

    @torch.no_grad()
    def ms(self, point: Point) -> float:
        """Milliseconds of a step that decodes, or of a prompt."""
        budget, ids = cost_of(self.model, point.plan), self._ids[: point.batch, : point.length]
        if point.kind == "prefill":
            return 1e3 * seconds_of(partial(self.model, ids, energy_budget=budget, use_cache=True, logits_to_keep=1))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return 1e3 * decode_seconds(self.model, inputs, NEW_TOKENS, energy_budget=budget)


def check(
    model: AneeForCausalLM, levels: dict[str, Predictor], points: Sequence[Point], rounds: int, advance: Callable[[int], Any]
) -> dict[str, Any]:
    """Predictions of every level beside the usual mean of some rounds, after one that is not counted, ready for JSON."""
    counter, plain = Counter.of(model), Plain(model, points)
    rows = []
    for point in points:
        load = counter.workload(point.plan)
        measured = usual_mean([plain.ms(point) for _ in range(rounds + 1)][1:])
        known = {
            name: (by.prefill if point.kind == "prefill" else by.decode)(load, point.batch, point.length).total
            for name, by in levels.items()
        }
        rows.append(
            {"plan": point.plan, "kind": point.kind, "batch": point.batch, "length": point.length, "ms": measured} | known
        )
        advance(1)
    return {"points": rows, "aims": AIMS, "errors": {name: errors_of(rows, name) for name in levels}}


def errors_of(rows: Sequence[dict[str, Any]], level: str) -> dict[str, float]:
    """The median and the 90th percentile of |predicted / measured - 1|, and the median of predicted / measured."""
    errors = sorted(abs(row[level] / row["ms"] - 1.0) for row in rows)
    place = min(round(0.9 * (len(errors) - 1)), len(errors) - 1)
    ratio = statistics.median(row[level] / row["ms"] for row in rows)
    return {"median": statistics.median(errors), "ninetieth": errors[place], "ratio": ratio}
