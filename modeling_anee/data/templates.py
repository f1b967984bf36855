"""Texts with fields to fill, as in `{question} {answer}`: the syntax of `str.format`."""

import math
import string
from typing import Any


def check_template(template: str) -> None:
    """Notice a template that can't be filled before there is anything to fill it with.

    Raises:
        ValueError: its syntax is wrong, or a field has no name.
    """
    try:
        string.Formatter().vformat(template, (), _Anything())  # type: ignore[call-overload]
    except IndexError:
        raise ValueError("a field needs a name, as in {question}") from None
    except ValueError as error:
        raise ValueError(f"{error}; a brace that begins no field is written twice") from None


def has_fields(template: str) -> bool:
    """Whether there is anything to fill."""
    return any(name is not None for _, name, _, _ in string.Formatter().parse(template))


def fill(template: str, record: dict[str, Any]) -> str:
    """A template with the values of a record: texts and numbers, which may lie deeper, as in `{messages[0][content]}`.

    Raises:
        ValueError: a field is not there, or is null or anything else that is no text and no finite number.
    """
    return _Filler().vformat(template, (), record)


class _Filler(string.Formatter):
    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        try:
            value, first = super().get_field(field_name, args, kwargs)
        except (LookupError, TypeError, AttributeError):
            raise ValueError(f"there is no field {field_name!r}; the fields are {', '.join(kwargs)}") from None
        if not (isinstance(value, str) or _is_number(value)):
            raise ValueError(f"the field {field_name!r} is {'null' if value is None else value}, not a text or a number")
        return value, first


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class _Anything:
    """Has every field."""

    def __getitem__(self, name: Any) -> "_Anything":
        return self

    def __getattr__(self, name: str) -> "_Anything":
        return self

    def __format__(self, spec: str) -> str:
        return ""
