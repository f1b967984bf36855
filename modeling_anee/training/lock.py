"""One run in a folder at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..data.files import remove_parts


NAME = ".lock"


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if it is not there, and clear what a killed run was writing in it.

    The file stays, but a process that ends, in whatever way, lets go of it.

    Raises:
        ValueError: another run holds it.
        NotImplementedError: its file system knows no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder} is in use by another run: wait for its end, or give another folder") from None
    try:
        remove_parts(folder)
        yield
    finally:
        lock.release()
