"""What `anee simulate` prints and draws."""

from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

from ..machines.profile import Profile
from ..machines.simulating import Machine, roofline
from ..machines.workload import Workload


ROWS = (1, 8, 64, 512)  # of the linear maps under a roof
WIDTH = 128


def simulation_as_text(report: dict[str, Any]) -> str:
    """The report for a terminal: a table, and the machines."""
    case, table = report["case"], Table(box=None, pad_edge=False)
    for name in ("hardware", "known as"):
        table.add_column(name)
    for name in ("budget", "ms a step", "tokens/s", "J a token", f"prompt of {case['prompt']}, ms", "J", "most of a step"):
        table.add_column(name, justify="right" if name != "most of a step" else "left", no_wrap=True)
    for row in report["rows"]:
        table.add_row(
            row["hardware"],
            row["level"],
            f"{row['budget']:g}",
            f"{row['decode_ms']:.4g}",
            f"{row['tokens_per_second']:.4g}",
            f"{row['joules_per_token']:.3g}",
            f"{row['prefill_ms']:.4g}",
            f"{row['joules_per_prompt']:.3g}",
            "does not fit into its memory" if not row["fits"] else most_of(row["decode_parts_ms"]),
        )
    plans = dict.fromkeys((row["budget"], row["plan"]) for row in report["rows"])
    lines = [f"batch {case['batch']}, {case['context']} tokens before; joules are modelled", "", rendered(table), ""]
    lines += [f"budget {budget:g}: {plan}" for budget, plan in plans]
    return "\n".join([*lines, "", *(f"{name}: {about}" for name, about in report["machines"].items())])


def most_of(parts: dict[str, float]) -> str:
    """The part that takes longest, with its share."""
    longest = max(parts, key=lambda name: parts[name])
    return f"{longest} {parts[longest] / sum(parts.values()):.0%}"


def check_as_text(report: dict[str, Any]) -> str:
    """Predictions beside measurements for a terminal: errors by level, and every point."""
    aims = report["aims"]
    lines = [
        f"{len(report['points'])} points that nothing was fitted to; relative errors, aims {aims['median']:.0%} and "
        f"{aims['ninetieth']:.0%}",
        f"{'known as':12s}{'median':>10s}{'90th percentile':>18s}{'predicted/measured':>22s}",
    ]
    for level, errors in report["errors"].items():
        lines.append(f"{level:12s}{errors['median']:10.1%}{errors['ninetieth']:18.1%}{errors['ratio']:22.2f}")
    levels = list(report["errors"])
    lines += ["", f"{'':9s}{'batch':>6s}{'tokens':>8s}{'ms':>10s}" + "".join(f"{level:>10s}" for level in levels) + "  plan"]
    for point in report["points"]:
        known = "".join(f"{point[level] / point['ms'] - 1:+10.1%}" for level in levels)
        plan = point["plan"] if len(point["plan"]) < 50 else point["plan"][:47] + "..."
        lines.append(f"{point['kind']:9s}{point['batch']:6d}{point['length']:8d}{point['ms']:10.2f}{known}  {plan}")
    return "\n".join(lines)


def rooflines(loads: list[Workload], machines: list[Machine], profile: Profile | None) -> list[dict[str, Any]]:
    """The linear maps of plans under each machine's roof, ready for JSON."""
    return [
        {
            "name": machine.description.name,
            "bandwidth": machine.description.bandwidth_gb_s.value,
            "peaks": {name: one.value for name, one in machine.description.peak_gops.items()},
            "points": roofline(loads, machine, ROWS, profile),
        }
        for machine in machines
    ]


def rendered(table: Table) -> str:
    """A table as text."""
    console = Console(file=StringIO(), width=WIDTH, no_color=True)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())
