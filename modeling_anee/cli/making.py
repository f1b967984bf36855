"""Verbs that make something of an artifact: `anee card` and `anee export`."""

from pathlib import Path
from typing import Annotated

import typer

from ..data.smollm2 import shipped_artifact
from .console import extra_libraries, say
from .model import named_model


def card(
    artifact: Annotated[Path, typer.Argument(help="Folder of the artifact, which gets a README.md.")],
    recipe: Annotated[list[Path], typer.Option(help="Recipe (YAML) that it was fitted by; repeatable, in their order.")],
    figures: Annotated[Path | None, typer.Option(help="Figures that `anee compare` wrote.")] = None,
    budget_figures: Annotated[
        list[Path] | None,
        typer.Option(help="Figures that `anee perplexity` wrote, of a text not used for the fit; repeatable."),
    ] = None,
    samples: Annotated[Path | None, typer.Option(help="Answers that `anee samples` wrote.")] = None,
    curve: Annotated[
        Path | None, typer.Option(help="Picture (PNG) of perplexity against cost, copied beside the card.")
    ] = None,
    heatmap: Annotated[
        Path | None, typer.Option(help="Picture (PNG) that `anee generate --heatmap` drew, copied beside the card.")
    ] = None,
    repository: Annotated[str | None, typer.Option(help="Name on the Hub, for the code on the card.")] = None,
    language: Annotated[str, typer.Option(help="Language of the text that it was fitted on.")] = "English",
    license: Annotated[str, typer.Option(help="License of what is in the artifact.")] = "apache-2.0",
    base_license: Annotated[str | None, typer.Option(help="License of the base. Default: see its own page.")] = None,
) -> None:
    """Write the model card of an artifact from its configuration, its recipe and what was measured."""
    with extra_libraries("train", "anee card"):
        from ..publishing.card import write_card
        from ..publishing.card_figures import Measured
        from ..publishing.card_metadata import About
    measured = Measured.read(figures, budget_figures or [], samples)
    about = About(repository, language, license, base_license, curve, heatmap)
    say(f"card: {write_card(artifact, recipe, measured, about)}")


def export(
    places: Annotated[
        list[str], typer.Argument(metavar="[MODEL] FOLDER", help="The same as --model; and the folder to write, new or empty.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Artifact: a folder or a Hub name. Default: the one that comes with a checkout."),
    ] = None,
    code: Annotated[
        bool, typer.Option("--code/--without-code", help="Without: as a checkout keeps it, which needs the package.")
    ] = True,
) -> None:
    """Write an artifact as a folder that needs no installed package: config, weights, code, tokenizer, card and pictures."""
    from ..publishing.export import export as write_folder
    from ..publishing.export import find_artifact

    *first, folder = places
    if len(first) > 1:
        raise ValueError(f"{' '.join(places)}: give at most MODEL and FOLDER")
    name = named_model(first[0] if first else None, model) or shipped_artifact()
    if name is None:
        raise ValueError("there is no artifact here: name one, as in anee export MODEL FOLDER")
    write_folder(find_artifact(str(name)), Path(folder), code)
    say(f"artifact: {folder}")
