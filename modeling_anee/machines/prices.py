"""Prices of work in milliseconds, from a profile, and in joules: what `cost_unit="ms"` and `"joules"` count with.

A linear map of a variant is taken to cost so much for being called and so much for each byte of its weights, fitted to what one
row of each map was measured to take, with a share of what layers take besides. Costs of decoding at batch 1 after some tokens.
"""

from collections.abc import Sequence
from typing import Any

from ..actions import FULL
from .energy import EnergyModel
from .profile import MapTimes, Profile


GATHERS = 3  # times that a layer gathers and scatters, at most: for its attention, feed-forward and bridge
GATHERED_ROWS = 16  # at which the arithmetic of a gathered layer is done


def joule_prices(profile: Profile, energy: EnergyModel, context: int = 256) -> dict[str, Any]:
    """The field `prices` of a configuration in joules, as modelled: those of the time, and of bytes and operations.

    Args:
        profile: of the machine.
        energy: what models its joules.
        context: tokens before the one that is priced.
    """
    prices, watts = prices_of(profile, context), energy.machine.idle_watts.value / 1e3  # joules in a millisecond
    read = {"weight_byte": energy.byte, "context_byte": context * energy.byte}
    variants = {
        variant: {name: watts * ms + read.get(name, 0.0) for name, ms in own.items()} | {"flop": energy.operation(variant)}
        for variant, own in prices["variants"].items()
    }
    about = {"unit": "joules", "machine": f"{profile.machine}, energy of {energy.machine.name}"}
    return prices | about | {"token": watts * prices["token"], "variants": variants}


def prices_of(profile: Profile, context: int = 256) -> dict[str, Any]:
    """The field `prices` of a configuration in milliseconds.

    Args:
        profile: of the machine.
        context: tokens before the one that is priced.
    """
    kv_bytes = context_price(profile, context)
    return {
        "unit": "ms",
        "machine": profile.machine,
        "context": context,
        "token": max(profile.token_ms(1), 0.0),
        "gathering_flops": GATHERS * profile.gathering_ms * flops_per_ms(profile),
        "variants": {variant: variant_prices(profile, variant) | {"context_byte": kv_bytes} for variant in profile.variants},
    }


def variant_prices(profile: Profile, variant: str) -> dict[str, float]:
    """What calling a linear map and reading a byte of it cost in a variant, as fits what was measured best."""
    maps = [one for one in profile.maps if one.variant == variant]
    in_layers = [one for one in maps if one.name != "head"]
    rest = profile.layer_ms(variant, 1) / max(len(in_layers), 1)
    points = [(one.weight_bytes, one.at(1) + (0.0 if one.name == "head" else rest)) for one in maps]
    launch, byte = fitted_line([(size, ms) for size, ms in points if ms > 0])
    return {"flop": 0.0, "weight_byte": byte, "launch": launch}


def fitted_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Start and slope of y = start + slope * x, neither below 0, with the least sum of squared relative errors."""
    if not points:
        return 0.0, 0.0
    ones, xs = [1 / y for _, y in points], [x / y for x, y in points]
    a, b, c = _dot(ones, ones), _dot(ones, xs), _dot(xs, xs)
    d, e = sum(ones), sum(xs)
    determinant = a * c - b * b
    if determinant > 1e-12 * a * c:
        start, slope = (d * c - e * b) / determinant, (a * e - b * d) / determinant
        if start >= 0 and slope >= 0:
            return start, slope
    through_zero = (0.0, e / c if c else 0.0)
    flat = (d / a, 0.0)
    return min(through_zero, flat, key=lambda line: sum(((line[0] + line[1] * x) / y - 1) ** 2 for x, y in points))


def _dot(first: Sequence[float], second: Sequence[float]) -> float:
    return sum(one * other for one, other in zip(first, second, strict=True))


def context_price(profile: Profile, context: int) -> float:
    """Of a byte of keys and values of each token before."""
    return context * profile.context_ms(1) / profile.kv_bytes


def flops_per_ms(profile: Profile) -> float:
    """Arithmetic of linear maps of some rows."""
    maps: list[MapTimes] = [one for one in profile.maps if one.variant == FULL and one.name != "head"]
    flops = sum(2.0 * one.outputs * one.inputs * GATHERED_ROWS for one in maps)
    return flops / sum(one.at(GATHERED_ROWS) for one in maps)
