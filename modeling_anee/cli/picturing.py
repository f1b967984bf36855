"""Verbs that draw: `anee curve` from figures of other verbs, and `anee depth` along a text."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..checks import check_budget
from ..data.progress import waiting
from .console import check_picture, say
from .model import load, named_model
from .options import ControllerOption, DtypeOption, GgufOption, ModelArgument, ModelOption, TextOption, TrustOption


def curve(
    figures: Annotated[
        list[Path] | None,
        typer.Option(help="Figures that `anee compare` or `anee perplexity` wrote, all of the same windows; repeatable."),
    ] = None,
    bench: Annotated[Path | None, typer.Option(help="Figures that `anee bench` wrote.")] = None,
    highlight: Annotated[
        list[str] | None, typer.Option(help="Name of a control to draw as strongly as the controllers; repeatable.")
    ] = None,
    output: Annotated[Path, typer.Option(help="PNG to write.")] = Path("anee_curve.png"),
) -> None:
    """Draw the budget curve: perplexity ratio and speed against realised cost, with the controls."""
    check_picture("--output", output)
    from ..evaluation.budget_curve import draw_budget_curve, read_quality, read_speed

    if not figures and bench is None:
        raise ValueError("nothing to draw: give --figures, --bench or both")
    draw_budget_curve(read_quality(figures or [], highlight or []), output, [] if bench is None else read_speed(bench))
    say(f"curve: {output}")


def depth(
    text: TextOption,
    name: ModelArgument = None,
    model: ModelOption = None,
    energy_budget: Annotated[float | None, typer.Option(help="Share of the decoder stack's work to spend, 0 to 1.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Take at most so many tokens of the text.")] = 192,
    output: Annotated[Path, typer.Option(help="PNG to write.")] = Path("anee_depth.png"),
    controller: ControllerOption = None,
    dtype: DtypeOption = "float32",
    gguf_file: GgufOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Draw how many layers run for each token along a text, and what it costs."""
    check_picture("--output", output)
    from ..evaluation.depth import draw_depth
    from ..evaluation.perplexity import encode_text, read_text
    from ..evaluation.tokens import token_texts

    if energy_budget is not None:
        check_budget(energy_budget)
    named, passage = named_model(name, model), read_text(text)
    loaded, tokenizer = load(named, controller, dtype, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    ids = encode_text(tokenizer, passage)[:tokens]
    with waiting("scoring the text"), torch.no_grad():
        trace = loaded(ids.unsqueeze(0), energy_budget=energy_budget, use_cache=False, logits_to_keep=1).execution
    draw_depth(trace, output, token_texts(tokenizer, ids.tolist()))
    say(f"{trace.summary()}\ndepth: {output}")
