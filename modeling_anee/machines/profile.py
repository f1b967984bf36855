"""A profile: what was measured on a machine for the shapes of a base, as a JSON file that can be read again.

Times are in milliseconds. What lies between two measured numbers of rows is interpolated; beyond the last it goes on as there.
"""

import bisect
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from ..data.files import write_file
from ..narrow import whole_of
from .schema import read_json
from .workload import Kernel


FORMAT = "anee-profile-1"
HEAD = "head"


@dataclass(frozen=True)
class MapTimes:
    """A linear map, timed as it runs among the others of the model: its weights come from memory.

    Args:
        name: which of a layer's it is.
        variant: that it runs in.
        outputs: width.
        inputs: width.
        weight_bytes: that one call reads.
        rows: numbers of rows, ascending.
        ms: of a call, for each of them.

    Raises:
        ValueError: rows and times that are no table.
    """

    name: str
    variant: str
    outputs: int
    inputs: int
    weight_bytes: float
    rows: list[int]
    ms: list[float]

    def __post_init__(self) -> None:
        """Check the table."""
        check_table("rows", self.rows, self.ms)
        if min(self.ms) <= 0:
            raise ValueError(f"ms={self.ms} is not allowed: every time must be above 0")

    @property
    def key(self) -> tuple[bool, str, int, int]:
        """By which a kernel finds it; the head is none of a layer's maps, whatever its shape."""
        return self.name == HEAD, self.variant, self.outputs, self.inputs

    def at(self, rows: float) -> float:
        """Milliseconds of a call."""
        return interpolated(self.rows, self.ms, rows)


@dataclass(frozen=True)
class DecodeTimes:
    """One token of each row of a batch, besides its linear maps.

    Args:
        batch: rows.
        token_ms: of the loop of `generate`, the embedding and what a layer that is left out takes, in all.
        context_ms: of each layer that attends, for each token before.
        layer_ms: of a layer, by variant: norms, rotation, activation, attention to one token, and what calling it takes.
    """

    batch: int
    token_ms: float
    context_ms: float
    layer_ms: dict[str, float]


@dataclass(frozen=True)
class PromptTimes:
    """A prompt in one forward, besides its linear maps.

    Args:
        tokens: of the prompt.
        forward_ms: what a forward takes in which all layers are left out.
        attention_ms: of each layer that attends.
        layer_ms: of a layer, by variant, without its attention.
    """

    tokens: int
    forward_ms: float
    attention_ms: float
    layer_ms: dict[str, float]


@dataclass(frozen=True)
class Profile:
    """What was measured.

    Args:
        format: `anee-profile-1`.
        machine: CPU or accelerator, libraries and threads that the figures hold for.
        base: the base's kind and shape.
        kv_bytes: of keys and values of a token in one layer.
        made: the day.
        seconds: that measuring took.
        bandwidth: bytes of memory read in a millisecond, the most that a plain sum or a linear map of one row reached.
        launch_ms: of a linear map of next to nothing.
        gathering_ms: of gathering some of 64 tokens and putting them back, which a layer does at most three times.
        maps: linear maps.
        decode: by batch, ascending.
        prompts: by tokens, ascending.

    Raises:
        ValueError: another format, or nothing measured.
    """

    format: str
    machine: str
    base: str
    kv_bytes: float
    made: str
    seconds: float
    bandwidth: float
    launch_ms: float
    gathering_ms: float
    maps: list[MapTimes]
    decode: list[DecodeTimes]
    prompts: list[PromptTimes]

    def __post_init__(self) -> None:
        """Check what is needed of it."""
        if self.format != FORMAT:
            raise ValueError(f"format={self.format!r} is not allowed: it must be {FORMAT!r}; measure it again")
        if not self.maps or not self.decode or not self.prompts:
            raise ValueError("maps, decode and prompts are not allowed to be empty: measure it again")
        check_table("decode batches", [one.batch for one in self.decode], self.decode)
        check_table("prompt tokens", [one.tokens for one in self.prompts], self.prompts)
        for name in ("bandwidth", "kv_bytes", "launch_ms"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: it must be above 0")

    @classmethod
    def load(cls, file: Path) -> "Profile":
        """Read a file that `anee profile` wrote.

        Raises:
            OSError: it can't be read.
            ValueError: it is no profile; the message has the place.
        """
        return read_json(file, cls)

    def save(self, file: Path) -> None:
        """Write it as JSON. Raises OSError where that can't be."""
        write_file(file, json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")

    @property
    def variants(self) -> list[str]:
        """The variants that were measured."""
        return list(dict.fromkeys(one.variant for one in self.maps))

    @cached_property
    def _maps(self) -> dict[tuple[bool, str, int, int], MapTimes]:
        return {one.key: one for one in self.maps}

    def map_of(self, kernel: Kernel) -> MapTimes | None:
        """What was measured of a kernel's shape in its variant; None: nothing."""
        return self._maps.get((kernel.name == HEAD, kernel.variant, kernel.outputs, kernel.inputs))

    def ms_of(self, kernel: Kernel, rows: float) -> float:
        """Of a linear map as its shape was measured; of another, by its share of the bytes of the one that it is a part of."""
        known = self.map_of(kernel)
        if known is not None:
            return known.at(rows)
        whole = next((one for one in self.maps if (one.name, one.variant) == (kernel.name, whole_of(kernel.variant))), None)
        if whole is None:
            return self.launch_ms + kernel.weight_bytes / self.bandwidth
        share = kernel.weight_bytes / whole.weight_bytes
        return self.launch_ms + share * max(whole.at(rows) - self.launch_ms, 0.0)

    def token_ms(self, batch: float) -> float:
        """Of a step that decodes, whatever runs."""
        return interpolated([one.batch for one in self.decode], [one.token_ms for one in self.decode], batch)

    def context_ms(self, batch: float) -> float:
        """Of a layer that attends, for each token before."""
        return interpolated([one.batch for one in self.decode], [one.context_ms for one in self.decode], batch)

    def layer_ms(self, variant: str, batch: float) -> float:
        """Of a layer in a variant when decoding, besides its maps; of one that was not measured, the mean of the others'."""
        return interpolated([one.batch for one in self.decode], [_of(one.layer_ms, variant) for one in self.decode], batch)

    def forward_ms(self, tokens: float) -> float:
        """Of a forward over so many tokens, whatever runs."""
        return interpolated([one.tokens for one in self.prompts], [one.forward_ms for one in self.prompts], tokens)

    def prompt_attention_ms(self, tokens: float) -> float:
        """Of a layer that attends to a prompt: of each token it grows with their number."""
        each = [one.attention_ms / one.tokens for one in self.prompts]
        return tokens * interpolated([one.tokens for one in self.prompts], each, tokens)

    def prompt_layer_ms(self, variant: str, tokens: float) -> float:
        """Of a layer in a variant, besides its maps and its attention."""
        return interpolated([one.tokens for one in self.prompts], [_of(one.layer_ms, variant) for one in self.prompts], tokens)


def _of(times: dict[str, float], variant: str) -> float:
    variant = whole_of(variant)
    return times[variant] if variant in times else sum(times.values()) / max(len(times), 1)


def interpolated(places: Sequence[int], values: Sequence[float], place: float) -> float:
    """The value at a place between ascending ones; before the first as there, beyond the last along the last two."""
    if place <= places[0] or len(places) == 1:
        return values[0]
    high = min(bisect.bisect_left(places, place), len(places) - 1)
    share = (place - places[high - 1]) / (places[high] - places[high - 1])
    return values[high - 1] + share * (values[high] - values[high - 1])


def check_table(name: str, places: Sequence[int], values: Sequence[object]) -> None:
    """Raise a ValueError unless places are ascending from 1, one for each value."""
    ascending = all(low < high for low, high in zip(places, places[1:], strict=False))
    if not places or len(places) != len(values) or places[0] < 1 or not ascending:
        raise ValueError(f"{name}={list(places)} are not allowed: they must ascend from 1 on, one for each measured value")
