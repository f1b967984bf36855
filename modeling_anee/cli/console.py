"""What every verb does on a terminal: errors without tracebacks, progress on stderr, files that can be written."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


progress_console = Console(stderr=True)
EXPECTED_ERRORS = (OSError, ValueError, NotImplementedError, ImportError)
# What to install for each extra, and what it brings that verbs import.
EXTRAS = {
    "plots": ("modeling-anee[plots]", ("matplotlib",)),
    "train": ("modeling-anee[train]", ("accelerate", "filelock", "pydantic", "yaml")),
}


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn expected errors into one message on stderr and exit code 1."""
    try:
        yield
    except EXPECTED_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


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


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, and the function that moves it on."""
    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=progress_console, transient=True) as progress:
        yield partial(progress.advance, progress.add_task(title, total=total))


def check_folder(option: str, file: Path | None) -> None:
    """Notice a file that can't be written before the work for it is done; None is no file.

    Raises:
        OSError: its folder does not exist or may not be written to, or it is itself a folder.
    """
    if file is None:
        return
    if not file.parent.is_dir():
        raise OSError(f"{option} {file}: the folder {file.parent} does not exist")
    if not os.access(file.parent, os.W_OK):
        raise OSError(f"{option} {file}: the folder {file.parent} can't be written to")
    if file.is_dir():
        raise OSError(f"{option} {file} is a folder: it must be the name of a file")


def check_picture(option: str, file: Path | None) -> None:
    """Notice a picture that can't be drawn before the work for it is done; None is no picture.

    Raises:
        OSError: see `check_folder`.
        ValueError: its name is not that of a picture.
        ImportError: matplotlib is not installed.
    """
    check_folder(option, file)
    if file is not None:
        with extra_libraries("plots", option):
            from ..evaluation.drawing import check_ending
        check_ending(file)
