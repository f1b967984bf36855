"""`anee fit`: by a recipe, or for a base with a recipe that is made for it."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from ..data.progress import clock, is_first_process, waiting
from .console import extra_libraries, say


if TYPE_CHECKING:
    from ..training.default_recipe import Estimate, Request


MINUTES = 30.0
RECIPE_ENDINGS = (".yaml", ".yml")


def fit(
    what: Annotated[
        str,
        typer.Argument(
            metavar="BASE_OR_RECIPE",
            help="A base (Hub name, folder or smollm2-135m-instruct), or a recipe (a file that ends in .yaml).",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the run: a new one, or the one of an interrupted run.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of text files. Default: the base samples text for plans; of a recipe: the current folder."),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help=f"Base: how long the fit may take. Default: {MINUTES:g}.")] = None,
    stages: Annotated[str | None, typer.Option(help="Base: stages, as in a,b. Default: all; without --data: plans.")] = None,
    controller: Annotated[str | None, typer.Option(help="Base: routed or gated. Default: routed.")] = None,
    stage: Annotated[str | None, typer.Option(help="Recipe: run only this stage; default: all that are not done.")] = None,
) -> None:
    """Fit an artifact to a base, in a given time or by a recipe; an interrupted run goes on where it was."""
    by_recipe = what.endswith(RECIPE_ENDINGS)
    not_allowed = {"--minutes": minutes, "--stages": stages, "--controller": controller} if by_recipe else {"--stage": stage}
    for option, value in not_allowed.items():
        if value is not None:
            kind, other = ("recipe", "base") if by_recipe else ("base", "recipe")
            raise ValueError(f"{option} {value} is not allowed with the {kind} {what}: it is for a {other}")
    with extra_libraries("train", "anee fit"):
        from ..training.default_recipe import Request
        from ..training.fit import fit as fit_recipe
        from ..training.recipe import read_recipe
        from ..training.state import RECIPE
    logging.disable_progress_bar()
    if by_recipe:
        artifact = fit_recipe(read_recipe(Path(what)), output, data or Path(), stage)
    else:
        names = None if stages is None else tuple(name.strip() for name in stages.split(",") if name.strip())
        request = Request(what, data, MINUTES if minutes is None else minutes, names, controller or "routed")
        estimates = prepare(request, output)
        recipe = read_recipe(output / RECIPE)
        artifact = fit_recipe(recipe, output, data or Path(), before_stage=time_left(estimates))
    if is_first_process():
        say(f"artifact: {artifact}")


def prepare(request: "Request", folder: Path) -> "Sequence[Estimate]":
    """See that a folder has the recipe of a request; returns what its stages should take if it was made now.

    Of several processes the first makes it, while the others wait.

    Raises:
        OSError, ValueError: as `is_there` and `make_recipe`.
    """
    from ..training.default_recipe import device_here, make_recipe
    from ..training.lock import only_run_in
    from ..training.recipe_file import is_there, measured, write_recipe
    from ..training.run import make_accelerator

    # First, since it lets processes find each other.
    several = make_accelerator(device_here()) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    estimates: Sequence[Estimate] = ()
    if is_first_process():
        if is_there(request, folder):
            tell(f"going on with {folder / 'recipe.yaml'}")
        else:
            with only_run_in(folder):
                with waiting("looking at the text and measuring the base"):
                    made = make_recipe(request)
                estimates = made.estimates
                tell(f"recipe: {write_recipe(request, made, folder)}. {measured(made)}")
                show(estimates)
    if several is not None:
        several.wait_for_everyone()
    return estimates


def show(estimates: "Sequence[Estimate]") -> None:
    """Print a table of what is about to be done, on stderr."""
    table = Table("stage", "amount", "about")
    for one in estimates:
        table.add_row(one.stage, f"{one.count} {one.unit}", clock(one.seconds))
    table.add_section()
    table.add_row("all", "", clock(sum(one.seconds for one in estimates)))
    with contextlib.suppress(OSError):  # nobody reads it any more
        Console(stderr=True).print(table)


def time_left(estimates: "Sequence[Estimate]") -> Callable[[str], None]:
    """What says before each stage how much time it and those that follow should take; nothing where that is not known."""

    def before_stage(name: str) -> None:
        places = [place for place, one in enumerate(estimates) if one.stage == name]
        if places:
            left = sum(one.seconds for one in estimates[places[0] :])
            tell(f"{name}: about {clock(estimates[places[0]].seconds)}; with all that follows about {clock(left)} to go")

    return before_stage


def tell(line: str) -> None:
    """Print a line on stderr, in the first of several processes."""
    if is_first_process():
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)
