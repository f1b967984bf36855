"""How far long work is, on stderr: a bar on a terminal, a plain line every few seconds anywhere else.

Of several processes that a launcher started, only the first shows it.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


EVERY = 15.0  # seconds between lines


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def progress(title: str, total: int, done: int = 0, keep: bool = False) -> Iterator[Callable[[int], None]]:
    """Show work that can be counted; what it gives is called with the number of things that have just been done.

    Args:
        title: what is being done.
        total: how many things there are.
        done: how many of them were done before.
        keep: leave the last state there, as for a log.
    """
    console = Console(stderr=True)
    if not is_first_process():
        yield lambda count: None
    elif console.is_interactive:
        times = TimeElapsedColumn(), TimeRemainingColumn()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times
        with Progress(*columns, console=console, transient=not keep) as bar:
            yield partial(bar.advance, bar.add_task(title, total=total, completed=done))
    else:
        counter = _Counter(title, total, done)
        with _lines(counter.line):
            yield counter.advance
        if keep:
            _say(counter.line())


@contextlib.contextmanager
def waiting(title: str) -> Iterator[None]:
    """Show work that can't be counted."""
    console = Console(stderr=True)
    if not is_first_process():
        yield
    elif console.is_interactive:
        with console.status(title):
            yield
    else:
        begin = time.monotonic()
        with _lines(lambda: f"{title}: {clock(time.monotonic() - begin)} so far"):
            yield


class _Counter:
    """Counts work, and says how far it is."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self._title, self._total, self._before, self._done = title, total, done, done
        self._begin = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count

    def line(self) -> str:
        seconds, new = time.monotonic() - self._begin, self._done - self._before
        text = f"{self._title}: {self._done}/{self._total}, {clock(seconds)} so far"
        if not new or self._done >= self._total:
            return text
        return f"{text}, about {clock(seconds / new * (self._total - self._done))} to go"


@contextlib.contextmanager
def _lines(line: Callable[[], str]) -> Iterator[None]:
    """Print a line every few seconds from a thread of its own, since one step may take long."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(EVERY):
            _say(line())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(line, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
