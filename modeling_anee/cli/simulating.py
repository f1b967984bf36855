"""The verb `anee simulate`: what plans cost on machines that need not be here, and how true that is of this one."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.progress import progress
from .console import Output, check_file, check_picture, deliver
from .model import load, named_model
from .options import (
    ControllerOption,
    DeviceOption,
    DtypeOption,
    FiguresOption,
    GgufOption,
    ModelArgument,
    ModelOption,
    PrecisionsOption,
    TrustOption,
)
from .perplexity import parse_budgets
from .profiling import BatchOption, ContextOption, load_profile


THIS = "this"
ENERGY = "server-cpu"  # whose energy a machine is taken to need that was measured and not described


def simulate(
    name: ModelArgument = None,
    model: ModelOption = None,
    hardware: Annotated[
        list[str] | None,
        typer.Option(help="Machine: a name, a JSON file, or `this` with --profile; repeatable. Default: all that come along."),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="What `anee profile` wrote: for `this`, or of the one --hardware that is named.")
    ] = None,
    budgets: Annotated[str, typer.Option(help="Energy budgets: the dearest plan within each.")] = "1.0,0.5,0.18,0.14",
    batch: BatchOption = 1,
    context: ContextOption = 256,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    check: Annotated[
        bool, typer.Option("--check", help="Measure plans here, too, at points that were not fitted to, and tell the errors.")
    ] = False,
    points: Annotated[int, typer.Option(min=1, help="Of --check.")] = 40,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each point of --check; their mean but the slowest counts.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the points of --check.")] = 0,
    output: FiguresOption = None,
    roofline: Annotated[Path | None, typer.Option(help="Draw the linear maps under each roof: the picture to write.")] = None,
    parts: Annotated[Path | None, typer.Option(help="Draw where the time of a token goes: the picture to write.")] = None,
    controller: ControllerOption = None,
    precisions: PrecisionsOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    gguf_file: GgufOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Tell what plans cost in time and energy on described machines, by rooflines, and on this one, as it was measured."""
    from ..evaluation.report import write_report
    from ..machines.checking import check as checked
    from ..machines.checking import points_of
    from ..machines.measuring import positions_of
    from ..machines.simulating import Case, plans_at
    from ..machines.simulating import simulate as simulated
    from ..machines.workload import Counter
    from .simulated import check_as_text, rooflines, simulation_as_text

    check_file("--output", output)
    check_picture("--roofline", roofline)
    check_picture("--parts", parts)
    listed = parse_budgets(budgets)
    machines, measured = machines_of(hardware, profile, dtype, check)
    named = named_model(name, model)
    loaded, _ = load(named, controller, dtype, device, gguf_file, trust_remote_code, precisions)
    if check:
        chosen = points_of(loaded, points, seed, positions_of(loaded))
        with progress("measuring points", len(chosen)) as advance:
            report = checked(loaded, machines[0].levels, chosen, repeats, advance)
        deliver(check_as_text(report), Output("figures", output, partial(write_report, report)))
        return
    plans, counter = plans_at(loaded, listed), Counter.of(loaded)
    case = Case(batch, context, prompt)
    rows = simulated(counter, plans, machines, case)
    report = {"case": {"batch": batch, "context": context, "prompt": prompt}, "rows": rows}
    report["machines"] = {one.description.name: one.description.about for one in machines}
    report["roofline"] = rooflines(
        [counter.workload(plans[max(plans)]), counter.workload(plans[min(plans)])], machines, measured
    )
    deliver(
        simulation_as_text(report),
        Output("figures", output, partial(write_report, report)),
        Output("roofline", roofline, partial(_draw_rooflines, report)),
        Output("parts", parts, partial(_draw_parts, report)),
    )


def machines_of(hardware: list[str] | None, file: Path | None, dtype: str, check: bool) -> tuple[list[Any], Any]:
    """The machines to simulate, and the profile, if there is one.

    Raises:
        ValueError: `this` or --check without a profile, a profile of several machines, or an unknown machine.
    """
    from ..machines.description import FOLDER, Description
    from ..machines.simulating import Machine

    profile = None if file is None else load_profile(file)
    names = hardware or ([THIS] if profile is not None else sorted(one.stem for one in FOLDER.glob("*.json")))
    if profile is None and (check or THIS in names):
        raise ValueError(
            f"{'--check' if check else f'--hardware {THIS}'} needs --profile: `anee profile` measures this machine"
        )
    if profile is not None and len(names) - (THIS in names) > (0 if THIS in names else 1):
        raise ValueError("--profile is of one machine: leave it out, or name that one with --hardware")
    if profile is None:
        return [Machine.described(Description.find(name), dtype) for name in names], None
    known = None if names == [THIS] else Description.find(names[0])
    return [Machine.profiled(profile, known or Description.find(ENERGY), known)], profile


def _draw_rooflines(report: dict, file: Path) -> None:
    from ..pictures.roofline import draw_rooflines

    draw_rooflines(report["roofline"], file)


def _draw_parts(report: dict, file: Path) -> None:
    from ..pictures.time_parts import draw_parts

    draw_parts(report["rows"], file)
