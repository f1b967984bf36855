"""Budgets that follow the machine: its load by others, and its battery. Both are read by psutil (the extra `resources`)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .budget_sources import Ask, BudgetSource, Progress, check_above_zero
from .processors import Processors, psutil


@dataclass(frozen=True)
class Sampled(BudgetSource):
    """A budget between `lowest`, where nothing of a resource is free, and `highest`, where all of it is.

    Args:
        read: the share of the resource that is free, in [0, 1]; default: what the kind looks at.
        every: seconds between two readings.

    Raises:
        ImportError: psutil is not installed, and no `read` was given.
        ValueError: `every` is not above 0, or there is no such resource.
    """

    read: Callable[[], float] | None = field(default=None, repr=False)
    every: float = 1.0

    def __post_init__(self) -> None:
        """Check what was given."""
        super().__post_init__()
        check_above_zero("every", self.every)
        if self.read is None:
            self._reader()  # fails now rather than later

    def begin(self, model: Any) -> Ask:
        """Read from now on."""
        return Sampling(self, self.read or self._reader())

    def _reader(self) -> Callable[[], float]:
        raise NotImplementedError


@dataclass(frozen=True)
class SystemLoad(Sampled):
    """Leave the machine to others: the budget falls as other processes take its processors.

    What is free is the share of all processors that no other process has used since the last reading.
    """

    every: float = 0.25

    def _reader(self) -> Callable[[], float]:
        return Processors(_psutil("SystemLoad")).free


@dataclass(frozen=True)
class Battery(Sampled):
    """Spend less as the battery runs down: what is free is its charge, or everything while it is plugged in."""

    every: float = 10.0

    def _reader(self) -> Callable[[], float]:
        sensor = getattr(_psutil("Battery"), "sensors_battery", None)  # not there on some systems
        if sensor is None or sensor() is None:
            raise ValueError("Battery() is not possible: psutil finds no battery in this machine")

        def charge() -> float:
            found = sensor()
            return 1.0 if found is None or found.power_plugged else found.percent / 100.0

        return charge


class Sampling:
    """A sampled source in one generation."""

    def __init__(self, source: Sampled, read: Callable[[], float]) -> None:
        self._source, self._read = source, read
        self._free, self._due = 1.0, 0.0

    def __call__(self, progress: Progress) -> float:
        """The budget of what was free at the last reading."""
        if progress.seconds >= self._due:
            self._free, self._due = min(max(self._read(), 0.0), 1.0), progress.seconds + self._source.every
        low, high = self._source.lowest, self._source.highest
        return self._source.within(low + (high - low) * self._free, progress)


def _psutil(what: str) -> Any:
    """The library, for a kind.

    Raises:
        ImportError: it is not installed; the message says what to install.
    """
    try:
        return psutil()
    except ImportError as error:
        raise ImportError(f"{what} needs psutil: pip install 'modeling-anee[resources]', or give read=") from error
