"""Budgets that follow resources: what `generate` asks before each token where `energy_budget` is not a number.

A source is any function of a `Progress`: how far the generation is, how long it took, what it cost. What a token takes is
learned from those before it. Those that keep a time may run tokens in fewer threads, too. `resources.py` has those that look at
the machine.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from .checks import check_budget, is_number, whole
from .energy_counters import Counter, devices_of, find_counters, joules_between


RECENT, FORGETTING = 24, 0.8  # tokens that are looked at; weight of each beside the one after it
# What a token takes besides what its cost explains, as a share of one that is run in full. It does not matter where the budget
# comes to rest, but how soon: if it is too small, later; if it is too large, it swings.
OVERHEAD = 0.3
HORIZON = 16  # tokens within which a rate is reached again


@dataclass(frozen=True)
class Passed:
    """One step that is over: its new tokens in each row; budget, cost (mean over the rows), seconds of each; threads."""

    tokens: int
    budget: float
    cost: float
    seconds: float
    threads: int = 1

    @property
    def pace(self) -> float:
        """Seconds that a token in full would have taken, by what this one took for its cost."""
        return max(self.seconds, 1e-9) / expected(self.cost)


@dataclass(frozen=True)
class Progress:
    """How far a generation is.

    Args:
        seconds: since it began.
        prompt_seconds: of these, until the first new token.
        tokens: new tokens of each row so far.
        limit: new tokens that a row has at the end, at most.
        budget: the last one; before the first answer, the model's default.
        work: what the new tokens that have been run cost together, one in full counting 1; mean over the rows.
        floor: the lowest mean cost that the model can reach.
        history: the steps after the one that ran the prompt, oldest first.
    """

    seconds: float
    prompt_seconds: float
    tokens: int
    limit: int
    budget: float
    work: float
    floor: float = 0.0
    history: Sequence[Passed] = ()

    @property
    def left(self) -> int:
        """New tokens still to come, at most, and at least 1."""
        return max(self.limit - self.tokens, 1)


Ask = Callable[[Progress], Any]


@dataclass(frozen=True, kw_only=True)
class BudgetSource:
    """Says what the next token may cost: a number in [0, 1] for all rows, or one for each.

    Args:
        lowest: the smallest budget that it says, whatever the resource.
        highest: the largest.

    Raises:
        ValueError: they are not in [0, 1], or the wrong way round.
    """

    lowest: float = 0.0
    highest: float = 1.0

    def __post_init__(self) -> None:
        """Check what was given."""
        check_budget(self.lowest, "lowest")
        check_budget(self.highest, "highest")
        if self.lowest > self.highest:
            raise ValueError(f"lowest={self.lowest} is not allowed: it must be at most highest={self.highest}")

    def begin(self, model: Any) -> Ask:
        """What is asked in one generation of a model; sources that remember nothing are asked themselves."""
        return self

    def __call__(self, progress: Progress) -> Any:
        """Budget of the next token."""
        raise NotImplementedError

    def within(self, budget: float, progress: Progress) -> float:
        """The nearest budget that is allowed and can be reached, in thousandths: few different ones are few to look up."""
        return min(max(round(budget, 3), self.lowest, progress.floor), self.highest)


@dataclass(frozen=True, kw_only=True)
class TimedBudgetSource(BudgetSource):
    """A budget by how long tokens take.

    Args:
        change_threads: on a CPU, run tokens in fewer threads while other processes take processors away, if that is faster.
            `torch.set_num_threads` holds for the whole process; the number is what it was when the generation is over.
    """

    change_threads: bool = True


@dataclass(frozen=True)
class Deadline(TimedBudgetSource):
    """Finish in so many seconds, counted from the call of `generate`, and spend what this leaves on quality.

    Args:
        seconds: until the last token.
        tokens: how many there will be; default: as many as `generate` may make.

    Raises:
        ValueError: not above 0.
    """

    seconds: float
    tokens: int | None = None

    def __post_init__(self) -> None:
        """Check what was given."""
        super().__post_init__()
        check_above_zero("seconds", self.seconds)
        if self.tokens is not None:
            whole("tokens", self.tokens, 1)

    def __call__(self, progress: Progress) -> float:
        """The budget at which the tokens that are left take the time that is left."""
        left = progress.left if self.tokens is None else max(self.tokens - progress.tokens, 1)
        return self.within(budget_for(progress, (self.seconds - progress.seconds) / left), progress)


@dataclass(frozen=True)
class TokensPerSecond(TimedBudgetSource):
    """Keep a rate: so many new tokens of each row in a second, over the generation, the prompt's time left out.

    Args:
        rate: tokens per second.

    Raises:
        ValueError: not above 0.
    """

    rate: float

    def __post_init__(self) -> None:
        """Check what was given."""
        super().__post_init__()
        check_above_zero("rate", self.rate)

    def __call__(self, progress: Progress) -> float:
        """The budget at which some tokens from now on the rate is what it should be."""
        due = (progress.tokens - 1 + HORIZON) / self.rate
        return self.within(budget_for(progress, (due - progress.seconds + progress.prompt_seconds) / HORIZON), progress)


@dataclass(frozen=True)
class Joules(BudgetSource):
    """Use so many joules for the whole generation, the prompt included, by the counters of the machine.

    Args:
        total: joules.
        read: joules that something has counted so far; default: the counters of the CPU's packages and of the model's GPUs.
        full: joules of a token that is run in full. With it nothing is counted: a token is taken to use this, times its cost,
            and the prompt nothing. Default, where nothing can be counted: what a model's `cost_unit="joules"` says.

    Raises:
        ValueError: not above 0, or both `read` and `full`.
    """

    total: float
    read: Callable[[], float] | None = field(default=None, repr=False)
    full: float | None = None

    def __post_init__(self) -> None:
        """Check what was given."""
        super().__post_init__()
        check_above_zero("total", self.total)
        if self.full is not None:
            check_above_zero("full", self.full)
            if self.read is not None:
                raise ValueError(f"read and full={self.full} are two ways to tell joules: only one of them is allowed")

    def begin(self, model: Any) -> Ask:
        """Count from now on; where nothing can be counted, costs that are in joules say what tokens use.

        Raises:
            ValueError: the machine has no counters that can be read, and the model's costs are in something else.
        """
        if self.full is not None:
            return self
        try:
            return Metered(self, self.read or self._counted(model))
        except ValueError:
            if model.costs.unit != "joules":
                raise
            return replace(self, full=model.costs.total)

    def __call__(self, progress: Progress) -> float:
        """The budget at which the tokens that are left use the joules that are left, as modelled by `full`."""
        assert self.full is not None
        return self.within((self.total / self.full - progress.work) / progress.left, progress)

    def _counted(self, model: Any) -> Callable[[], float]:
        counters, problems, _ = find_counters(devices_of(model.base))
        if problems or not counters:
            raise ValueError(
                f"Joules(total={self.total:g}) is not possible on this machine: {'; '.join(problems) or 'it has no counters'}. "
                "Give read, a counter of your own, or full, the joules of a token that is run in full; or load the model with "
                "cost_unit='joules'"
            )
        return Meter(counters)


class Meter:
    """Joules of counters since it was made; asked more often than they start at 0 again, which takes minutes."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._counters, self._values, self._total = counters, [counter.read() for counter in counters], 0.0

    def __call__(self) -> float:
        """Joules up to now."""
        values = [counter.read() for counter in self._counters]
        self._total += joules_between(self._counters, self._values, values)
        self._values = values
        return self._total


class Metered:
    """`Joules` of one generation, counted."""

    def __init__(self, source: Joules, read: Callable[[], float]) -> None:
        self._source, self._read = source, read
        self._start = self._last = read()
        self._used = self._expected = 0.0  # joules of the last tokens, and what they would be at 1 for a token in full

    def __call__(self, progress: Progress) -> float:
        """The budget at which the tokens that are left use the joules that are left, by what the last ones used."""
        now = self._read()
        used, self._last = now - self._last, now
        if not progress.history:
            return self._source.within(progress.budget, progress)
        passed = progress.history[-1]
        self._used = FORGETTING * self._used + used
        self._expected = FORGETTING * self._expected + passed.tokens * expected(passed.cost)
        target = (self._source.total - (now - self._start)) / progress.left
        share = target * self._expected / self._used if self._used > 0 else 1.0
        return self._source.within(budget_of(share), progress)


def budget_for(progress: Progress, seconds: float) -> float:
    """The budget at which a token takes so long, by how long the last ones in as many threads took for what they cost."""
    if not progress.history:
        return progress.budget
    weight, total, logs, threads = 1.0, 0.0, 0.0, progress.history[-1].threads
    for passed in takewhile(lambda passed: passed.threads == threads, reversed(progress.history[-RECENT:])):
        logs += weight * math.log(passed.pace)
        total, weight = total + weight, weight * FORGETTING
    return budget_of(seconds / math.exp(logs / total))


def expected(cost: float) -> float:
    """What a token of a cost takes, as a share of one that is run in full."""
    return OVERHEAD + (1.0 - OVERHEAD) * cost


def budget_of(share: float) -> float:
    """The cost of a token that takes such a share."""
    return (share - OVERHEAD) / (1.0 - OVERHEAD)


def check_above_zero(name: str, value: Any) -> None:
    """Raise a ValueError unless it is a number above 0."""
    if not is_number(value) or value <= 0:
        raise ValueError(f"{name}={value!r} is not allowed: it must be a number above 0")
