"""`Recipe`: everything that decides what a fit makes, read from a YAML file and checked before any work is done."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from ..configuration_anee import AneeConfig
from ..data.bases import DEMO_BASE, Base, locate
from ..data.section import Number, Section
from ..data.sources import KINDS, DatasetSource, Source
from ..data.yaml_file import read_yaml


# What a recipe or a stage may set: all that does not follow from the base.
ANEE_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(AneeConfig)
    if field.name in AneeConfig.__annotations__ and not field.name.startswith(("base_", "text_config", "format_version"))
)
Share = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0)]
LearningRate = Annotated[Number, Field(gt=0)]
Temperature = Annotated[Number, Field(gt=0)]


class Text(Section):
    """Where text comes from; the three parts should not overlap."""

    train: list[Source] = Field([], description="Text to train on.")
    calibrate: list[Source] = Field([], description="Held-out text to calibrate on.")
    choose: list[Source] = Field([], description="Text to choose plans on.")


class Corrections(Section):
    """What rounding to 4 bits loses along a few directions of the inputs of linear maps."""

    windows: Count = Field(description="Windows to find the directions on.")
    rank: Count = Field(4, description="Directions of each linear map of a layer.")
    head_rank: Count = Field(8, description="Directions of the head.")


class Importance(Section):
    """The order in which narrow variants keep neurons and heads."""

    windows: Count = Field(description="Windows to measure on.")
    rank: int = Field(4, ge=0, description="Directions of each output map along which what is left out is added; 0: none.")


class Regression(Section):
    """A ridge regression."""

    windows: Count = Field(description="Windows to collect statistics over.")
    ridge: Number = Field(ge=0, description="Ridge penalty, relative to the mean square of the inputs.")


class ClosedForm(Regression):
    """Bridges by ridge regression."""

    keep_trained: bool = Field(False, description="Leave bridges that have learned something as they are.")


class Plans(Section):
    """Plans, by what every step costs."""

    windows: Count = Field(description="Windows to measure on.")
    lowest_budget: Share = Field(0.4, description="Cost down to which plans are sought.")


class Refit(Regression):
    """Bridges by ridge regression along the plans."""

    budgets: list[Share] = Field(min_length=1, description="Budgets whose plans are followed.")


class LongStage(Section):
    """A stage of optimiser steps."""

    steps: Count = Field(description="Optimiser steps.")
    learning_rate: LearningRate = Field(description="Highest learning rate.")
    warmup: Annotated[Number, Field(ge=0, lt=1)] = Field(0.05, description="Share of the steps in which the rate rises.")
    checkpoint_every: Count = Field(25, description="Steps between checkpoints.")


class Bridges(LongStage):
    """Bridges tuned together by distillation from the base."""

    batch_windows: Count = Field(description="Windows of a batch.")
    budgets: list[Share] = Field(min_length=2, max_length=2, description="Lowest and highest budget to train at.")

    @field_validator("budgets")
    @classmethod
    def _rising(cls, budgets: list[float] | None) -> list[float] | None:
        if budgets is None:
            return None
        if budgets[0] > budgets[1]:
            raise ValueError("the lowest budget comes first")
        if budgets[1] == 1.0:
            raise ValueError("nothing is left out at a budget of 1.0")
        return budgets


class Routing(Bridges):
    """The router of a `routed` controller, and the bridges on what it sends to them."""

    budgets: list[Share] | None = Field(  # type: ignore[assignment]
        None,
        min_length=2,
        max_length=2,
        description="Lowest and highest budget to train at; default: those of its plans that leave something out.",
    )


class Flips(Section):
    """The routers of a `gated` controller, from what leaving out one feed-forward at a time loses."""

    windows: Count = Field(description="Windows to measure on.")
    layers: Count = Field(1, description="Layers to leave out, one at a time, in each window.")
    ridge: Number = Field(0.3, ge=0, description="Ridge penalty, relative to the variance of each input.")
    keep_trained: bool = Field(
        False, description="Leave routers that have learned something as they are, and find only what fewer bits lose."
    )
    checkpoint_every: Count = Field(25, description="Windows between checkpoints, of each process.")


class GateStage(LongStage):
    """A stage of optimiser steps in which gates are sampled."""

    batch_windows: Count = Field(description="Windows of a batch.")
    capacities: list[Share] = Field(
        [0.35, 0.95], min_length=2, max_length=2, description="Lowest and highest share of feed-forwards that are run."
    )
    forward: list[Temperature] = Field(
        [0.5, 0.05], min_length=2, max_length=2, description="Temperature of the samples, at the first step and at the last."
    )
    backward: list[Temperature] = Field(
        [1.0, 0.5], min_length=2, max_length=2, description="Temperature of the gradient, at the first step and at the last."
    )

    @field_validator("capacities")
    @classmethod
    def _of_gates(cls, capacities: list[float]) -> list[float]:
        if not 0.0 < capacities[0] <= capacities[1] < 1.0:
            raise ValueError("they must lie between 0 and 1, the lowest first")
        return capacities


class Routers(GateStage):
    """Phase 1 of a `gated` controller: its routers, and the bridges on what they leave out."""

    capacity_weight: Number = Field(10.0, ge=0, description="Weight of the squared distance to the capacity.")
    z_weight: Number = Field(0.001, ge=0, description="Weight of the z-loss, which keeps the gates' logits small.")
    entropy_bonus: Number = Field(0.001, ge=0, description="Weight of the gates' entropy.")
    falling: Share = Field(0.5, description="Share of the steps in which the lowest capacity falls from 1 to its own.")
    layer_dropout: Share = Field(0.05, description="Probability of shutting the last layer to a whole row; less before it.")


class Gates(GateStage):
    """Phase 2 of a `gated` controller: its exit gates, and the exit translators."""

    supervised: Share = Field(0.7, description="Share of the steps that are supervised, before gates are sampled.")


class Exits(LongStage):
    """Exit translators, by distillation from the base."""

    batch_windows: Count = Field(description="Windows of a batch.")


class Probe(LongStage):
    """The probes that stand in for the head, and for running a layer, in the signals; from traces."""


class Traces(Section):
    """What the base does at every token and layer, for supervision."""

    windows: Count = Field(description="Windows to trace.")
    kl_windows: Count = Field(description="Windows, among these, for which the loss of each action is measured too.")


class Supervised(LongStage):
    """The policy, from traces."""

    batch_tokens: Count = Field(description="Tokens of a batch.")


class Reinforcement(LongStage):
    """The policy, by reward."""

    batch_windows: Count = Field(description="Windows of a batch.")
    entropy_bonus: Number = Field(ge=0, description="Weight of the policy's entropy.")
    savings_weight: Number = Field(ge=0, description="Weight of the saved cost.")
    adherence_weight: Number = Field(ge=0, description="Weight of the distance to the budget.")
    quality_gate: Number = Field(ge=0, description="Loss against the base, in nats, above which savings earn nothing.")


class Calibration(Section):
    """Thresholds that make the mean cost meet the budget, on held-out text."""

    windows: Count = Field(description="Windows to calibrate on.")
    budgets: list[Share] = Field([], description="Budgets to calibrate at.")
    capacities: list[Share] = Field([], description="The same for a gated controller: shares of the feed-forwards that run.")

    @model_validator(mode="after")
    def _either(self) -> "Calibration":
        if bool(self.budgets) == bool(self.capacities):
            raise ValueError("budgets, or capacities for a gated controller, must be given")
        return self


class Stages(Section):
    """The stages, in the order in which they run; one that is absent is not run."""

    corrections: Corrections | None = None
    importance: Importance | None = None
    closed_form: ClosedForm | None = None
    plans: Plans | None = None
    refit: Refit | None = None
    bridges: Bridges | None = None
    routing: Routing | None = None
    exits: Exits | None = None
    traces: Traces | None = None
    probe: Probe | None = None
    supervised: Supervised | None = None
    reinforcement: Reinforcement | None = None
    flips: Flips | None = None
    routers: Routers | None = None
    gates: Gates | None = None
    calibration: Calibration | None = None


STAGE_NAMES = tuple(Stages.model_fields)


class Recipe(Section):
    """How to fit an artifact to a base."""

    base: Base
    seed: int = Field(0, ge=0, description="Of all randomness.")
    length: int = Field(512, ge=2, description="Tokens of a window.")
    device: Literal["cpu", "cuda", "auto"] = Field("auto", description="Where to run.")
    tensorboard: bool = Field(False, description="Write the log for TensorBoard too.")
    start: str | None = Field(None, min_length=1, description="Artifact (folder or Hub name) to go on from.")
    text: Text = Text()
    anee: dict[str, Any] = Field({}, description=f"Fields of AneeConfig: {', '.join(ANEE_FIELDS)}.")
    stages: Stages = Stages()
    _folder: Path = PrivateAttr(Path())  # where it was read

    @field_validator("anee")
    @classmethod
    def _known_to_anee(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return check_anee_fields(fields)

    @property
    def planned(self) -> list[str]:
        """Names of the stages to run, in order."""
        return [name for name in STAGE_NAMES if getattr(self.stages, name) is not None]

    def text_of(self, part: str) -> dict[str, Any]:
        """All that decides the windows of a part of the text, besides the files themselves."""
        fields = self.model_dump()
        return {name: fields[name] for name in ("base", "seed", "length")} | {"sources": fields["text"][part]}

    def located(self) -> "Recipe":
        """The same with absolute paths of folders, which may be written relative to the recipe's own.

        Raises:
            OSError, ValueError: as `locate`.
        """
        base = self.base.model_copy(update={"name": self._locate("base.name", self.base.name)})
        text = {part: [self._locate_dataset(source) for source in sources] for part, sources in self.text}
        start = None if self.start is None else self._locate("start", self.start)
        return self.model_copy(update={"base": base, "text": self.text.model_copy(update=text), "start": start})

    def _locate_dataset(self, source: Any) -> Any:
        if not isinstance(source, DatasetSource):
            return source
        return source.model_copy(update={"dataset": self._locate("dataset", source.dataset)})

    def _locate(self, field: str, name: str) -> str:
        return name if (field, name) == ("base.name", DEMO_BASE) else locate(field, name, self._folder)

    def digest(self) -> str:
        """A hash of every field, defaults included."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


def check_anee_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return `fields` if a recipe or a stage may set all of them.

    Raises:
        ValueError: one may not be set; the allowed ones are listed.
    """
    for name in fields:
        if name not in ANEE_FIELDS:
            raise ValueError(f"AneeConfig has no field {name!r} to set; the fields are {', '.join(ANEE_FIELDS)}")
    return fields


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        OSError: there is no such file.
        ValueError: not YAML, a key that is there twice, or fields that are wrong: each with its path, its value and what
            is allowed.
    """
    values = read_yaml(path)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        lines = "\n".join(f"  {_explain(details)}" for details in error.errors())
        raise ValueError(f"{path} is not a recipe:\n{lines}") from None
    recipe._folder = path.parent
    return recipe


def _explain(details: Any) -> str:
    """One error of pydantic in our words."""
    path, section = _locate(details["loc"])
    if details["type"] == "missing":
        return f"{path} is missing"
    if details["type"] == "extra_forbidden":
        allowed = f"there is no such field; the fields are {', '.join(section.model_fields)}"
    else:
        allowed = details["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
    return f"{path}={details['input']!r} is not allowed: {allowed}"


def _locate(loc: tuple[str | int, ...]) -> tuple[str, type[Section]]:
    """Path of a field as the file has it, and the section that it is in."""
    names: list[str] = []
    section: Any = Recipe
    for before, part in zip((None, *loc), loc, strict=False):
        if part in KINDS and isinstance(before, int):  # which kind of source it is: not in the file
            section = KINDS[str(part)]
            continue
        names.append(str(part))
        field = section.model_fields.get(str(part))
        kinds: Any = (field.annotation, *get_args(field.annotation)) if field else ()
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), section)
    return ".".join(names) or "the file", section
