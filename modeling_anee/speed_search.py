"""The search for a target speedup: the highest budget whose measured speed reaches it.

Nothing here runs a model: speeds come from a function `measure(budget)`. They are noisy, and a lower budget need not be
faster. So budgets are scanned from the highest down until one reaches the target, the gap above it is halved, and what is
found is measured once more: where it fails then, the next lower budget takes its place. Where the scan finds none, the
surroundings of the fastest budget are searched as well.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import NamedTuple


STEP = 1.03  # between budgets that are told apart: no measurement of a few rounds knows finer steps
SCANNED = 8  # parts that the first scan has


class Point(NamedTuple):
    """A budget, and how many times faster than the reference it was measured to be."""

    budget: float
    speedup: float


@dataclass(frozen=True)
class FoundSpeedup:
    """The budget that a search has found.

    Args:
        budget: the `energy_budget`.
        speedup: as it was measured when the budget was confirmed.
        tried: all that was measured, in that order; the last one is what was found.
    """

    budget: float
    speedup: float
    tried: tuple[Point, ...]


class TargetNotReached(ValueError):
    """No budget reaches the target; `best` is the fastest of those `tried`, as last measured."""

    def __init__(self, target: float, tried: Sequence[Point]) -> None:
        self.tried = tuple(tried)
        self.best = max((Point(*item) for item in dict(tried).items()), key=lambda point: point.speedup)
        super().__init__(
            f"a speedup of {target:g} can't be reached on this machine: the best of {len(dict(tried))} budgets that were tried "
            f"is {self.best.speedup:.2f}, at energy_budget={self.best.budget:.4g}"
        )


def budgets_between(marks: Sequence[float]) -> list[float]:
    """Budgets from the lowest mark to the highest, ascending: the marks, and others such that no step is above `STEP`."""
    marks, found = sorted(set(marks)), []
    for low, high in pairwise(marks):
        parts = math.ceil(math.log(high / low) / math.log(STEP))
        found += [low * (high / low) ** (part / parts) for part in range(parts)]
    return [*found, marks[-1]]


def find_speedup(target: float, budgets: Sequence[float], measure: Callable[[float], float]) -> FoundSpeedup:
    """The highest budget whose measured speed reaches a target.

    Args:
        target: how many times faster than the reference.
        budgets: to search in, ascending, at least one.
        measure: speed of a budget over that of the reference.

    Raises:
        TargetNotReached: no budget that was tried reaches it, or none does so again.
    """
    search = _Search(target, budgets, measure)
    place = search.highest()
    while place >= 0 and not search.reaches(place):
        place -= 1
    if place < 0:
        raise TargetNotReached(target, search.tried)
    return FoundSpeedup(*search.tried[-1], tried=tuple(search.tried))


class _Search:
    """What is known of a curve; budgets go by their places."""

    def __init__(self, target: float, budgets: Sequence[float], measure: Callable[[float], float]) -> None:
        self.tried: list[Point] = []
        self._target, self._budgets, self._measure = target, budgets, measure
        self._speeds: dict[int, float] = {}

    def reaches(self, place: int) -> bool:
        """Measure a budget: whether it reaches the target."""
        budget = self._budgets[place]
        speed = self._speeds[place] = self._measure(budget)
        self.tried.append(Point(budget, speed))
        return speed >= self._target

    def highest(self) -> int:
        """The highest place that reaches the target, by a scan and halving; -1 for none."""
        for place in chain(self._scan(), self._climb()):
            if self.reaches(place):
                return self._halve(place)
        return -1

    def _scan(self) -> Iterator[int]:
        """Places from the last to the first, evenly spread."""
        last = len(self._budgets) - 1
        parts = min(SCANNED, last)
        yield from (part * last // parts for part in range(parts, 0, -1))
        yield 0

    def _climb(self) -> Iterator[int]:
        """Places on both sides of the fastest so far, ever nearer: there may be a peak between those of the scan."""
        step = (len(self._budgets) - 1) // SCANNED
        while step > 1:
            step //= 2
            best = max(self._speeds, key=lambda place: self._speeds[place])
            places = range(len(self._budgets))
            yield from (place for place in (best + step, best - step) if place in places and place not in self._speeds)

    def _halve(self, low: int) -> int:
        """The highest place from `low` on, which reaches the target, to below those that don't."""
        high = min((place for place in self._speeds if place > low), default=len(self._budgets))
        while high - low > 1:
            middle = (low + high) // 2
            if self.reaches(middle):
                low = middle
            else:
                high = middle
        return low
