"""What psutil tells of this machine's processors: how much of them other processes use."""

import importlib
from typing import Any

from .timing import now


class Processors:
    """What other processes used of the processors between two readings.

    Args:
        psutil: the library.
        every: seconds between two readings, at least; what is counted moves on in hundredths.
    """

    def __init__(self, psutil: Any, every: float = 0.02) -> None:
        self._psutil, self._process, self._every = psutil, psutil.Process(), every
        self._last, self._busy = self._counted(), 0.0

    def busy(self) -> float:
        """How many are busy with others, between 0 and all; the first reading tells since it was made."""
        if now() - self._last[0] > self._every:
            counted = self._counted()
            seconds, others = (new - old for new, old in zip(counted, self._last, strict=True))
            self._busy, self._last = min(max(others / seconds, 0.0), self.count), counted
        return self._busy

    def free(self) -> float:
        """The share of all processors that is not, in [0, 1]."""
        return 1.0 - self.busy() / self.count

    @property
    def count(self) -> int:
        """How many there are."""
        return self._psutil.cpu_count()

    def _counted(self) -> tuple[float, float]:
        """Seconds of the clock, and of the processors that others have used."""
        times, own = self._psutil.cpu_times(), self._process.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        busy = sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)  # guests are in `user`
        return now(), busy - own.user - own.system


def psutil() -> Any:
    """The library, by its name, so that code from the Hub can be loaded without it.

    Raises:
        ImportError: it is not installed.
    """
    return importlib.import_module("psutil")
