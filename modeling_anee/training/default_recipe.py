"""A recipe for a user's own base and text, fitted to a time on this machine."""

import math
import os
import re
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..configuration_anee import AneeConfig
from ..data.bases import DEMO_BASE, Base, config_of, load_base_of
from ..data.documents import check_end
from ..data.encoding import start_tokens
from ..data.own_text import PARTS, OwnText
from ..data.sampled_text import SampledText
from ..data.sources import FileSource, GeneratedSource
from .allotment import DoesNotFit, Effort, allot, least_seconds
from .default_stages import BATCH_WINDOWS, DEFAULT_STAGES, EPOCHS, SHARES, STAGES_OF, WITHOUT_DATA, anee_fields, chosen_stages
from .recipe import Recipe
from .run import wrap
from .shape import Shape, check_layers
from .speed import Speed, measure_sampling, measure_speed


LONGEST, SHORTEST = 512, 64  # tokens of a window
LONGEST_ALONE = 256  # where plans are all that is sought: more windows are worth more than longer ones
LEAST_TEXT = 8  # windows that a stage of steps needs
DTYPES = ("float32", "bfloat16", "float16")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    Args:
        base: Hub name or folder of the base, or the demo's.
        data: folder of text files; None: the base samples a little text for the stages that need no more.
        minutes: that the fit should take.
        stages: names of stages of the default recipe; None for all of them that there is text for.
        controller: kind of controller that uses it.

    Raises:
        ValueError: a base that can be none, minutes that are no time, a kind or stages that are not allowed, or no data for
            them.
    """

    base: str
    data: Path | None
    minutes: float
    stages: tuple[str, ...] | None = None
    controller: str = "routed"

    def __post_init__(self) -> None:
        """Check every field."""
        if not (self.minutes > 0 and math.isfinite(self.minutes)):
            raise ValueError(f"--minutes {self.minutes:g} is not allowed: it must be above 0")
        if self.controller not in STAGES_OF:
            raise ValueError(f"--controller {self.controller} is not allowed: it must be one of {', '.join(STAGES_OF)}")
        chosen = self.chosen
        if self.data is None and not set(chosen) <= set(WITHOUT_DATA):
            raise ValueError(
                f"--data is missing: it must be a folder with text files for {', '.join(chosen)}; without it there are "
                f"--stages {','.join(WITHOUT_DATA)} alone"
            )
        known = self.base == DEMO_BASE or os.path.isdir(self.base)
        if not known and (os.path.exists(self.base) or not HUB_NAME.fullmatch(self.base)):
            raise ValueError(
                f"BASE_OR_RECIPE {self.base} is not allowed: it must be a recipe (a file that ends in .yaml or .yml) or a base "
                f"({DEMO_BASE}, a folder that is there, or a Hub name)"
            )

    @property
    def chosen(self) -> list[str]:
        """Names of the stages in their order."""
        alone = self.data is None and self.stages is None and self.controller == "routed"
        return [*WITHOUT_DATA] if alone else chosen_stages(self.stages, self.controller)

    @property
    def command(self) -> str:
        """The command that asks for this, without its output: the same for the same request."""
        data = [] if self.data is None else ["--data", str(self.data)]
        kind = [] if self.controller == "routed" else ["--controller", self.controller]
        words = ["anee", "fit", self.base, *data, *kind, "--minutes", f"{self.minutes:g}"]
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
    text = SampledText() if request.data is None else OwnText.of(request.data)
    base = base_section(request.base)
    loaded, tokenizer, fields = load_base_of(base)
    check_end(tokenizer)
    loaded = loaded.to(device_here())
    config = loaded.config.get_text_config()
    check_layers(config)
    begin = time.perf_counter()
    model = wrap(loaded, fields | anee_fields(request.chosen, config.num_hidden_layers, config.hidden_size), 0)
    prepare, shape = time.perf_counter() - begin, Shape.of(model)
    sample = measure_sampling(model) if request.data is None else 0.0
    lowest, highest = shape.budgets((SHARES[-1], SHARES[0]))
    failure: DoesNotFit | None = None
    for length in lengths(shape):
        try:
            speed = measure_speed(model, length, (lowest, highest))
            return _fitted(request, base, text, tokenizer, shape, replace(speed, prepare=prepare, sample=sample))
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


def lengths(shape: Shape) -> list[int]:
    """Tokens of a window, the best first: the longest, or what the base takes, then halves of it."""
    longest = longest_of(shape)
    longest = min(longest, shape.context or longest)
    return [longest, *(length for length in (longest // 2, longest // 4, longest // 8) if length >= SHORTEST)]


def longest_of(shape: Shape) -> int:
    """Tokens of a window at most, whatever the base takes."""
    return LONGEST if shape.bridged else LONGEST_ALONE


def _fitted(request: Request, base: Base, text: OwnText | SampledText, tokenizer: Any, shape: Shape, speed: Speed) -> Made:
    stages, seconds = request.chosen, 60 * request.minutes
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
    base: Base,
    length: int,
    sources: dict[str, list[FileSource] | list[GeneratedSource]],
    shape: Shape,
    counts: dict[str, int],
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
        "anee": anee_fields([*counts], shape.layers, shape.hidden_size),
        "stages": {name: DEFAULT_STAGES[name].section(count, shape) for name, count in counts.items()},
    }
    Recipe.model_validate(fields)
    return fields


def needed_windows(part: str, stages: list[str], shape: Shape, speed: Speed) -> int:
    """Windows of a part of the text that stages need at least; 0 if none reads it."""
    own = [DEFAULT_STAGES[name] for name in stages if DEFAULT_STAGES[name].text == part]
    least = [LEAST_TEXT if stage.steps else stage.least(shape, speed) for stage in own]
    return max([*least, *(1 for name in stages if part == "choose" and DEFAULT_STAGES[name].measures)], default=0)


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
    measured = [DEFAULT_STAGES[name].measures for name in counts if part == "choose"]
    return max(steps * BATCH_WINDOWS, LEAST_TEXT if steps else 0, *measured, *own.values())
