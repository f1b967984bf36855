"""Verbs that generate text: `anee generate` and `anee demo`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from transformers import set_seed

from .console import check_folder, plain_errors
from .model import encode, load, named_model, run
from .options import ControllerOption, DtypeOption, ModelArgument, ModelOption, TrustOption


def generate(
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    name: ModelArgument = None,
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
        check_folder("--heatmap", heatmap)
        loaded, tokenizer = load(named_model(name, model), controller, dtype=dtype, trust_remote_code=trust_remote_code)
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


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the heatmap.")] = Path("anee_demo"),
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "Explain in a few sentences why the sky is blue.",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at each budget.")] = 60,
) -> None:
    """Generate with a small real model at budgets 1.0, 0.8 and 0.6, and draw what was run."""
    from ..evaluation.heatmap import draw_heatmap

    with plain_errors():
        model, tokenizer = load(None, None)
        print(f"controller: {model.config.controller}")
        inputs = encode(tokenizer, prompt, chat=True)
        output.mkdir(parents=True, exist_ok=True)
        for budget in (1.0, 0.8, 0.6):
            done = run(model, tokenizer, inputs, max_new_tokens, energy_budget=budget)
            print(f"\n--- energy_budget {budget}: {done.speed:.1f} tokens/s, {done.trace.summary()}\n{done.text.strip()}")
        path = output / "heatmap.png"
        draw_heatmap(done.trace, path, done.tokens, prompt_length=done.prompt_length)
        print(f"\nexecution at energy_budget {budget}:\n{done.trace.render()}\n\nheatmap: {path}")
