"""Hardware: what work costs on it. Costs and budgets are shares of the price of the whole model run in full."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .actions import FULL
from .narrow import whole_of
from .work import Work


# Arithmetic that a device does in the time that gathering and scattering a subset takes: on 2 CPU cores a layer of
# SmolLM2-135M (7 MFLOP a token) broke even at 12 to 16 tokens left out; accelerators are limited by kernel launches.
GATHERING_FLOPS = {"cpu": 1e8, "cuda": 2e10}


@dataclass(frozen=True)
class Hardware:
    """Prices of work, each for one unit of it.

    Args:
        unit: what prices are in, as costs are reported.
        flop: of a floating-point operation.
        weight_byte: of a byte of weights that is read: what decoding at batch 1 pays for.
        kv_byte: of a byte of keys and values that is written.
        launch: of a linear map that is called.
        context_byte: of a byte of keys and values of each token before, all those tokens together.
        token: of what every token takes besides, whatever is run for it.
        gathering_flops: arithmetic that it does in the time that gathering and scattering takes; None: that of its kind.
        variants: prices of work in other variants than `full`; none: they are the same.
    """

    unit: str
    flop: float = 0.0
    weight_byte: float = 0.0
    kv_byte: float = 0.0
    launch: float = 0.0
    context_byte: float = 0.0
    token: float = 0.0
    gathering_flops: float | None = None
    variants: Mapping[str, "Hardware"] = field(default_factory=dict)

    def of(self, variant: str) -> "Hardware":
        """Prices of work in a variant; a narrow one has those of what it is a part of.

        Raises:
            ValueError: variants have prices of their own, and this one has none.
        """
        variant = whole_of(variant)
        if variant == FULL or not self.variants:
            return self
        if variant not in self.variants:
            known = ", ".join([FULL, *self.variants])
            raise ValueError(
                f"there are no prices in {self.unit} for the variant {variant!r}, only for {known}: measure it too"
            )
        return self.variants[variant]

    def price(self, work: Work) -> float:
        """What work costs, in `unit`.

        Raises:
            ValueError: bytes have a price and can't be counted.
        """
        if self.weight_byte and work.unknown:
            raise ValueError(work.unknown)
        return (
            self.flop * work.flops
            + self.weight_byte * work.weight_bytes
            + self.kv_byte * work.kv_bytes
            + self.launch * work.launches
            + self.context_byte * work.context_bytes
        )


HARDWARE = {"bytes": Hardware("bytes", weight_byte=1.0), "flops": Hardware("flops", flop=1.0)}


def gathering_pays(saved_flops: float, device: torch.device, least: float | None = None) -> bool:
    """Whether leaving tokens out of a layer saves more arithmetic than gathering the others costs; `least`: as measured."""
    return saved_flops >= (GATHERING_FLOPS.get(device.type, GATHERING_FLOPS["cuda"]) if least is None else least)
