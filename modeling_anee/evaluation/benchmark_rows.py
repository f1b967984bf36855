"""What a benchmark found: one row a case, and all of it as text."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..actions import NONE
from ..machines.energy import EnergyModel
from ..modeling_anee import AneeForCausalLM
from ..timing import ratios
from ..trace import ExecutionTrace


WIDTH = 25  # of the name of a case


@dataclass(frozen=True)
class Row:
    """Figures of one case.

    Args:
        case: what was run.
        tokens_per_second: of all rows of the batch, from the median.
        ratio: median over the rounds of seconds of plain transformers / seconds of this case.
        ratio_low: smallest ratio of a round.
        ratio_high: largest.
        mean_cost: share of the whole model, as the trace has it.
        weights_read: share of the whole model's weight bytes that decoding still reads (what was run, and the head).
        of_ceiling: speed-up over our own dense run / the speed-up that reading so many fewer bytes could give.
        joules_per_token: the prompt's joules included; the mean of the rounds, or modelled; None where neither can be.
        capacity: share of the feed-forwards that ran, of a `gated` controller.
    """

    case: str
    tokens_per_second: float
    ratio: float
    ratio_low: float
    ratio_high: float
    mean_cost: float
    weights_read: float | None = None
    of_ceiling: float | None = None
    joules_per_token: float | None = None
    capacity: float | None = None


class Run(NamedTuple):
    """Seconds and joules of one run of a case; no joules where the machine can't tell."""

    seconds: float
    joules: float | None


class Done(NamedTuple):
    """What one of our own cases did: the model that ran, its trace, the mean cost of a token, and the prompt's tokens."""

    model: AneeForCausalLM
    trace: ExecutionTrace
    cost: float
    prompt: int


def rows_of(
    runs: dict[str, list[Run]], done: dict[str, Done], tokens: int, with_ceiling: bool, energy: EnergyModel | None = None
) -> list[Row]:
    """A row for each case.

    Args:
        runs: of each case, plain transformers among them.
        done: what our own cases did.
        tokens: how many of them a run has, in all rows of its batch.
        with_ceiling: whether the bytes that were read say how fast it could be.
        energy: models the joules that were not measured; None: they are not known.
    """
    rows = []
    seconds = {name: [run.seconds for run in own] for name, own in runs.items()}
    dense = statistics.median(seconds["budget 1.0"])
    for name, own in runs.items():
        faster, median = ratios(seconds["plain"], seconds[name]), statistics.median(seconds[name])
        trace = done[name].trace if name in done else None
        read = weights_read(done[name].model, done[name].trace) if with_ceiling and name in done else None
        rows.append(
            Row(
                case=name,
                tokens_per_second=tokens / median,
                ratio=statistics.median(faster),
                ratio_low=min(faster),
                ratio_high=max(faster),
                mean_cost=done[name].cost if name in done else 1.0,
                weights_read=read,
                of_ceiling=None if read is None else dense / median * read,
                joules_per_token=joules_per_token(own, done.get(name, done["budget 1.0"]), tokens, energy),
                capacity=None if trace is None or trace.fed is None else trace.capacity,
            )
        )
    return rows


def joules_per_token(runs: Sequence[Run], done: Done, tokens: int, energy: EnergyModel | None) -> float | None:
    """Of some runs of a case, measured or else modelled; plain transformers run what the whole model does."""
    measured = [run.joules for run in runs if run.joules is not None]
    if len(measured) == len(runs):
        return statistics.mean(measured) / tokens
    if energy is None:
        return None
    return energy.of_trace(done.model, done.trace, done.prompt, statistics.median(run.seconds for run in runs)) / tokens


def weights_read(model: AneeForCausalLM, trace: ExecutionTrace) -> float:
    """Share of the whole model's bytes in what was run, bridges and heads included; deferred keys cost next to none."""
    table = model.config.table
    costs = model.costs
    if costs.unit != "bytes":
        costs = model.stack.measure_costs("bytes", model.bridges, table)
    read = costs.layers.clone()
    for place, action in enumerate(table):
        if action.attention == NONE:  # its layers cost keys and values
            works = costs.works[action.keys_values]
            read[:, place] -= torch.tensor([costs.hardware.price(work.keys_values) / costs.total for work in works])
    taken = trace.actions[trace.valid].long()
    stack = float(read[torch.arange(len(read)), taken].sum(dim=-1).mean())
    return stack + (costs.head if trace.head is None else float(costs.of_heads(trace.head[trace.valid]).mean()))


def as_text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [
        f"{report['dtype']} on {report['device']}, {report['threads']} threads, {report['controller']} controller, medians of "
        f"{report['rounds']} interleaved rounds; ratio = plain transformers / ours"
    ]
    for title, rows in report["tables"].items():
        heads = f"{'tokens/s':>10s}{'ratio':>8s}{'min-max':>12s}{'cost':>8s}{'J/token':>10s}{'read':>7s}{'of ceiling':>12s}"
        gated = any(row["capacity"] is not None for row in rows)
        heads += f"{'capacity':>10s}" * gated
        lines += ["", title, f"{'case':{WIDTH}s}{heads}"]
        for row in rows:
            read, ceiling = (f"{row[name]:.2f}" if row[name] is not None else "" for name in ("weights_read", "of_ceiling"))
            joules = "" if row["joules_per_token"] is None else f"{row['joules_per_token']:.3g}"
            spread = f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}"
            lines.append(
                f"{row['case']:{WIDTH}s}{row['tokens_per_second']:10.1f}{row['ratio']:8.2f}{spread:>12s}{row['mean_cost']:8.3f}"
                f"{joules:>10s}{read:>7s}{ceiling:>12s}{'' if row['capacity'] is None else format(row['capacity'], '10.2f')}"
            )
    overheads = ", ".join(f"{kind} {share:+.1%}" for kind, share in report["controller_overhead"].items())
    question = f"{report['head_share']:+.0%} for each question of confidence (the head, by its share of the work)"
    lines += ["", f"what deciding adds to a decoding step: {overheads}; {question}"]
    lines.append(energy_line(report["energy"]))
    if report["memory"]:
        lines += ["", f"{'memory of a process, MiB':{WIDTH + 15}s}{'at most':>10s}{'at the end':>12s}{'of it model':>13s}"]
    for name, sizes in report["memory"].items():
        peak, end, model = (sizes[kind] / 2**20 for kind in ("peak", "end", "model"))
        lines.append(f"{name:{WIDTH + 15}s}{peak:10.0f}{end:12.0f}{model:13.0f}")
    return "\n".join(lines)


def energy_line(energy: dict[str, str]) -> str:
    """What joules are of."""
    if not energy["reason"]:
        return f"energy: of {energy['counted']}"
    if energy["modelled"]:
        return f"energy: modelled as {energy['modelled']} (not measured: {energy['reason']})"
    return f"energy not known: {energy['reason']}"
