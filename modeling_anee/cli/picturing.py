"""Verbs that draw: `anee curve` from figures of other verbs, and `anee depth` along a text."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..checks import check_budget
from ..data.progress import waiting
from .console import check_picture, say
from .model import load, named_model
from .options import (
    ControllerOption,
    DtypeOption,
    GgufOption,
    ModelArgument,
    ModelOption,
    PrecisionsOption,
    TextOption,
    TrustOption,
)


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
    from ..pictures.budget_curve import draw_budget_curve, read_quality, read_speed

    if not figures and bench is None:
        raise ValueError("nothing to draw: give --figures, --bench or both")
    draw_budget_curve(read_quality(figures or [], highlight or []), output, [] if bench is None else read_speed(bench))
    say(f"curve: {output}")


def depth(
    text: TextOption,
    name: ModelArgument = None,
    model: ModelOption = None,
    energy_budget: Annotated[float | None, typer.Option(help="Share of the whole model's work to spend, 0 to 1.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Take the first so many tokens of the text.")] = 192,
    output: Annotated[Path, typer.Option(help="PNG to write.")] = Path("anee_depth.png"),
    controller: ControllerOption = None,
    precisions: PrecisionsOption = None,
    dtype: DtypeOption = "float32",
    gguf_file: GgufOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Draw how many layers run for each token along a text, and what it costs."""
    check_picture("--output", output)
    from ..data.encoding import start_tokens
    from ..evaluation.tokens import token_texts
    from ..pictures.depth import draw_depth
    from .texts import check_text_option, encode_file

    if energy_budget is not None:
        check_budget(energy_budget)
    named = named_model(name, model)
    check_text_option(text)
    loaded, tokenizer = load(
        named, controller, dtype, gguf_file=gguf_file, trust_remote_code=trust_remote_code, precisions=precisions
    )
    ids = torch.tensor([start_tokens(tokenizer) + encode_file(tokenizer, text, tokens).tolist()])[:, :tokens]
    with waiting("scoring the text"), torch.no_grad():
        scored = loaded(ids, energy_budget=energy_budget, use_cache=False, logits_to_keep=1)
    if not scored.logits.isfinite().all():
        budget = loaded.config.energy_budget if energy_budget is None else energy_budget
        raise ValueError(f"the text at budget {budget:g}: the logits are not finite; are the weights and --dtype right?")
    draw_depth(scored.execution, output, token_texts(tokenizer, ids[0].tolist()))
    say(f"{scored.execution.summary()}\ndepth: {output}")
