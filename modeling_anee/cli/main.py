"""The `anee` command: what each verb is called, takes and prints; the work is done elsewhere."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoConfig, AutoTokenizer, set_seed
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from ..configuration_anee import CONTROLLERS
from ..modeling_anee import AneeForCausalLM
from ..trace import ExecutionTrace
from .smollm2 import BASE_FIELDS, smollm2_folder


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A compute dial for pretrained causal LMs: generate under an energy budget, and see what was run.",
)
progress_console = Console(stderr=True)
EXPECTED_ERRORS = (OSError, ValueError, NotImplementedError, ImportError)

ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Artifact or base: a folder or a Hub name. Default: the demo's SmolLM2-135M-Instruct."),
]
ControllerOption = Annotated[
    str | None, typer.Option(help=f"For a base without artifact: {', '.join(CONTROLLERS)}. Default: plan.")
]
DeviceOption = Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")]
DtypeOption = Annotated[str, typer.Option(help="Dtype of the base: float32, bfloat16, float16 or auto.")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Allow code that comes with --model.")]


@app.command()
def bench(
    model: ModelOption = None,
    output: Annotated[Path, typer.Option(help="JSON file for the figures.")] = Path("anee_bench.json"),
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that each run decodes.")] = 48,
    repeats: Annotated[int, typer.Option(min=1, help="Counted runs of each case.")] = 5,
    batch: Annotated[int, typer.Option(min=1, max=8, help="Rows of the batched decoding.")] = 8,
    prefill: Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")] = 512,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
) -> None:
    """Compare wall-clock with plain transformers: one process, runs interleaved, medians."""
    from ..evaluation.benchmark import as_text, benchmark

    with plain_errors():
        check_folder("--output", output)
        loaded, tokenizer = load(model, None if model else "plan", dtype=dtype)
        loaded.to(device)
        with progress_console.status("measuring"):
            report = benchmark(loaded, tokenizer, new_tokens, repeats, batch, prefill)
        print(as_text(report))
        output.write_text(json.dumps(report, indent=2) + "\n")
        print(f"\nfigures: {output}")


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn expected errors into one message on stderr and exit code 1."""
    try:
        yield
    except EXPECTED_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the heatmap.")] = Path("anee_demo"),
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "Explain in a few sentences why the sky is blue.",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at each budget.")] = 60,
) -> None:
    """Generate with a small real model at budgets 1.0, 0.8 and 0.6, and draw what was run."""
    from ..evaluation.heatmap import draw_heatmap

    with plain_errors():
        model, tokenizer = load(None, "plan")
        print(f"controller: {model.config.controller} (no artifact is trained yet, so layers are skipped without a stand-in)")
        inputs = encode(tokenizer, prompt, chat=True)
        output.mkdir(parents=True, exist_ok=True)
        for budget in (1.0, 0.8, 0.6):
            done = run(model, tokenizer, inputs, max_new_tokens, energy_budget=budget)
            print(f"\n--- energy_budget {budget}: {done.speed:.1f} tokens/s, {done.trace.summary()}\n{done.text.strip()}")
        path = output / "heatmap.png"
        draw_heatmap(done.trace, path, done.tokens, prompt_length=done.prompt_length)
        print(f"\nexecution at energy_budget {budget}:\n{done.trace.render()}\n\nheatmap: {path}")


@app.command()
def fit(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML) of what to fit to which base.")],
    output: Annotated[Path, typer.Option(help="Folder of the run: a new one, or the one of an interrupted run.")],
    data: Annotated[Path, typer.Option(help="Folder of the recipe's text files.")] = Path(),
    stage: Annotated[str | None, typer.Option(help="Run only this stage; default: all that are not done.")] = None,
) -> None:
    """Fit an artifact to a base by a recipe; an interrupted run goes on where it was."""
    with plain_errors():
        try:
            from ..training.fit import fit as fit_recipe
            from ..training.recipe import read_recipe
        except ModuleNotFoundError as error:
            raise ImportError(f"anee fit needs {error.name}: pip install 'modeling-anee[train]'") from error
        logging.disable_progress_bar()
        print(f"artifact: {fit_recipe(read_recipe(recipe), output, data, stage)}")


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    model: ModelOption = None,
    energy_budget: Annotated[float | None, typer.Option(help="Share of the decoder stack's work to spend, 0 to 1.")] = None,
    prompt_energy_budget: Annotated[float | None, typer.Option(help="The same for the prompt. Default: the same.")] = None,
    controller: ControllerOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 100,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the tokenizer's chat template.")] = False,
    sample: Annotated[bool, typer.Option(help="Sample instead of taking the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(help="Seed for --sample.")] = 0,
    dtype: DtypeOption = "auto",
    stats: Annotated[bool, typer.Option("--stats", help="Print speed, cost and floor; draw the execution as text.")] = False,
    heatmap: Annotated[Path | None, typer.Option(help="Write the execution heatmap to this PNG.")] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Generate text under an energy budget."""
    with plain_errors():
        if heatmap is not None:
            check_folder("--heatmap", heatmap)
        loaded, tokenizer = load(model, controller, dtype=dtype, trust_remote_code=trust_remote_code)
        inputs = encode(tokenizer, prompt, chat)
        set_seed(seed)
        budgets = {"energy_budget": energy_budget, "prompt_energy_budget": prompt_energy_budget}
        done = run(loaded, tokenizer, inputs, max_new_tokens, do_sample=sample, **budgets)
        print(done.text)
        if stats:
            print(f"\n{done.speed:.1f} tokens/s, {done.trace.summary()}\n{done.trace.render()}", file=sys.stderr)
        if heatmap is not None:
            from ..evaluation.heatmap import draw_heatmap

            draw_heatmap(done.trace, heatmap, done.tokens, prompt_length=done.prompt_length)


@app.command()
def perplexity(
    text: Annotated[Path, typer.Option(help="UTF-8 text file to score.")],
    model: ModelOption = None,
    budgets: Annotated[str, typer.Option(help="Energy budgets; 1.0, the base, is always among them.")] = "1.0,0.8,0.6",
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens between windows. Default: no overlap.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score so many windows, evenly spread. Default: all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows that are run together.")] = 4,
    output: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
    controller: ControllerOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    trust_remote_code: TrustOption = False,
) -> None:
    """Score a text at several budgets: cost, perplexity, and its ratio to the base's, with standard errors."""
    from ..evaluation.perplexity import encode_text, read_text, spread, windows
    from .perplexity import as_text, measure, parse_budgets, write_report

    with plain_errors():
        if output is not None:
            check_folder("--output", output)
        listed, passage = parse_budgets(budgets), read_text(text)
        loaded, tokenizer = load(model, controller, dtype=dtype, trust_remote_code=trust_remote_code)
        loaded.to(device)
        chosen = spread(windows(encode_text(tokenizer, passage), length, stride), limit)
        with progress_bar("scoring windows", len(chosen) * len(listed)) as advance:
            report = measure(loaded, chosen, listed, batch_size, advance)
        report = {"text": text.name, "length": length, "stride": stride or length} | report
        print(as_text(report))
        if output is not None:
            write_report(report, output)
            print(f"\nfigures: {output}")


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, and the function that moves it on."""
    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=progress_console, transient=True) as progress:
        yield partial(progress.advance, progress.add_task(title, total=total))


def check_folder(option: str, file: Path) -> None:
    """Notice a file that can't be written before the work for it is done.

    Raises:
        OSError: its folder does not exist.
    """
    if not file.parent.is_dir():
        raise OSError(f"{option} {file}: the folder {file.parent} does not exist")


def load(name: str | None, controller: str | None, dtype: str = "auto", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """An artifact, or a base with an untrained controller; and its tokenizer."""
    logging.disable_progress_bar()
    with progress_console.status("loading the model"):
        folder = str(smollm2_folder()) if name is None else name
        fields: dict[str, Any] = BASE_FIELDS if name is None else {}
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if config.model_type == "anee":
            if controller is not None:
                raise ValueError(f"--controller {controller}: {folder} is an artifact and has its own controller")
            return AneeForCausalLM.from_pretrained(folder, dtype=dtype).eval(), tokenizer
        model = AneeForCausalLM.from_base(
            folder, controller=controller or "plan", dtype=dtype, trust_remote_code=trust_remote_code, **fields
        )
        return model, tokenizer


def encode(tokenizer: Any, prompt: str, chat: bool) -> dict[str, torch.Tensor]:
    """Token ids and mask of a prompt, in the chat template if asked for."""
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")


@dataclass(frozen=True)
class Generated:
    """One generation: the new text, every token as text, what was run, and new tokens per second."""

    text: str
    tokens: list[str]
    prompt_length: int
    trace: ExecutionTrace
    speed: float


def run(
    model: AneeForCausalLM, tokenizer: Any, inputs: dict[str, torch.Tensor], max_new_tokens: int, **kwargs: Any
) -> Generated:
    """Generate with a progress bar."""
    kwargs = {"do_sample": False} | {name: value for name, value in kwargs.items() if value is not None}
    with progress_bar("generating", max_new_tokens) as advance:
        streamer, begin = TokenCounter(advance), time.perf_counter()
        output: Any = model.generate(
            **inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, streamer=streamer, **kwargs
        )
        seconds = time.perf_counter() - begin
    ids, prompt_length = output.sequences[0], inputs["input_ids"].shape[1]
    text = tokenizer.decode(ids[prompt_length:], skip_special_tokens=True)
    tokens = [tokenizer.decode([token]) for token in ids.tolist()]
    return Generated(text, tokens, prompt_length, output.execution, (len(ids) - prompt_length) / seconds)


class TokenCounter(BaseStreamer):
    """Tells a function how many tokens have just been generated."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Count new tokens; the first call has the prompt."""
        if self._seen_prompt:
            self._advance(value.numel())
        self._seen_prompt = True

    def end(self) -> None:
        """Nothing to flush."""


if __name__ == "__main__":
    app()
