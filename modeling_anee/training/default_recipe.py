"""A recipe for a user's own base and text, fitted to a time on this machine."""

import math
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..configuration_anee import AneeConfig
from ..data.bases import DEMO_BASE, Base, config_of, load_base_of
from ..data.documents import check_end
from ..data.encoding import start_tokens
from ..data.own_text import PARTS, OwnText
from ..data.sources import FileSource
from .allotment import DoesNotFit, Effort, allot, least_seconds
from .default_stages import BATCH_WINDOWS, BRIDGED, DEFAULT_STAGES, EPOCHS, Shape, anee_fields, chosen_stages
from .recipe import Recipe
from .run import wrap
from .speed import Speed, measure_speed


LONGEST, SHORTEST = 512, 64  # tokens of a window
LEAST_TEXT = 8  # windows that a stage of steps needs
DTYPES = ("float32", "bfloat16", "float16")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    Args:
        base: Hub name or folder of the base, or the demo's.
        data: folder of text files.
        minutes: that the fit should take.
        stages: names of stages of the default recipe; None for all.

    Raises:
        ValueError: a base that can be none, minutes that are no time, or stages that are not allowed.
    """

    base: str
    data: Path
    minutes: float
    stages: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        if not (self.minutes > 0 and math.isfinite(self.minutes)):
            raise ValueError(f"--minutes {self.minutes:g} is not allowed: it must be above 0")
        chosen_stages(self.stages)
        known = self.base == DEMO_BASE or os.path.isdir(self.base)
        if not known and (os.path.exists(self.base) or not HUB_NAME.fullmatch(self.base)):
            raise ValueError(
                f"BASE_OR_RECIPE {self.base} is not allowed: it must be a recipe (a file that ends in .yaml or .yml) or a base "
                f"({DEMO_BASE}, a folder that is there, or a Hub name)"
            )

    @property
    def command(self) -> str:
        """The command that asks for this, without its output: the same for the same request."""
        words = ["anee", "fit", self.base, "--data", str(self.data), "--minutes", f"{self.minutes:g}"]
        return shlex.join([*words, "--stages", ",".join(self.stages)] if self.stages is not None else words)


@dataclass(frozen=True)
class Estimate:
    """How much of a stage there will be (`"windows"` or `"steps"`), and how many seconds it should take."""

    stage: str
    count: int
    unit: str
    seconds: float


@dataclass(frozen=True)
class Made:
    """A recipe and what it follows from.

    Args:
        recipe: whose paths are absolute, or relative to the data folder.
        estimates: in the order of the stages.
        speed: that they follow from.
        shape: of the base.
        start: what begins every window, as text.
    """

    recipe: dict[str, Any]
    estimates: list[Estimate]
    speed: Speed
    shape: Shape
    start: str


def make_recipe(request: Request) -> Made:
    """Load and measure a base, look at the text, and count windows and steps.

    Raises:
        OSError: the base can't be found or read.
        ValueError: a base or text that can't be used, or too little text or time, with how much is needed.
    """
    text = OwnText.of(request.data)
    base = base_section(request.base)
    loaded, tokenizer, fields = load_base_of(base)
    check_end(tokenizer)
    loaded = loaded.to(device_here())
    shape = shape_of(loaded.config.get_text_config(), head=0.0)
    # Bridges of every kind, whatever the stages: the speed is measured with them.
    model = wrap(loaded, fields | anee_fields(BRIDGED, shape), 0)
    shape = shape_of(loaded.config.get_text_config(), model.costs.head)
    failure: DoesNotFit | None = None
    for length in lengths(shape.context):
        try:
            return _fitted(request, base, text, tokenizer, shape, measure_speed(model, length))
        except DoesNotFit as error:  # shorter windows need less of both
            failure = error
    assert failure is not None
    raise failure


def device_here() -> str:
    """Where a fit runs on this machine."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def base_section(name: str) -> Base:
    """A base in its own dtype.

    Raises:
        ValueError: it is an artifact.
    """
    place = os.path.abspath(name) if name != DEMO_BASE and os.path.isdir(name) else name
    config = config_of(Base(name=place))
    if config.model_type == AneeConfig.model_type:
        raise ValueError(f"BASE_OR_RECIPE {name} is an artifact: name its base; a recipe's `start` goes on with an artifact")
    dtype = str(config.dtype or config.get_text_config().dtype).removeprefix("torch.")
    return Base(name=place, dtype=dtype if dtype in DTYPES else DTYPES[0])  # type: ignore[arg-type]


def shape_of(config: Any, head: float) -> Shape:
    """What a default recipe follows from, of a base's configuration.

    Raises:
        ValueError: it has too few layers to leave any out.
    """
    layers, context = config.num_hidden_layers, getattr(config, "max_position_embeddings", None)
    if layers < 3:
        raise ValueError(f"the base has {layers} layers: at least 3 are needed, since the first and the last are always run")
    return Shape(layers, config.hidden_size, context, head)


def lengths(context: int | None) -> list[int]:
    """Tokens of a window, the best first: `LONGEST` or what the base takes, then halves of it."""
    longest = min(LONGEST, context or LONGEST)
    return [longest, *(length for length in (longest // 2, longest // 4, longest // 8) if length >= SHORTEST)]


def _fitted(request: Request, base: Base, text: OwnText, tokenizer: Any, shape: Shape, speed: Speed) -> Made:
    stages, seconds = chosen_stages(request.stages), 60 * request.minutes
    needed = {part: count for part in PARTS if (count := needed_windows(part, stages, shape, speed))}
    # More than the base could run in the whole time are of no use.
    most = {part: max(count, math.ceil(seconds / speed.forward)) for part, count in needed.items()}
    found = {part: text.windows(part, tokenizer, speed.length, most[part]) for part in needed}
    for part, count in needed.items():
        check_text(request, part, sum(found[part]) * speed.length, count * speed.length)
    efforts = {name: _effort(name, shape, speed, sum(found[DEFAULT_STAGES[name].text])) for name in stages}
    if (least := least_seconds(efforts)) > seconds:
        raise DoesNotFit(
            f"--minutes {request.minutes:g} is not allowed: {', '.join(stages)} of {request.base} need at least "
            f"{math.ceil(least / 6) / 10:g} on this machine"
        )
    counts = allot(efforts, seconds)
    sources = {part: text.sources(part, tokenizer, speed.length, found[part], _wanted(part, counts)) for part in needed}
    recipe = recipe_fields(base, speed.length, sources, shape, counts)
    estimates = [Estimate(name, count, _unit(name), efforts[name].seconds(count)) for name, count in counts.items()]
    return Made(recipe, estimates, speed, shape, tokenizer.decode(start_tokens(tokenizer)))


def recipe_fields(
    base: Base, length: int, sources: dict[str, list[FileSource]], shape: Shape, counts: dict[str, int]
) -> dict[str, Any]:
    """The fields of a recipe, checked.

    Args:
        base: its section.
        length: tokens of a window.
        sources: by part of the text.
        shape: of the base.
        counts: windows or steps of each stage, in their order.
    """
    fields = {
        "base": base.model_dump(exclude_defaults=True) | {"dtype": base.dtype},
        "seed": 0,
        "length": length,
        "device": device_here(),  # by its name: several processes share a CPU only if told to
        "text": {part: [source.model_dump(exclude_defaults=True) for source in own] for part, own in sources.items()},
        "anee": anee_fields([*counts], shape),
        "stages": {name: DEFAULT_STAGES[name].section(count, shape) for name, count in counts.items()},
    }
    Recipe.model_validate(fields)
    return fields


def needed_windows(part: str, stages: list[str], shape: Shape, speed: Speed) -> int:
    """Windows of a part of the text that stages need at least; 0 if none reads it."""
    own = [DEFAULT_STAGES[name] for name in stages if DEFAULT_STAGES[name].text == part]
    return max((LEAST_TEXT if stage.steps else stage.least(shape, speed) for stage in own), default=0)


def check_text(request: Request, part: str, found: int, needed: int) -> None:
    """Notice a part that has too little text.

    Raises:
        DoesNotFit: with the tokens that were found and those that are needed.
    """
    if found < needed:
        start, stop = PARTS[part]
        raise DoesNotFit(
            f"--data {request.data} has too little text: {found} tokens in whole windows to {part} with ({start:.0%} to "
            f"{stop:.0%} of each file), and {needed} are needed"
        )


def _unit(name: str) -> str:
    return "steps" if DEFAULT_STAGES[name].steps else "windows"


def _effort(name: str, shape: Shape, speed: Speed, windows: int) -> Effort:
    """Of a stage, for so many windows of text."""
    stage = DEFAULT_STAGES[name]
    least = stage.least(shape, speed)
    usable = EPOCHS * windows // BATCH_WINDOWS if stage.steps else windows
    return Effort(least, max(least, min(stage.most(shape, speed), usable)), *stage.seconds(shape, speed), stage.share)


def _wanted(part: str, counts: dict[str, int]) -> int:
    """Windows of a part that stages use; those of steps go on where others of steps ended."""
    own = {name: count for name, count in counts.items() if DEFAULT_STAGES[name].text == part}
    steps = sum(count for name, count in own.items() if DEFAULT_STAGES[name].steps)
    return max(steps * BATCH_WINDOWS, LEAST_TEXT if steps else 0, *own.values())
