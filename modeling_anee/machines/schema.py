"""Dataclasses from JSON and back; what does not fit is an error that says where, what, and what is allowed."""

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ..checks import is_number, is_whole, nearest


Made = TypeVar("Made")
NAMES = {float: "a finite number", int: "an integer", str: "a string", bool: "true or false"}


def read_json(file: Path, kind: type[Made]) -> Made:
    """A dataclass from a JSON file.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no JSON, or not what the dataclass takes; the message has the file and the place in it.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    try:
        return build(kind, found)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def build(kind: Any, value: Any, place: str = "") -> Any:
    """A value of a type: a dataclass, a list or a dict of such, a number, a string.

    Raises:
        ValueError: it does not fit; the message has the place.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else build(next(one for one in inner if one is not type(None)), value, place)
    if is_dataclass(kind):
        return _build_dataclass(kind, value, place)
    if origin in (list, tuple) and isinstance(value, list):
        made = [build(inner[0], one, f"{place}[{number}]") for number, one in enumerate(value)]
        return made if origin is list else tuple(made)
    if origin in (dict, Mapping) or kind is dict:
        if isinstance(value, dict):
            return {name: build(inner[1], one, f"{place}.{name}") for name, one in value.items()}
        raise wrong(place, value, "an object")
    if origin in (list, tuple):
        raise wrong(place, value, "a list")
    fits = {float: is_number, int: is_whole}.get(kind, lambda one: isinstance(one, kind))(value)
    if not fits:
        raise wrong(place, value, NAMES[kind])
    return float(value) if kind is float else value


def wrong(place: str, value: Any, allowed: str) -> ValueError:
    """The error of a value that is not allowed at a place."""
    return ValueError(f"{place.lstrip('.') or 'the file'}={value!r:.80} is not allowed: it must be {allowed}")


def _build_dataclass(kind: Any, value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise wrong(place, value, "an object")
    known, hints = {one.name: one for one in fields(kind)}, get_type_hints(kind)
    unknown = next((name for name in value if name not in known), None)
    if unknown is not None:
        raise ValueError(f"{place.lstrip('.') or 'the file'} has the unknown field {nearest(unknown, known)}")
    for name, one in known.items():
        if name not in value and one.default is MISSING and one.default_factory is MISSING:
            raise ValueError(f"{place.lstrip('.') or 'the file'} has no {name!r}, which it needs")
    values = {name: build(hints[name], one, f"{place}.{name}") for name, one in value.items()}
    try:
        return kind(**values)
    except ValueError as error:  # of its own checks
        raise ValueError(f"{place}: {error}".lstrip(".: ")) from error
