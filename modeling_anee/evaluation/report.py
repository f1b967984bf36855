"""Figures as JSON files: written whole or not at all, and read back with a check."""

import json
import math
from pathlib import Path
from typing import Any

from ..data.files import write_file


def write_report(report: dict[str, Any], file: Path) -> None:
    """Write figures as JSON.

    Raises:
        ValueError: one of them is not a finite number; the message says where it is. What is not known is None.
        OSError: the file can't be written.
    """
    check_figures(report)
    write_file(file, json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_report(file: Path, verb: str, fields: tuple[str, ...], row_fields: tuple[str, ...]) -> dict[str, Any]:
    """Read the figures that a verb wrote.

    Args:
        file: what `--output` of the verb was.
        verb: its name, for the error.
        fields: what the report has.
        row_fields: what each of its `rows` has; null only where it is a standard error. Empty: its rows are not read.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not a report of that verb, or a figure is not a number.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        missing = [name for name in fields if name not in report]
        missing += [f"rows.{name}" for name in row_fields if any(name not in row for row in report["rows"])]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is not a report of anee {verb}: {error}") from error
    if missing:
        raise ValueError(f"{file} is not a report of anee {verb}: it lacks {', '.join(missing)}")
    for row in report["rows"] if row_fields else []:
        check_row(file, row, row_fields)
    return report


def check_row(file: Path, row: dict[str, Any], names: tuple[str, ...]) -> None:
    """Notice figures that are no numbers, which other tools write as null or NaN.

    Raises:
        ValueError: there is one; the message has the other entries that tell the row.
    """
    for name in names:
        value = row[name]
        if value is None and not name.endswith("standard_error") or isinstance(value, float) and not math.isfinite(value):
            which = ", ".join(f"{key} {row[key]}" for key in ("name", "case", "budget") if key in row)
            raise ValueError(f"{file} has {name}={value} at {which}: it must be a finite number; measure it again")


def check_figures(figures: Any, place: str = "") -> None:
    """Notice what is not a finite number among figures.

    Raises:
        ValueError: there is something; the message has the path to it.
    """
    entries = figures.items() if isinstance(figures, dict) else enumerate(figures) if isinstance(figures, list) else ()
    for name, entry in entries:
        check_figures(entry, f"{place}.{name}" if isinstance(figures, dict) else f"{place}[{name}]")
    if isinstance(figures, float) and not math.isfinite(figures):
        raise ValueError(f"{place.lstrip('.')}={figures} is not a finite number, so it is no figure")


def plus_minus(value: float, error: float | None, digits: int) -> str:
    """A figure with its standard error, if that is known: a single window has none."""
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} +- {error:.{digits}f}"
