"""What differs between the supported releases of transformers: the only file that knows.

5.24 renamed `past_key_values` to `cache`: in the arguments of models and `generate`, among generate's own keywords, and in
outputs. Both names are taken and answered on every supported release; what transformers itself is handed has its own.
"""

from dataclasses import fields
from typing import Any

import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging


OLDEST = (5, 23)  # releases before it are refused
NEWEST = (5, 24)  # the newest that the tests were run with
CACHE_NAMES = ("past_key_values", "cache")
# What this release calls a cache of keys and values.
CACHE = "cache" if any(field.name == "cache" for field in fields(CausalLMOutputWithPast)) else "past_key_values"

logger = logging.get_logger("transformers.anee")  # follows the verbosity of transformers


def check_release(release: str) -> None:
    """Refuse a release of transformers before the window of supported ones; warn of one after it.

    Raises:
        ImportError: `release` is older than `OLDEST`.
    """
    numbers = tuple(int(part) for part in release.split(".")[:2])
    oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
    if numbers < OLDEST:
        raise ImportError(
            f"transformers {release} is too old for modeling-anee, which needs {oldest} or newer: "
            f"pip install --upgrade 'transformers>={oldest}'"
        )
    if numbers > NEWEST:
        logger.warning_once(
            f"transformers {release} is newer than {newest}, the newest release that this version of modeling-anee was tested "
            "with: if something breaks, update modeling-anee, or go back to that release"
        )


def cache_argument(cache: Any) -> dict[str, Any]:
    """A cache as a keyword argument of transformers' own functions."""
    return {CACHE: cache}


def take_cache(arguments: dict[str, Any]) -> Any:
    """Take a cache out of keyword arguments, under whichever name it was given; None where there is none.

    Raises:
        ValueError: it was given under both.
    """
    given = {name: arguments.pop(name) for name in CACHE_NAMES if name in arguments}
    found = [cache for cache in given.values() if cache is not None]
    if len(found) > 1 and found[0] is not found[1]:
        raise ValueError(f"{' and '.join(CACHE_NAMES)} are two names of one argument: give one of them")
    return found[0] if found else None


def rename_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments with the cache, if there is one, under this release's name.

    Raises:
        ValueError: it was given under both.
    """
    arguments = dict(arguments)
    named = any(name in arguments for name in CACHE_NAMES)
    cache = take_cache(arguments)
    return arguments | cache_argument(cache) if named else arguments


def cache_of(output: Any) -> Any:
    """The cache in an output of transformers (or of ours); None where there is none."""
    return output.get(CACHE)


class BothCacheNames:
    """For outputs: a release that calls the cache `past_key_values` answers to `cache` too; the newer ones do both."""

    if CACHE != "cache":

        @property
        def cache(self) -> Any:
            """The cache of keys and values."""
            return cache_of(self)


check_release(transformers.__version__)
