"""The `anee` command: its verbs. What they take and print is in files by what they do: `generating`, `measuring`, ..."""

import platform
from typing import Annotated

import torch
import transformers
import typer

from ..version import __version__
from .classifying import evaluate_classifier, fit_classifier
from .console import say
from .deadlines import deadline
from .drafting import drafts
from .fitting import fit
from .generating import demo, generate
from .guard import guarded, one_line_errors
from .making import card, export
from .measuring import analyze, bench, compare, perplexity, samples
from .picturing import curve, depth
from .pool import pool
from .profiling import plan, profile
from .simulating import simulate


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool) -> None:
    """Print the version of the package and of what it runs on, and end."""
    if wanted:
        libraries = f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
        with one_line_errors(debug=False):
            say(f"anee {__version__} ({libraries})")
        raise typer.Exit()


@app.callback()
def anee(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show versions.")] = False,
) -> None:
    """A compute dial for pretrained causal LMs: generate under an energy budget, and see what was run."""


VERBS = analyze, bench, card, compare, curve, deadline, demo, depth, drafts, evaluate_classifier, export, fit
for verb in (*VERBS, fit_classifier, generate, perplexity, plan, profile, samples, simulate):
    app.command()(guarded(verb))
app.add_typer(pool, name="pool")


if __name__ == "__main__":
    app()
