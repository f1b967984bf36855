"""The verb `anee deadline`: whether deadlines are kept while other processes take processors away."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..budget_sources import check_above_zero
from ..checks import check_budget
from ..data.progress import progress
from .console import Output, check_file, check_picture, deliver
from .generation import encode
from .model import load, named_model
from .options import (
    ControllerOption,
    DtypeOption,
    FiguresOption,
    GgufOption,
    ModelArgument,
    ModelOption,
    PrecisionsOption,
    TrustOption,
)


def deadline(
    name: ModelArgument = None,
    model: ModelOption = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="For each prompt. Default: 1.2 times what the first ones take at budget 1.0, undisturbed."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that each prompt gets.")] = 48,
    prompts: Annotated[int, typer.Option(min=1, max=20, help="How many prompts.")] = 20,
    processes: Annotated[int, typer.Option(min=0, help="Others, each busy on one processor from half of the deadline on.")] = 1,
    lowest_budget: Annotated[float, typer.Option(help="Never less, whatever the time.")] = 0.0,
    output: FiguresOption = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the budgets' way, and tokens against time: the picture to write.")
    ] = None,
    controller: ControllerOption = None,
    precisions: PrecisionsOption = None,
    dtype: DtypeOption = "float32",
    gguf_file: GgufOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Generate against a deadline while other processes take processors away half-way, beside a fixed budget of 1.0."""
    from ..evaluation.deadlines import PROMPTS, OtherProcesses, as_text, measure, ways_of
    from ..evaluation.report import write_report

    check_file("--output", output)
    check_picture("--plot", plot)
    check_budget(lowest_budget, "--lowest-budget")
    if seconds is not None:
        check_above_zero("--seconds", seconds)
    named = named_model(name, model)
    loaded, tokenizer = load(named, controller, dtype, "cpu", gguf_file, trust_remote_code, precisions)
    chat = tokenizer.chat_template is not None
    inputs = [encode(tokenizer, prompt, chat) for prompt in PROMPTS[:prompts]]
    with OtherProcesses(processes) as others, progress("generating", len(ways_of(1.0)) * len(inputs)) as advance:
        report = measure(loaded, inputs, new_tokens, others, seconds, lowest_budget, advance)
    figures = Output("figures", output, partial(write_report, report | {"processes": processes}))
    deliver(as_text(report), figures, Output("plot", plot, partial(_draw, report)))


def _draw(report: dict, file: Path) -> None:
    from ..pictures.budget_path import draw_budget_path

    draw_budget_path(report, file)
