"""The stages of a fit in their order, and the artifact at its end."""

import contextlib
import importlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..data.files import whole_folder, write_file
from .checkpoint import in_half
from .lock import only_run_in
from .recipe import STAGE_NAMES, Recipe
from .run import Run, make_accelerator


def _run_module(name: str, run: Run) -> dict[str, Any]:
    return importlib.import_module(f".stages.{name}", __package__).run_stage(run)


# What runs a stage: it returns the fields of `AneeConfig` that it sets. Each is in a module of its own.
STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {name: partial(_run_module, name) for name in STAGE_NAMES}


def fit(
    recipe: Recipe,
    folder: Path,
    data_dir: Path,
    only: str | None = None,
    before_stage: Callable[[str], None] = lambda name: None,
) -> Path:
    """Run the recipe's stages that are not done yet, and export what came out.

    Args:
        recipe: what to fit to which base.
        folder: the run's folder; new, or of an interrupted run, which goes on. No other may be at work there.
        data_dir: folder of the recipe's text files.
        only: run just this stage; those before it must be done.
        before_stage: told the name of each stage that is about to run.

    Returns:
        The folder of the artifact, which is always whole: it is replaced at the end.

    Raises:
        ValueError: a stage that the recipe does not have or whose turn it is not; and what `Run.open` raises.
    """
    if only is not None and only not in recipe.planned:
        allowed = ", ".join(recipe.planned) or "none"
        raise ValueError(f"stage={only!r} is not allowed: the stages of this recipe are: {allowed}")
    with only_run_in(folder) if make_accelerator(recipe.device).is_main_process else contextlib.nullcontext():
        run = Run.open(recipe, folder, data_dir)
        for name in _to_run(recipe, run.done, only):
            before_stage(name)
            run.begin(name)
            run.finish(name, STAGES[name](run))
        return export(run)


def _to_run(recipe: Recipe, done: list[str], only: str | None) -> list[str]:
    missing = [name for name in recipe.planned if name not in done]
    if only is None:
        return missing
    before = [name for name in missing if STAGE_NAMES.index(name) < STAGE_NAMES.index(only)]
    if before:
        raise ValueError(f"stage={only!r} is not allowed yet: run first: {', '.join(before)}")
    return [only] if only in missing else []


def export(run: Run) -> Path:
    """Write the artifact of what is trained so far into the run's folder, as small as it can be.

    Raises:
        ValueError: a weight is too large for half precision.
    """
    artifact = run.folder / "artifact"
    if run.accelerator.is_main_process:
        with whole_folder(artifact) as part:
            run.model.save_pretrained(part, tokenizer=run.tokenizer, state_dict=in_half(run.own()))
            compact(part / "tokenizer.json")
    run.accelerator.wait_for_everyone()
    return artifact


def compact(file: Path) -> None:
    """Rewrite a JSON file without spaces and escapes; nothing is done where there is none."""
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        write_file(file, json.dumps(content, ensure_ascii=False, separators=(",", ":")))
