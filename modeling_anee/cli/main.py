"""The `anee` command: its verbs. What each takes and prints is in `generating`, `measuring`, `picturing` and `making`."""

import typer

from .generating import demo, generate
from .making import card, fit
from .measuring import bench, compare, perplexity, samples
from .picturing import curve, depth


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A compute dial for pretrained causal LMs: generate under an energy budget, and see what was run.",
)
for verb in (bench, card, compare, curve, demo, depth, fit, generate, perplexity, samples):
    app.command()(verb)


if __name__ == "__main__":
    app()
