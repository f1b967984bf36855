"""The field `prices` of a configuration: what work costs on a machine, in milliseconds or joules, as a profile has it.

`anee profile` measures a machine, and `hardware.of_profile` makes prices of it; here they are only read.
"""

from typing import Any

from .actions import FULL
from .checks import is_number, one_of, refuse_unknown, whole
from .hardware import HARDWARE, Hardware


COUNTED = ("flops", "bytes")  # units that are counted anywhere
PRICED = ("ms", "joules")  # units that need prices
KINDS = ("flop", "weight_byte", "context_byte", "launch")
NEEDED = ("unit", "machine", "context", "token", "variants")
FIELDS = (*NEEDED, "gathering_flops")


def check_prices(prices: Any, unit: str) -> None:
    """Notice what are no prices, and a unit that needs others.

    Args:
        prices: None, or a dict: `unit`; `machine`, its name; `context`, the tokens before the one that is priced; `token`, what
            it takes whatever is run; `variants`, by name (`full` among them) the prices of a `flop`, a `weight_byte`, a
            `context_byte` and a `launch`; and perhaps `gathering_flops`, see `hardware.py`.
        unit: the configuration's `cost_unit`.

    Raises:
        ValueError: anything else; the message says what is allowed.
    """
    one_of("cost_unit", unit, (*COUNTED, *PRICED))
    if prices is None:
        if unit in PRICED:
            raise ValueError(
                f"cost_unit={unit!r} needs prices: measure this machine with `anee profile` and give them as prices"
            )
        return
    if not isinstance(prices, dict) or not isinstance(prices.get("variants"), dict) or FULL not in prices["variants"]:
        raise ValueError(f"prices={prices!r} is not allowed: it must be a dict with variants, {FULL!r} among them")
    refuse_unknown(set(prices) - set(FIELDS), FIELDS, "a field of prices")
    missing = next((name for name in NEEDED if name not in prices), None)
    if missing is not None:
        raise ValueError(f"prices has no {missing!r}, which is not allowed: it needs {', '.join(NEEDED)}")
    one_of("prices['unit']", prices["unit"], PRICED)
    if unit in PRICED and prices["unit"] != unit:
        raise ValueError(f"prices in {prices['unit']} are not allowed with cost_unit={unit!r}: they must be in {unit}")
    if not isinstance(prices["machine"], str):
        raise ValueError(f"prices has machine={prices['machine']!r}, which is not allowed: it must be a string")
    whole("prices['context']", prices["context"], 0)
    numbers = {name: prices[name] for name in ("token", "gathering_flops") if prices.get(name) is not None}
    _check_numbers("prices", numbers)
    for variant, own in prices["variants"].items():
        if not isinstance(own, dict) or set(own) != set(KINDS):
            raise ValueError(f"prices has {variant}={own!r}, which is not allowed: it must be a dict of {', '.join(KINDS)}")
        _check_numbers(f"prices of {variant}", own)


def _check_numbers(what: str, numbers: dict[str, Any]) -> None:
    for name, value in numbers.items():
        if not is_number(value) or value < 0:
            raise ValueError(f"{what} has {name}={value!r}, which is not allowed: it must be a number from 0")


def hardware_of(unit: str, prices: dict[str, Any] | None) -> Hardware:
    """What costs are priced by."""
    if unit in COUNTED or prices is None:
        return HARDWARE[unit]
    variants = {name: Hardware(unit, **own) for name, own in prices["variants"].items() if name != FULL}
    of_full, gathering = prices["variants"][FULL], prices.get("gathering_flops")
    return Hardware(unit, **of_full, token=prices["token"], variants=variants, gathering_flops=gathering)
