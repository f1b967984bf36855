"""Options that several verbs have."""

from pathlib import Path
from typing import Annotated

import typer

from ..controller_kinds import CONTROLLER_CLASSES


ModelArgument = Annotated[str | None, typer.Argument(metavar="[MODEL]", help="The same as --model.", show_default=False)]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Artifact or base: a folder or a Hub name. Default: the artifact over SmolLM2-135M-Instruct that comes with a "
        "checkout; where there is none, or with --controller, that base.",
    ),
]
ControllerOption = Annotated[
    str | None, typer.Option(help=f"For a base without artifact: {', '.join(CONTROLLER_CLASSES)}. Default: plan.")
]
PrecisionsOption = Annotated[
    str | None,
    typer.Option(help="For a base without artifact: what it is run in as the budget falls, dearest first, such as int8,int4."),
]
DeviceOption = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps, ...")]
DtypeOption = Annotated[str, typer.Option(help="Dtype of the base: float32, bfloat16, float16 or auto.")]
GgufOption = Annotated[str | None, typer.Option(help="GGUF file in the folder or repository of --model.")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Allow code that comes with --model.")]
TextOption = Annotated[Path, typer.Option(help="Text to score: a UTF-8 file, plain or gzip; - is the standard input.")]
LengthOption = Annotated[int, typer.Option(min=2, help="Tokens of a window.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Score so many windows, evenly spread. Default: all.")]
FiguresOption = Annotated[Path | None, typer.Option("--output", help="Write the figures to this JSON file.")]
EnergyOption = Annotated[
    str | None,
    typer.Option(
        "--energy-of",
        help="Where no counter tells joules, model them as those of this machine: a name or a file, as of `anee simulate`.",
    ),
]
