"""The verb `anee drafts`: how many tokens of cheap plans the full model keeps, measured, and kept in an artifact."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from transformers.utils import CONFIG_NAME

from ..data.files import check_target, write_file
from ..data.progress import progress
from .console import Output, check_file, deliver
from .lossless import drafts_as_text
from .model import is_artifact, load, named_model
from .options import DtypeOption, FiguresOption, ModelArgument, ModelOption, PrecisionsOption, TextOption, TrustOption


def drafts(
    text: TextOption,
    name: ModelArgument = None,
    model: ModelOption = None,
    plan: Annotated[
        list[str] | None,
        typer.Option(help="A plan such as '30*INT8 / int8'; repeatable. Default: all layers in each precision."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts, evenly spread over the text.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a prompt.")] = 48,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens after each prompt.")] = 64,
    save: Annotated[bool, typer.Option("--save", help="Write what was measured into the artifact's configuration.")] = False,
    output: FiguresOption = None,
    precisions: PrecisionsOption = None,
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure how many drafted tokens of each plan a lossless generation keeps, for its choice of a plan."""
    from ..draft_plans import draft_texts
    from ..evaluation.draft_calibration import measure_drafts
    from ..evaluation.report import write_report
    from ..lossless_choice import prepared
    from .texts import check_text_option, full_windows_of

    check_file("--output", output)
    check_text_option(text)
    named = named_model(name, model)
    target = saved_to(named) if save else None
    loaded, tokenizer = load(named, None, dtype, trust_remote_code=trust_remote_code, precisions=precisions)
    texts = plan or draft_texts(loaded.config.precisions, loaded.config.num_layers)
    chosen = [window.ids for window in full_windows_of(tokenizer, text, length, prompts)]
    with progress("drafting", len(texts) * len(chosen)) as advance:
        found = measure_drafts(loaded, chosen, texts, new_tokens, advance)
    costs = [one.weights_read for one in prepared(loaded, texts)]
    saving = Output("saved in", target, partial(save_drafts, found))
    deliver(drafts_as_text(found, costs), Output("figures", output, partial(write_report, found)), saving)


def saved_to(named: str | None) -> Path:
    """The configuration of an artifact's folder.

    Raises:
        ValueError: no folder of an artifact was named.
        OSError: it can't be written.
    """
    if named is None or not Path(named).is_dir() or not is_artifact(named, may_be_gguf=False):
        raise ValueError("--save needs the folder of an artifact: name it with --model")
    check_target(Path(named) / CONFIG_NAME)
    return Path(named) / CONFIG_NAME


def save_drafts(found: dict[str, list], file: Path) -> None:
    """Write what was measured into a configuration, in its order of fields."""
    fields = json.loads(file.read_text(encoding="utf-8")) | {"drafts": found}
    write_file(file, json.dumps(fields, indent=2, sort_keys=True) + "\n")
