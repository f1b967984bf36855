"""Figures as JSON files: written whole or not at all, and read back with a check."""

import json
import math
from pathlib import Path
from typing import Any

from ..data.files import write_file


def write_report(report: dict[str, Any], file: Path) -> None:
    """Write figures as JSON; what is not a finite number becomes null."""
    write_file(file, json.dumps(_finite(report), indent=2, ensure_ascii=False) + "\n")


def read_report(file: Path, verb: str, fields: tuple[str, ...], row_fields: tuple[str, ...]) -> dict[str, Any]:
    """Read the figures that a verb wrote.

    Args:
        file: what `--output` of the verb was.
        verb: its name, for the error.
        fields: what the report has.
        row_fields: what each of its `rows` has; null among them becomes nan again. Empty: its rows are not read.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not a report of that verb.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        missing = [name for name in fields if name not in report]
        missing += [f"rows.{name}" for name in row_fields if any(name not in row for row in report["rows"])]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is not a report of anee {verb}: {error}") from error
    if missing:
        raise ValueError(f"{file} is not a report of anee {verb}: it lacks {', '.join(missing)}")
    if not row_fields:
        return report
    rows = [row | {name: math.nan if row[name] is None else row[name] for name in row_fields} for row in report["rows"]]
    return report | {"rows": rows}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
