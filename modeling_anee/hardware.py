"""Hardware: what work costs on it. Costs and budgets are shares of the price of the whole model run in full."""

from dataclasses import dataclass

import torch

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
    """

    unit: str
    flop: float = 0.0
    weight_byte: float = 0.0
    kv_byte: float = 0.0
    launch: float = 0.0

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
        )


HARDWARE = {"bytes": Hardware("bytes", weight_byte=1.0), "flops": Hardware("flops", flop=1.0)}


def gathering_pays(saved_flops: float, device: torch.device) -> bool:
    """Whether leaving tokens out of a layer saves more arithmetic than gathering the others costs."""
    return saved_flops >= GATHERING_FLOPS.get(device.type, GATHERING_FLOPS["cuda"])
