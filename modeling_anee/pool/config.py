"""`anee-pool.json`: the rungs of a pool, what was measured of them, and the settings of its policies, as plain JSON.

It is data: nothing in it is executed, and what it names is loaded from safetensors and without remote code.
"""

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from transformers.utils import cached_file

from ..data.files import write_file
from ..data.section import Section
from .features import FEATURES
from .rules import LEVELS, Level, parse_rule


FILE_NAME = "anee-pool.json"
POLICIES = ("energy", "complexity", "learned", "cascade", "mixture")
PolicyName = Literal["energy", "complexity", "learned", "cascade", "mixture"]
Share = float


class RungConfig(Section):
    """One rung: a model, and the plan or the budget that it runs at."""

    name: str = Field(pattern=r"^[\w.+-]+$", description="What policies and traces call it.")
    model: str = Field(min_length=1, description="Artifact or base: a folder, relative to this file, or a Hub name.")
    revision: str | None = Field(None, description="Revision on the Hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("float32", description="Dtype of the base.")
    energy_budget: Share | None = Field(None, ge=0, le=1, description="Share of its base's work that it runs at; default: 1.")
    strict: bool = Field(False, description="No single token above the budget: of a classifier, a fixed exit.")
    plan: str | None = Field(None, description="Of a base: the plan of every token, such as '18*INT8 / int8'.")

    @model_validator(mode="after")
    def _one_setting(self) -> Self:
        if self.plan is not None and self.energy_budget is not None:
            raise ValueError(f"rung {self.name!r} has a plan and an energy_budget: give one of them")
        return self


class Measured(Section):
    """What a rung was measured to cost and to lose.

    Bytes are of weights that are read. Of the classifiers' loss, see `examples.py`.
    """

    bytes_per_token: float = Field(gt=0, description="Mean over the texts.")
    most_bytes_per_token: float = Field(gt=0, description="Of the dearest single token: no request can cost more a token.")
    bytes_per_text_byte: float = Field(gt=0, description="The same work by bytes of text, which tokenizers don't change.")
    loss: float = Field(ge=0, description="Bits per byte over all texts; of classifiers, the share of wrong answers.")
    losses: dict[str, float] = Field(description="The same by text.")


class Fuzzy(Section):
    """Fuzzy rules over features: how complex a request is."""

    variables: dict[str, dict[Level, tuple[float, float, float, float]]] = Field(
        description="For each feature its levels: corners of a trapezoid, from where it begins to where it ends."
    )
    rules: list[str] = Field(min_length=1, description="IF (digits IS HIGH) OR (code IS HIGH) THEN (complexity IS HIGH)")
    cuts: tuple[float, float] = Field((1 / 3, 2 / 3), description="Complexity from which a request is MEDIUM, and HIGH.")
    rungs: dict[Level, str] = Field(description="Which rung serves each level.")

    @model_validator(mode="after")
    def _known(self) -> Self:
        for feature, levels in self.variables.items():
            if feature not in FEATURES:
                raise ValueError(f"variable {feature!r} is not allowed: it must be one of {', '.join(FEATURES)}")
            if set(levels) != set(LEVELS):
                raise ValueError(f"variable {feature!r} has the levels {', '.join(levels)}: it must have {', '.join(LEVELS)}")
            for level, corners in levels.items():
                if list(corners) != sorted(corners):
                    raise ValueError(f"{feature} {level}: the corners {corners} must not fall")
        if set(self.rungs) != set(LEVELS):
            raise ValueError(f"rungs has {', '.join(self.rungs)}: it must have {', '.join(LEVELS)}")
        if not 0 <= self.cuts[0] <= self.cuts[1] <= 1:
            raise ValueError(f"cuts={self.cuts} is not allowed: two numbers from 0 to 1, the lower one first")
        for rule in self.rules:
            parse_rule(rule, self.variables)
        return self


class Layer(Section):
    """An affine map, by the rows of its matrix."""

    weight: list[list[float]] = Field(min_length=1, description="[outputs, inputs]")
    bias: list[float] = Field(description="[outputs]")

    @model_validator(mode="after")
    def _shape(self) -> Self:
        if len(self.weight) != len(self.bias) or len({len(row) for row in self.weight}) != 1:
            widths = sorted({len(row) for row in self.weight})
            raise ValueError(f"weight has {len(self.weight)} rows of {widths} numbers for {len(self.bias)} biases")
        return self


class Gate(Section):
    """A score for every rung, from standardised features: one layer, or two with tanh between."""

    price: float = Field(ge=0, description="Loss that the work of the dearest rung was worth when it was fitted.")
    rungs: list[str] = Field(min_length=1, description="What the outputs stand for.")
    features: list[str] = Field(min_length=1)
    mean: list[float]
    scale: list[float]
    layers: list[Layer] = Field(min_length=1, max_length=2)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if unknown := [name for name in self.features if name not in FEATURES]:
            raise ValueError(f"features has {unknown[0]!r}: it must be among {', '.join(FEATURES)}")
        widths = [len(self.features), *(len(layer.bias) for layer in self.layers)]
        inputs = [len(layer.weight[0]) for layer in self.layers]
        if (
            len(self.mean) != widths[0]
            or len(self.scale) != widths[0]
            or inputs != widths[:-1]
            or widths[-1] != len(self.rungs)
        ):
            raise ValueError(f"a gate over {widths[0]} features and {len(self.rungs)} rungs has layers of other sizes")
        if not all(scale > 0 for scale in self.scale):
            raise ValueError(f"scale={self.scale} is not allowed: every number must be above 0")
        return self


class Cascade(Section):
    """A cheap rung first; the dear one where it is not sure."""

    cheap: str
    dear: str
    threshold: float = Field(description="Confidence, a mean probability, below which the dear rung answers.")
    others: list[float] = Field([], description="More thresholds, for the table of `anee pool measure`.")


class PoolConfig(Section):
    """What a pool is."""

    format: Literal[1] = Field(1, description="Version of this file.")
    rungs: list[RungConfig] = Field(min_length=1)
    policy: PolicyName = Field("energy", description="The one that serves where a call names none.")
    glance: str | None = Field(None, description="The rung that takes a cheap look at a request for the features.")
    price: float = Field(0.0, ge=0, description="Which of the fits of `learned` and `mixture` serve: those at this price.")
    measured: dict[str, Measured] = Field({}, description="By rung.")
    fuzzy: Fuzzy | None = None
    learned: list[Gate] = Field([], description="Logistic regressions, one for each price.")
    mixture: list[Gate] = Field([], description="Gating networks, one for each price.")
    cascade: Cascade | None = None

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [rung.name for rung in self.rungs]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two rungs are called {sorted(twice)[0]!r}")
        named = [*self.measured, *([] if self.glance is None else [self.glance])]
        named += [] if self.fuzzy is None else list(self.fuzzy.rungs.values())
        named += [] if self.cascade is None else [self.cascade.cheap, self.cascade.dear]
        named += [name for gate in (*self.learned, *self.mixture) for name in gate.rungs]
        if unknown := [name for name in named if name not in names]:
            raise ValueError(f"there is no rung {unknown[0]!r}: the rungs are {', '.join(names)}")
        return self

    def rung(self, name: str) -> RungConfig:
        """The rung of this name.

        Raises:
            ValueError: there is none.
        """
        for rung in self.rungs:
            if rung.name == name:
                return rung
        raise ValueError(f"there is no rung {name!r}: the rungs are {', '.join(rung.name for rung in self.rungs)}")

    def save(self, folder: str | os.PathLike) -> Path:
        """Write the file into a folder that is there; returns its path. A folder that holds it can be uploaded to the Hub."""
        path = Path(folder) / FILE_NAME
        write_file(path, self.model_dump_json(indent=1, exclude_none=True) + "\n")
        return path


def find_config(place: str | os.PathLike, **kwargs: Any) -> Path:
    """Where the file of a pool is: itself, in a folder, or in a repository of the Hub, which `kwargs` may say more of.

    Raises:
        OSError: there is none.
    """
    path = Path(place)
    if path.is_dir():
        path = path / FILE_NAME
    if path.is_file():
        return path
    if path.exists() or Path(place).is_absolute() or str(place).startswith("."):
        raise FileNotFoundError(f"{path} does not exist: a pool is a folder with {FILE_NAME} in it")
    found = cached_file(str(place), FILE_NAME, **kwargs)
    if found is None:
        raise FileNotFoundError(f"{place} has no {FILE_NAME}")
    return Path(found)


def read_config(path: Path) -> PoolConfig:
    """Read and check the file of a pool.

    Raises:
        ValueError: it is not JSON, or something in it is not allowed; the message names the file, the field, what is allowed.
        OSError: it can't be read.
    """
    try:
        return PoolConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    """The first things that are wrong, one after the other."""
    parts = []
    for problem in error.errors()[:3]:
        where = ".".join(map(str, problem["loc"]))
        parts.append(f"{where + ': ' if where else ''}{problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(parts)
