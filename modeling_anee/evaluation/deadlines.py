"""Whether a deadline is kept while other processes take processors away half-way, beside the same prompts at a fixed budget."""

import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..budget_sources import Deadline
from ..modeling_anee import AneeForCausalLM
from ..timing import greedy, now
from .benchmark import PROMPTS as INSTRUCTIONS
from .samples import PROMPTS as QUESTIONS


PROMPTS = (
    *INSTRUCTIONS,
    *QUESTIONS,
    "Describe how a bill becomes a law.",
    "What should I look for when I buy a used bicycle?",
)
KEPT = 0.05  # share of a deadline by which it may be missed
SPARE = 1.2  # of the time that a prompt takes undisturbed
FOLLOWS, SAME_THREADS, FIXED = "deadline", "deadline, same threads", "budget 1.0"
# Keeps one processor busy between the lines `begin` and `end`, until its input ends.
SPIN = """
import os, sys, threading
busy = threading.Event()
def spin():
    while busy.wait():
        sum(range(10000))
if hasattr(os, "sched_setaffinity"):
    own = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {own[-1 - int(sys.argv[1]) % len(own)]})
threading.Thread(target=spin, daemon=True).start()
for line in sys.stdin:
    (busy.set if line.strip() == "begin" else busy.clear)()
"""


class Disturbance(Protocol):
    """What makes the machine slower for a while."""

    def begin(self) -> None:
        """From now on."""

    def end(self) -> None:
        """Until now."""


class OtherProcesses:
    """So many processes that each keep a processor busy, the last ones first, while they are told to."""

    def __init__(self, count: int) -> None:
        command = [sys.executable, "-c", SPIN]
        self._processes = [
            subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, text=True) for number in range(count)
        ]

    def __enter__(self) -> "OtherProcesses":
        """Idle until they are told to begin."""
        return self

    def __exit__(self, *error: object) -> None:
        """End them."""
        for process in self._processes:
            process.communicate()  # closes its input

    def begin(self) -> None:
        """Keep busy from now on."""
        self._tell("begin")

    def end(self) -> None:
        """Be idle from now on."""
        self._tell("end")

    def _tell(self, what: str) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{what}\n")
            process.stdin.flush()


class HalfWay(BaseStreamer):
    """Notes when tokens come, in seconds since it was made, and in how many threads; has a disturbance begin after a time."""

    def __init__(self, disturbance: Disturbance, seconds: float) -> None:
        self._disturbance, self._due, self._begun = disturbance, seconds, now()
        self.times: list[float] = []
        self.threads: list[int] = []
        self.disturbed: float | None = None
        self._seen_prompt = False

    def put(self, value: Tensor) -> None:
        """A token has come; the first call has the prompt."""
        seconds = now() - self._begun
        if self._seen_prompt:
            self.times.append(seconds)
            self.threads.append(torch.get_num_threads())
        self._seen_prompt = True
        if self.disturbed is None and seconds >= self._due:
            self.disturbed = seconds
            self._disturbance.begin()

    def end(self) -> None:
        """Nothing to flush."""


def measure(
    model: AneeForCausalLM,
    prompts: Sequence[dict[str, Tensor]],
    new_tokens: int,
    disturbance: Disturbance,
    deadline: float | None = None,
    lowest: float = 0.0,
    progress: Callable[[int], Any] = lambda count: None,
) -> dict[str, Any]:
    """Each prompt against a deadline and at budget 1.0, the disturbance beginning at half of the deadline; ready for JSON.

    With more than one thread the deadline is tried without changing their number, too.

    Args:
        model: what generates.
        prompts: token ids and mask of each, [1, T].
        new_tokens: how many each gets.
        disturbance: what makes the machine slower.
        deadline: seconds for a prompt; default: 1.2 times the median of those at budget 1.0, undisturbed.
        lowest: the smallest budget that a deadline may lead to.
        progress: called with 1 after each generation.
    """
    if deadline is None:
        deadline = SPARE * _undisturbed(model, prompts[:3], new_tokens)
    ways = ways_of(deadline, lowest)
    rows = []
    for number, inputs in enumerate(prompts):
        for name, budget in ways.items():
            rows.append({"prompt": number, "way": name} | _run(model, inputs, new_tokens, budget, disturbance, deadline))
            progress(1)
    return {
        "controller": model.config.controller,
        "threads": torch.get_num_threads(),
        "new_tokens": new_tokens,
        "deadline": deadline,
        "lowest_budget": lowest,
        "rows": rows,
        "ways": [_summary(name, [row for row in rows if row["way"] == name]) for name in ways],
    }


def ways_of(deadline: float, lowest: float = 0.0) -> dict[str, Deadline | float]:
    """The budgets of a prompt, by name."""
    ways: dict[str, Deadline | float] = {FOLLOWS: Deadline(deadline, lowest=lowest)}
    if torch.get_num_threads() > 1:
        ways[SAME_THREADS] = Deadline(deadline, lowest=lowest, change_threads=False)
    return ways | {FIXED: 1.0}


def _undisturbed(model: AneeForCausalLM, prompts: Sequence[dict[str, Tensor]], new_tokens: int) -> float:
    """Median seconds at budget 1.0, after one run that is not counted."""
    seconds = []
    for inputs in (prompts[0], *prompts):
        begin = now()
        model.generate(**inputs, **greedy(new_tokens), energy_budget=1.0)  # type: ignore[arg-type]
        seconds.append(now() - begin)
    return statistics.median(seconds[1:])


def _run(
    model: AneeForCausalLM,
    inputs: dict[str, Tensor],
    new_tokens: int,
    budget: Deadline | float,
    disturbance: Disturbance,
    deadline: float,
) -> dict[str, Any]:
    """One generation: when its tokens came, what they were asked to cost, and what they cost."""
    watch = HalfWay(disturbance, deadline / 2)
    try:
        options: dict[str, Any] = {**greedy(new_tokens), "streamer": watch, "return_dict_in_generate": True}
        output: Any = model.generate(**inputs, **options, energy_budget=budget)  # type: ignore[arg-type]
    finally:
        disturbance.end()
    trace, start = output.execution, inputs["input_ids"].shape[1]
    return {
        "seconds": watch.times[-1],
        "late": watch.times[-1] / deadline - 1.0,
        "disturbed": watch.disturbed,
        "cost": float(trace.cost[0, start:].mean()),
        "times": watch.times,
        "threads": watch.threads,
        "budgets": trace.budget[0, start - 1 :].tolist(),  # of what each new token was chosen from
    }


def _summary(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    late = [row["late"] for row in rows]
    return {
        "way": name,
        "kept": sum(abs(one) <= KEPT for one in late),
        "not_late": sum(one <= KEPT for one in late),
        "of": len(late),
        "earliest": min(late),
        "latest": max(late),
        "cost": statistics.mean(row["cost"] for row in rows),
    }


def as_text(report: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    lines = [
        f"deadline {report['deadline']:.3g} s for {report['new_tokens']} new tokens, {report['threads']} threads; others are "
        "busy from half of it on",
        "",
        f"| | within {KEPT:.0%} | at most {KEPT:.0%} late | earliest | latest | mean cost |",
        "|---|---|---|---|---|---|",
    ]
    for way in report["ways"]:
        met = f"{way['kept']} of {way['of']} | {way['not_late']} of {way['of']}"
        lines.append(f"| {way['way']} | {met} | {way['earliest']:+.1%} | {way['latest']:+.1%} | {way['cost']:.3f} |")
    lines += ["", "| prompt | " + " | ".join(f"{way['way']}, s | | cost" for way in report["ways"]) + " |"]
    lines.append("|---" * (1 + 3 * len(report["ways"])) + "|")
    for number in sorted({row["prompt"] for row in report["rows"]}):
        own = [row for row in report["rows"] if row["prompt"] == number]
        cells = " | ".join(f"{row['seconds']:.2f} | {row['late']:+.1%} | {row['cost']:.3f}" for row in own)
        lines.append(f"| {number + 1} | {cells} |")
    return "\n".join(lines)
