"""Verbs that measure: `anee bench`, `anee perplexity`, `anee compare`, `anee analyze` and `anee samples`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..capacity import LOWEST, check_capacity
from ..data.progress import progress, waiting
from .console import Output, check_file, check_picture, deliver, extra_libraries
from .model import energy_model, load, named_model
from .options import (
    ControllerOption,
    DeviceOption,
    DtypeOption,
    EnergyOption,
    FiguresOption,
    GgufOption,
    LengthOption,
    LimitOption,
    ModelArgument,
    ModelOption,
    PrecisionsOption,
    TextOption,
    TrustOption,
)


def bench(
    name: ModelArgument = None,
    model: ModelOption = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file for the figures. Default: anee_bench.json, or anee_bench_lossless.json.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that each run decodes.")] = 48,
    repeats: Annotated[int, typer.Option(min=1, help="Counted runs of each case.")] = 5,
    batch: Annotated[int, typer.Option(min=1, max=8, help="Rows of the batched decoding.")] = 8,
    prefill: Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")] = 512,
    capacities: Annotated[
        str | None, typer.Option(help="Of a gated controller, to measure instead of budgets, such as 0.9,0.7,0.55,0.4.")
    ] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Time lossless decoding of questions beside other ways to the same tokens.")
    ] = False,
    questions: Annotated[
        Path | None, typer.Option(help="Of --lossless: a file of Spec-Bench or MT-bench. Default: eight questions of our own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of --lossless: so many questions, over the categories.")] = None,
    energy_of: EnergyOption = None,
    controller: ControllerOption = None,
    precisions: PrecisionsOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    gguf_file: GgufOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Compare wall-clock with plain transformers: one process, runs interleaved, medians."""
    from ..evaluation.benchmark import benchmark
    from ..evaluation.benchmark_rows import as_text
    from ..evaluation.lossless_benchmark import benchmark_lossless
    from ..evaluation.questions import OWN, over_categories, read_questions
    from ..evaluation.report import write_report
    from .lossless import benchmark_as_text

    output = output or Path("anee_bench_lossless.json" if lossless else "anee_bench.json")
    check_file("--output", output)
    if not lossless and (questions is not None or limit is not None):
        raise ValueError(f"{'--questions' if questions is not None else '--limit'} is for --lossless")
    asked = over_categories(OWN if questions is None else read_questions(questions), limit)
    listed = [] if capacities is None else parse_capacities(capacities)
    energy, named = energy_model(energy_of), named_model(name, model)
    loaded, tokenizer = load(named, controller, dtype, device, gguf_file, trust_remote_code, precisions)
    if lossless:
        with progress("answering questions", len(asked)) as advance:
            report = benchmark_lossless(loaded, tokenizer, asked, new_tokens, advance)
        deliver(benchmark_as_text(report), Output("figures", output, partial(write_report, report)))
        return
    with waiting("measuring"):
        report = benchmark(loaded, tokenizer, new_tokens, repeats, batch, prefill, listed, energy)
    deliver(as_text(report), Output("figures", output, partial(write_report, report)))


def parse_capacities(text: str) -> list[float]:
    """Capacities of a list like `0.9,0.7`.

    Raises:
        ValueError: something that is not a number from 0.1 to 1.
    """
    try:
        return [check_capacity(float(part)) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--capacities {text}: every one must be a number between {LOWEST} and 1") from error


def perplexity(
    text: TextOption,
    name: ModelArgument = None,
    model: ModelOption = None,
    budgets: Annotated[str, typer.Option(help="Energy budgets; 1.0, the base, is always among them.")] = "1.0,0.8,0.6",
    capacities: Annotated[
        str | None, typer.Option(help="Of a gated controller, to score at instead of budgets, such as 0.9,0.7,0.55,0.4.")
    ] = None,
    length: LengthOption = 512,
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens between windows. Default: no overlap.")] = None,
    limit: LimitOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows that are run together.")] = 4,
    output: FiguresOption = None,
    plot: Annotated[Path | None, typer.Option(help="Draw perplexity against cost: the picture to write.")] = None,
    milliseconds: Annotated[
        bool, typer.Option("--milliseconds", help="Time a token of every row, decoded at batch 1; not over several processes.")
    ] = False,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a round of --milliseconds decodes.")] = 24,
    repeats: Annotated[int, typer.Option(min=1, help="Counted rounds of --milliseconds.")] = 3,
    controller: ControllerOption = None,
    precisions: PrecisionsOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    gguf_file: GgufOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Score a text at several budgets: cost, perplexity, and its ratio to the base's, with standard errors.

    Several processes, started by torchrun or accelerate launch, share the windows.
    """
    from ..data.encoding import start_tokens
    from ..data.text import name_of_text
    from ..data.windows import room_of, windows
    from ..evaluation.decode_time import times_at
    from ..evaluation.processes import joined_processes
    from ..evaluation.report import write_report
    from .comparison import timing_of
    from .perplexity import as_text, budgets_at, draw_plot, measure, parse_budgets, timed
    from .texts import check_text_option, encode_file

    with joined_processes() as processes:
        check_file("--output", output)
        check_picture("--plot", plot)
        listed, shares = parse_budgets(budgets), None if capacities is None else parse_capacities(capacities)
        timing = timing_of(milliseconds and processes.count == 1, new_tokens, repeats, length)
        check_text_option(text, processes)
        place, named = processes.device(device), named_model(name, model)
        with processes.main_first():  # it may have to fetch the model
            loaded, tokenizer = load(named, controller, dtype, place, gguf_file, trust_remote_code, precisions)
        if shares is not None:
            listed = budgets_at(loaded, shares)
        start = start_tokens(tokenizer)
        stride = stride or room_of(length, start)
        chosen = windows(encode_file(tokenizer, text), length, stride, start, limit)
        with progress("scoring windows", len(chosen) * len(listed)) as advance:
            report = measure(loaded, chosen, listed, batch_size, advance, processes)
        if timing is not None:
            with waiting("timing tokens"):
                report = timed(report, times_at(loaded, listed, chosen, timing), timing)
        if processes.is_main:
            report = {"text": name_of_text(text), "length": length, "stride": stride} | report
            figures = Output("figures", output, partial(write_report, report))
            deliver(as_text(report), figures, Output("plot", plot, partial(draw_plot, report)))


def compare(
    text: TextOption,
    name: ModelArgument = None,
    model: ModelOption = None,
    also: Annotated[
        list[str] | None, typer.Option(help="NAME=ARTIFACT: one more artifact over the same base, with a name for its rows.")
    ] = None,
    budgets: Annotated[str, typer.Option(help="Energy budgets below 1.")] = "0.9,0.8,0.6,0.5",
    length: LengthOption = 512,
    limit: LimitOption = None,
    fit: Annotated[Path | None, typer.Option(help="Folder of the `anee fit` of --model: adds the oracle.")] = None,
    milliseconds: Annotated[
        bool, typer.Option("--milliseconds", help="Time a token of every row, decoded at batch 1, and compare at equal time.")
    ] = False,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a round of --milliseconds decodes.")] = 24,
    repeats: Annotated[int, typer.Option(min=1, help="Counted rounds of --milliseconds.")] = 3,
    output: FiguresOption = None,
    controller: ControllerOption = None,
    precisions: PrecisionsOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    gguf_file: GgufOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Score a text under controllers and the controls that they must beat: random skips, static plans, uniform precisions."""
    from ..data.text import name_of_text
    from ..evaluation.comparison import compare, count_scores
    from ..evaluation.decode_time import decode_times, feeds_of
    from ..evaluation.report import write_report
    from ..evaluation.uniform import uniform_precisions
    from .comparison import as_text, describe, load_others, parse_also, parse_lower_budgets, timed, timing_of
    from .texts import check_text_option, full_windows_of

    check_file("--output", output)
    listed, others = parse_lower_budgets(budgets), parse_also(also or [])
    timing = timing_of(milliseconds, new_tokens, repeats, length)
    check_text_option(text)
    named = named_model(name, model)
    first = load(named, controller, dtype, device, gguf_file, trust_remote_code, precisions)
    models, tokenizer = load_others(first, others, dtype, device, trust_remote_code)
    chosen = full_windows_of(tokenizer, text, length, limit)
    oracles = []
    if fit is not None:
        with extra_libraries("train", "--fit"):
            from ..training.oracle import oracle_control
        oracles.append(oracle_control(first[0], fit))
    with waiting("making the base's weights in 8 and in 4 bits"):
        uniform = uniform_precisions(first[0])
    total = count_scores(len(models), len(listed), len(oracles), len(uniform)) * len(chosen)
    with progress("scoring windows", total) as advance:
        rows = compare(models, chosen, listed, oracles, advance, uniform)
    report = {"text": name_of_text(text)} | describe(models, chosen) | {"rows": rows}
    if timing is not None:
        with waiting("timing tokens"):
            times = decode_times(feeds_of(models, listed, uniform, chosen, timing), timing)
        report |= timed(rows, times, models, timing)
    deliver(as_text(report), Output("figures", output, partial(write_report, report)))


def analyze(
    text: Annotated[
        list[Path], typer.Option(help="Text to run: a UTF-8 file, plain or gzip; - is the standard input; repeatable.")
    ],
    name: ModelArgument = None,
    model: ModelOption = None,
    budgets: Annotated[str | None, typer.Option(help="Energy budgets below 1. Default: some that fit the model.")] = None,
    length: LengthOption = 512,
    limit: Annotated[int | None, typer.Option(min=1, help="So many windows of each text, evenly spread. Default: all.")] = None,
    output: FiguresOption = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the tokens' way through the layers: the picture to write.")] = None,
    controller: ControllerOption = None,
    precisions: PrecisionsOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    gguf_file: GgufOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Tell where a model spends its budget: use of every layer, work by class of token, entropy of what is decided."""
    from ..data.text import name_of_text
    from ..evaluation.analysis import analyse
    from ..evaluation.report import write_report
    from ..evaluation.shown import budgets_to_show
    from .analysis import as_text, draw_plot, windows_of
    from .comparison import parse_lower_budgets
    from .texts import check_text_option

    check_file("--output", output)
    check_picture("--plot", plot)
    for one in text:
        check_text_option(one)
    asked = None if budgets is None else parse_lower_budgets(budgets)
    named = named_model(name, model)
    loaded, tokenizer = load(named, controller, dtype, device, gguf_file, trust_remote_code, precisions)
    listed = asked or [budget for budget in budgets_to_show(loaded.config, loaded.dtype) if budget < 1.0]
    chosen = windows_of(tokenizer, text, length, limit)
    with progress("running windows", len(chosen) * len(listed)) as advance:
        report = {"texts": [name_of_text(one) for one in text], **analyse(loaded, tokenizer, chosen, listed, advance)}
    figures = Output("figures", output, partial(write_report, report))
    deliver(as_text(report), figures, Output("plot", plot, partial(draw_plot, report)))


def samples(
    name: ModelArgument = None,
    model: ModelOption = None,
    budgets: Annotated[str, typer.Option(help="Energy budgets; 1.0, the base, is always among them.")] = "1.0,0.8,0.6",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 80,
    output: FiguresOption = None,
    controller: ControllerOption = None,
    precisions: PrecisionsOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    gguf_file: GgufOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Print the greedy answers to ten questions at several budgets, unedited, as Markdown."""
    from ..evaluation.report import write_report
    from ..evaluation.samples import PROMPTS, as_text, sample
    from .perplexity import parse_budgets

    check_file("--output", output)
    listed = parse_budgets(budgets)
    named = named_model(name, model)
    loaded, tokenizer = load(named, controller, dtype, device, gguf_file, trust_remote_code, precisions)
    with progress("answering", len(PROMPTS) * len(listed)) as advance:
        rows = sample(loaded, tokenizer, listed, max_new_tokens, progress=advance)
    report = {"controller": loaded.config.controller, "max_new_tokens": max_new_tokens, "rows": rows}
    deliver(as_text(rows), Output("figures", output, partial(write_report, report)))
