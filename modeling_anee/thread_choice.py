"""Fewer threads of torch within a generation, while others take processors away and tokens are faster so.

Threads of one linear map wait for each other: where another process has one of two processors, a token in two threads takes
several times as long, and some take much longer than others, since the slower thread only gets its share of a processor.
What is faster is tried, on tokens that are wanted anyway.
"""

import threading
from collections import deque
from statistics import median

import torch

from .processors import Processors, psutil


JUMP = 1.5  # by how much more time than usual a token takes, so that fewer threads are tried
BUSY, QUIET = 0.5, 0.25  # processors that others use: above the first fewer threads are tried, below the second all again
EVERY = 0.05  # seconds of others' use that are looked at
FASTER = 0.95  # share of the time of a token below which a trial has paid
WAIT, KNOWN_WAIT = 16, 4  # tokens until the next trial: where nobody tells what others use, and where somebody does
USUAL = 16  # tokens of which the median says what is usual
_changing = threading.Lock()  # the number is that of the process: one generation at a time may change it


class ThreadChoice:
    """The number of threads, token by token.

    Args:
        given: the number at the begin, which is the highest, and that at the end.
        processors: tells what others use; None where nothing does.

    Attributes:
        current: the number now.
    """

    def __init__(self, given: int, processors: Processors | None) -> None:
        self.given = self.current = given
        self._processors = processors
        self._before: tuple[int, float] | None = None  # during a trial: the number before it, and a token's pace then
        self._shortest = WAIT if processors is None else KNOWN_WAIT
        self._wait, self._since = self._shortest, self._shortest
        self._usual: deque[float] = deque(maxlen=USUAL)

    def passed(self, pace: float, left: int) -> None:
        """A token has come: choose the number of threads of the next.

        Args:
            pace: seconds that it took, divided by what its cost lets expect.
            left: tokens still to come.
        """
        self._since += 1
        if self._before is not None:
            self._judge(pace, *self._before)
        elif self.current == self.given:
            slower = len(self._usual) > 1 and pace > JUMP * median(self._usual)
            self._usual.append(pace)
            if self._since >= self._wait and self._disturbed(slower):
                self._try(self._fewer(), pace)
        elif self._since >= self._wait and left > 1 and self._busy() < QUIET:
            self._try(self.given, pace)

    def end(self) -> None:
        """Set the number that was there at the begin, and let others change it."""
        self._set(self.given)
        _changing.release()

    def _judge(self, pace: float, number: int, before: float) -> None:
        """After a trial: go on so, or as before."""
        paid = pace < before * (FASTER if self.current < number else 1.0)
        self._wait = self._shortest if paid else 2 * self._wait
        self._before, self._since = None, 0
        if not paid:
            self._set(number)

    def _try(self, number: int, pace: float) -> None:
        self._before = self.current, pace
        self._set(number)

    def _set(self, number: int) -> None:
        if number != self.current:
            torch.set_num_threads(number)
            self.current = number

    def _disturbed(self, slower: bool) -> bool:
        """Whether others seem to take processors away."""
        return slower if self._processors is None else self._busy() > (QUIET if slower else BUSY)

    def _busy(self) -> float:
        """Processors that others use; 0 where nothing tells."""
        return 0.0 if self._processors is None else self._processors.busy()

    def _fewer(self) -> int:
        """As many threads as there are processors without others, and fewer than now."""
        free = self.given // 2 if self._processors is None else int(self._processors.count - self._busy())
        return max(min(free, self.given - 1), 1)


def begin_choice() -> ThreadChoice | None:
    """Choose threads from now until its `end`; None where there is one, or where another generation chooses."""
    given = torch.get_num_threads()
    if given < 2 or not _changing.acquire(blocking=False):
        return None
    try:
        processors = Processors(psutil(), EVERY)
    except ImportError:
        processors = None
    return ThreadChoice(given, processors)
