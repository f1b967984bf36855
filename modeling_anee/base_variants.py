"""Ways to run the linear maps of a sublayer: one row each, made from the frozen base when it is prepared.

To add one, register it: costs, actions, plans, traces and pictures know it by its name. `full` is the base's own weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from .actions import FULL, NONE
from .compiled_choice import int4_linear, int8_linear
from .compiled_float import full_linear
from .corrections import CorrectedLinear
from .narrow import NARROW


class LinearMap(Protocol):
    """A linear map with fixed weights, in some variant.

    It may also have a `row`: one row [in] -> [out], a new tensor, with nothing checked (no gradients, float32 on a CPU).
    """

    @property
    def weight_bytes(self) -> int | None:
        """Bytes of weights that one call reads; None: those of the base's own parameters."""

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [..., out] for inputs [..., in], in the dtype of the inputs."""

    def rows(self, start: int, stop: int | None) -> "LinearMap":
        """The map to outputs `start:stop`."""


@dataclass(frozen=True)
class Variant:
    """One way to run linear maps.

    Args:
        name: as it stands in actions.
        make: weight [out, in] and bias [out] (or None) -> the map. What it keeps is its own; the weight is the base's.
        make_small: the same for where memory counts more than time; None: no other.
        is_corrected: whether it loses so much that corrections, where there are any, are added; the map then has a
            `parts` and a `row`, see `corrections.Rounded`.
        parts: of the heads and neurons of a sublayer, of which the most important one is run; 1: all of them.
    """

    name: str
    make: Callable[[Tensor, Tensor | None], LinearMap]
    make_small: Callable[[Tensor, Tensor | None], LinearMap] | None = None
    is_corrected: bool = False
    parts: int = 1

    def map_of(self, weight: Tensor, bias: Tensor | None, directions: Tensor | None = None) -> LinearMap:
        """The map of a weight [out, in] and a bias [out], corrected along directions [rank, in] of its inputs, if any."""
        made: Any = self.make(weight, bias)
        return CorrectedLinear.of(made, weight, directions) if self.is_corrected and directions is not None else made

    def map_of_part(self, weight: Tensor, bias: Tensor | None, inputs: Tensor, directions: Tensor | None) -> LinearMap:
        """The same for some of the inputs, int64 [n], corrected for the others, too, whatever the variant."""
        made: Any = self.make(weight[:, inputs].contiguous(), bias)
        return made if directions is None else CorrectedLinear.of(made, weight, directions, inputs)


VARIANTS: dict[str, Variant] = {}


def register_variant(variant: Variant) -> None:
    """Make a variant known by its name.

    Raises:
        ValueError: the name is taken, or stands for what is left out.
    """
    if variant.name == NONE or variant.name in VARIANTS:
        raise ValueError(f"variant name {variant.name!r} is not allowed: it is taken; known are {', '.join([NONE, *VARIANTS])}")
    VARIANTS[variant.name] = variant


def variant_named(name: str) -> Variant:
    """The variant of a name.

    Raises:
        ValueError: nobody registered it.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant {name!r} is not allowed: it must be one of {', '.join([*VARIANTS, NONE])}")
    return VARIANTS[name]


def precisions() -> list[str]:
    """Names of the variants that a whole base may run in, beside the full one."""
    return [name for name in VARIANTS if name != FULL and name not in NARROW]


register_variant(Variant(FULL, full_linear))
register_variant(Variant("int8", int8_linear))
register_variant(Variant("int4", int4_linear, partial(int4_linear, small=True), is_corrected=True))
for _name, _narrow in NARROW.items():
    register_variant(replace(VARIANTS[_narrow.whole], name=_name, parts=_narrow.parts))
