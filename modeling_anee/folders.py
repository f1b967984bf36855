"""Where things are kept on this machine."""

import os
from pathlib import Path


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
