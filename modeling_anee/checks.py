"""Checks of what users give: one line that names the field, the value and what is allowed."""

import difflib
import math
from collections.abc import Iterable
from typing import Any


def check_budget(value: Any, name: str = "energy_budget") -> float:
    """Return `value` as a float in [0, 1]; numbers of numpy and torch are numbers, too.

    Raises:
        ValueError: when it is not a number in [0, 1]; the message names the field.
    """
    number = plain(value)
    if not is_number(number) or not 0.0 <= number <= 1.0:
        raise ValueError(f"{name}={value!r} is not allowed: it must be a number between 0 and 1")
    return float(number)


def plain(value: Any) -> Any:
    """Numbers, arrays and tensors of numpy and torch as what Python and JSON know, in lists and dicts as well."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


def is_whole(value: Any) -> bool:
    """Whether it is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def one_of(name: str, value: Any, allowed: tuple) -> None:
    """Raise a ValueError unless `value` is one of those allowed, and of their type."""
    # 1 == True, but only one of them is a bool.
    if type(value) is not type(allowed[0]) or value not in allowed:
        raise ValueError(f"{name}={value!r} is not allowed: it must be one of {', '.join(map(repr, allowed))}")


def whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise a ValueError unless `value` is an integer from `low` to `high`."""
    if not is_whole(value) or value < low or (high is not None and value > high):
        limit = "" if high is None else f" to {high}"
        raise ValueError(f"{name}={value!r} is not allowed: it must be an integer from {low}{limit}")


def nearest(name: str, known: Iterable[str]) -> str:
    """`name` in quotes, and what may have been meant by it."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"{name!r} (did you mean {near[0]!r}?)" if near else repr(name)


def refuse_unknown(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise a ValueError if there are any `names`, each with the nearest of those known.

    Args:
        names: keywords that nobody knows.
        known: what may have been meant.
        what: what they would have to be, "a field of AneeConfig" for example.
    """
    unknown = [nearest(name, known) for name in names]
    if unknown:
        raise ValueError(f"unknown keyword {', '.join(unknown)}: it must be {what}")
