"""Verbs about the time that plans take: `anee profile` measures this machine, `anee plan` picks a plan by it."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..budget_sources import check_above_zero
from ..data.progress import progress
from .console import Output, check_file, deliver
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


PROFILE = Path("anee_profile.json")
ProfileOption = Annotated[Path, typer.Option("--profile", help="What `anee profile` wrote on the machine that is meant.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Rows that are decoded together.")]
ContextOption = Annotated[int, typer.Option(min=1, help="Tokens before those that are decoded.")]


def profile(
    name: ModelArgument = None,
    model: ModelOption = None,
    output: Annotated[Path, typer.Option(help="JSON file for the profile.")] = PROFILE,
    prices: Annotated[
        Path | None, typer.Option(help="JSON file for what the anee section of a recipe needs to count in milliseconds.")
    ] = None,
    context: ContextOption = 256,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    gguf_file: GgufOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure this machine for a base: linear maps in every precision at 1 to 512 rows, and everything around them."""
    from ..evaluation.report import write_report
    from ..machines.measuring import effort_for, measure
    from ..machines.prices import prices_of
    from .profiles import profile_as_text

    check_file("--output", output)
    check_file("--prices", prices)
    named = named_model(name, model)
    loaded, _ = load(named, None, dtype, device, gguf_file, trust_remote_code)
    effort = effort_for(loaded)
    with progress("measuring", effort.steps) as advance:
        measured = measure(loaded, advance, effort)
    fields = {"cost_unit": "ms", "prices": prices_of(measured, context)}
    priced = Output("prices", prices, partial(write_report, fields))
    deliver(profile_as_text(measured), Output("profile", output, measured.save), priced)


def plan(
    name: ModelArgument = None,
    model: ModelOption = None,
    max_ms_per_token: Annotated[float | None, typer.Option(help="What a step that decodes may take.")] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="Instead: what is to be decoded, in all rows together.")
    ] = None,
    profile: ProfileOption = PROFILE,
    batch: BatchOption = 1,
    context: ContextOption = 256,
    output: FiguresOption = None,
    controller: ControllerOption = None,
    precisions: PrecisionsOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    gguf_file: GgufOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Pick the best plan that a profile predicts to be fast enough, and the energy budget that asks for it."""
    from ..evaluation.report import write_report
    from ..machines.choice import candidates, choose
    from ..machines.prediction import Predicted
    from .profiles import choice_as_text, choice_report, machine_note

    check_file("--output", output)
    most_ms = most_ms_of(max_ms_per_token, tokens_per_second, batch)
    measured = load_profile(profile)
    named = named_model(name, model)
    loaded, _ = load(named, controller, dtype, device, gguf_file, trust_remote_code, precisions)
    with progress("predicting plans", count_plans(loaded)) as advance:
        listed = candidates(loaded, Predicted.measured(measured), batch, context, advance)
    chosen = choose(listed, most_ms)
    report = choice_report(loaded, measured, chosen, len(listed), batch, context) | {
        "most_ms": most_ms,
        "profile": str(profile),
    }
    if note := machine_note(measured, loaded.device):
        print(note, file=sys.stderr)
    deliver(choice_as_text(report), Output("figures", output, partial(write_report, report)))


def load_profile(file: Path) -> Any:
    """A profile from its file.

    Raises:
        FileNotFoundError: there is none; the message says what makes one.
        ValueError: it is none.
    """
    from ..machines.profile import Profile

    if not file.exists():
        raise FileNotFoundError(f"--profile {file} is not there: `anee profile --output {file}` measures this machine")
    return Profile.load(file)


def most_ms_of(max_ms_per_token: float | None, tokens_per_second: float | None, batch: int) -> float:
    """Milliseconds that a step may take, from the one option that was given.

    Raises:
        ValueError: neither or both were, or not above 0.
    """
    given = {"--max-ms-per-token": max_ms_per_token, "--tokens-per-second": tokens_per_second}
    listed = [(option, value) for option, value in given.items() if value is not None]
    if len(listed) != 1:
        raise ValueError(f"{' and '.join(given)} both say how fast it is to be: give one of them")
    option, value = listed[0]
    check_above_zero(option, value)
    return value if max_ms_per_token is not None else 1e3 * batch / value


def count_plans(model: Any) -> int:
    """How many plans are predicted."""
    from ..plans import listed_plans

    return 1 + len(listed_plans(model.config)[0])
