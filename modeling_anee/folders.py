"""Where things are kept on this machine."""

import json
import os
from pathlib import Path
from typing import Any

from transformers.utils import logging


logger = logging.get_logger("transformers.anee")  # follows the verbosity of transformers

CACHE_VARIABLE = "ANEE_CACHE"


def cache_folder() -> Path:
    """Where converted bases and measured kernels are kept: `ANEE_CACHE`, by default `anee` in the user's cache folder.

    Raises:
        OSError: neither `ANEE_CACHE` nor `XDG_CACHE_HOME` is set, and the user has no home folder.
    """
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "anee"
    home = os.path.expanduser("~")
    if home == "~":  # it stays as it is for a user without one
        raise OSError(f"you have no home folder to keep a cache in: set {CACHE_VARIABLE} to a folder")
    return Path(home) / ".cache" / "anee"


def kept_file(*parts: str) -> Path | None:
    """A file in that folder; None where there is no place to keep anything."""
    try:
        return cache_folder().joinpath(*parts)
    except OSError:
        return None


def read_kept(file: Path | None) -> dict[str, Any]:
    """What a JSON file holds by name; nothing where there is none, or where it is no such file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def keep(file: Path | None, known: dict[str, Any], what: str) -> None:
    """Write what is known to a JSON file, together with what others have found meanwhile; a warning where that can't be.

    Args:
        file: None for nowhere.
        known: by name.
        what: it is, for the warning.
    """
    if file is None:
        return
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(read_kept(file) | known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        logger.warning_once(f"{what} can't be kept in {file}, and is measured anew: {error}")
