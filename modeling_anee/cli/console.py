"""What every verb does at its beginning and at its end: libraries and files that are checked, files written, text printed."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.files import check_target, errors_name


STDOUT = "standard output"
# What to install for each extra, and what it brings that verbs import.
EXTRAS = {
    "plots": ("modeling-anee[plots]", ("matplotlib",)),
    "pool": ("modeling-anee[pool]", ("matplotlib", "pydantic", "simpful", "sklearn")),
    "train": ("modeling-anee[train]", ("accelerate", "filelock", "pydantic", "yaml")),
}


@contextlib.contextmanager
def extra_libraries(extra: str, what: str) -> Iterator[None]:
    """Around imports that need an extra; `what` is the verb or option that does, for the error.

    Raises:
        ImportError: one of the extra's libraries is not installed; the message says what to install.
    """
    requirement, libraries = EXTRAS[extra]
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in libraries:
            raise
        raise ImportError(f"{what} needs {error.name}: pip install '{requirement}'") from error


def check_file(option: str, file: Path | None) -> None:
    """Notice a file that can't be written before the work for it is done; None is no file.

    Raises:
        OSError: see `check_target`.
    """
    if file is not None:
        try:
            check_target(file)
        except OSError as error:
            raise OSError(f"{option} {error}") from error


def check_picture(option: str, file: Path | None) -> None:
    """Notice a picture that can't be drawn before the work for it is done; None is no picture.

    Raises:
        OSError: see `check_target`.
        ValueError: its name is not that of a picture.
        ImportError: matplotlib is not installed.
    """
    check_file(option, file)
    if file is not None:
        with extra_libraries("plots", option):
            from ..pictures.drawing import check_ending
        check_ending(file)


@dataclass(frozen=True)
class Output:
    """A file that a verb may have been asked for.

    Args:
        what: what it is called where the verb says that it is there.
        file: its name; None if it was not asked for.
        write: writes it.
    """

    what: str
    file: Path | None
    write: Callable[[Path], Any]


def deliver(text: str, *outputs: Output) -> None:
    """Write the files that were asked for, then print the text and where they are.

    Files come first, since the standard output may be closed or full; and the text is printed if a file can't be written.

    Raises:
        OSError: something can't be written; the error names it.
    """
    said = [text]
    try:
        for output in outputs:
            if output.file is not None:
                output.write(output.file)
                said.append(f"{output.what}: {output.file}")
    finally:
        say("\n\n".join(said))


def say(text: str) -> None:
    """Print to the standard output at once.

    Raises:
        OSError: nobody reads it any more, or it is full; the error names `STDOUT`.
    """
    with errors_name(STDOUT):
        print(text, flush=True)


def flush() -> None:
    """See that all that was printed is written. Raises as `say`."""
    with errors_name(STDOUT):
        sys.stdout.flush()
