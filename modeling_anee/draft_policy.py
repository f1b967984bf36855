"""How many tokens are drafted, and in which plan: what is expected to give the most tokens in a second.

What counts as known: how long the plans and the full model take (`draft_times.py`), and how often a drafted token is kept,
by how far its logit is above all others, since rounded weights change the order of the first two where they are near. Both
come from measurements; the second follows the text while it is generated. Nothing here depends on a clock, so the same seed
gives the same result.
"""

from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


EDGES = (
    0.05,
    0.1,
    0.2,
    0.4,
    0.8,
    1.6,
    3.2,
)  # of margins, in logits, with a part below the first and one above the last
MOST = 15  # tokens of a draft: 16 rows are verified then, from where on a CPU counts rows, not bytes
PRIOR = 20.0  # tokens, at most, that what was measured elsewhere counts for
GUESSED = (0.5, 0.6, 0.7, 0.85, 0.93, 0.97, 0.99, 0.998)  # where nothing was measured
OVERALL = 0.9  # share of the drafted tokens that are kept, where nothing was measured
FADING = 0.9  # of what was seen before the last draft
BETTER = 1.05  # times as fast another plan must be expected to be before it is taken


@dataclass
class Acceptance:
    """How many of a plan's drafted tokens were kept, by margin.

    Args:
        drafted: tokens in each part of `EDGES`.
        kept: how many of them were kept.
        by_margin: whether margins tell anything: not where tokens are drawn.
    """

    drafted: list[float]
    kept: list[float]
    by_margin: bool = True

    @classmethod
    def of(cls, drafted: Sequence[float] | None, kept: Sequence[float] | None, by_margin: bool = True) -> "Acceptance":
        """From what was measured, which counts for no more than `PRIOR` tokens in each part; None: nothing."""
        if drafted is None or kept is None:
            drafted, kept = [PRIOR] * len(GUESSED), [PRIOR * chance for chance in GUESSED]
        weights = [min(1.0, PRIOR / count) if count else 0.0 for count in drafted]
        one = cls([w * n + 1.0 for w, n in zip(weights, drafted, strict=True)], [], by_margin)
        one.kept = [w * n + g for w, n, g in zip(weights, kept, GUESSED, strict=True)]
        return one

    def chance(self, margin: float) -> float:
        """How likely a token is kept that has such a margin."""
        part = bisect(EDGES, margin)
        return self.kept[part] / self.drafted[part]

    def note(self, margin: float, kept: bool) -> None:
        """Learn what became of a token."""
        part = bisect(EDGES, margin)
        self.drafted[part] = FADING * self.drafted[part] + 1.0
        self.kept[part] = FADING * self.kept[part] + kept


@dataclass(frozen=True)
class Times:
    """Seconds, or anything in proportion.

    Args:
        full: of the full model for 1, 2, ... tokens of every row, as many as `MOST` + 1.
        draft: of one token of every row in a plan.
    """

    full: Sequence[float]
    draft: float


@dataclass
class Outlook:
    """What is expected of drafts in one plan.

    Args:
        plan: a `StraightPlan`.
        times: seconds.
        acceptance: by margin.
        overall: share of the drafted tokens that are kept; it counts for `PRIOR` tokens.
        rows: of the batch; a draft is kept as far as all rows keep it.
    """

    plan: Any
    times: Times
    acceptance: Acceptance
    overall: float = OVERALL
    rows: int = 1
    _seen: float = field(default=PRIOR, init=False)

    def best(self) -> tuple[float, int]:
        """How many times faster than plain decoding, and with drafts of how many tokens, where all are equally likely kept."""
        expected, chance = 1.0, 1.0
        found = 0.0, 0
        for count in range(1, MOST + 1):
            chance *= self.overall**self.rows
            expected += chance
            speed = expected * self.times.full[0] / (count * self.times.draft + self.times.full[count])
            found = max(found, (speed, count))
        return found

    def note(self, margins: Sequence[float], kept: int) -> None:
        """Learn how many of the tokens of a draft were kept; those after the first that was not tell nothing."""
        judged = min(kept + 1, len(margins))
        for place in range(judged):
            self.acceptance.note(margins[place], place < kept)
        self._seen = FADING * self._seen + judged
        self.overall += (kept - judged * self.overall) / self._seen


class DraftPolicy:
    """Chooses among plans, and when a draft ends.

    Args:
        outlooks: of each plan, at least one.
    """

    def __init__(self, outlooks: Sequence[Outlook]) -> None:
        self.outlooks = outlooks
        self.current = max(outlooks, key=lambda one: one.best()[0])
        self.speed, self.planned = self.current.best()

    @property
    def pays(self) -> bool:
        """Whether drafts are expected to be faster than plain decoding."""
        return self.speed > 1.0

    def goes_on(self, drafted: int, chance: float, most: int) -> bool:
        """Whether to draft another token.

        Args:
            drafted: tokens of the draft so far.
            chance: that all of them are kept.
            most: tokens of a draft at most.
        """
        times, gain = self.current.times, 0.0
        full, rate = times.full, self.speed / times.full[0]  # tokens a second
        for count in range(drafted + 1, min(most, MOST) + 1):
            chance *= self.current.overall**self.current.rows
            gain += chance
            if gain > rate * ((count - drafted) * times.draft + full[count] - full[drafted]):
                return True
        return False

    def chance(self, margin: float) -> float:
        """How likely a token is kept."""
        acceptance = self.current.acceptance
        return acceptance.chance(margin) if acceptance.by_margin else self.current.overall

    def note(self, drafts: Iterable[tuple[Sequence[float], int]], drafted: list[int], kept: list[int]) -> None:
        """Learn what became of a draft, and choose the plan of the next.

        Args:
            drafts: of each row, the margins of its tokens that were looked at, and how many of them were kept.
            drafted: counted up for each of these tokens, by the part of its margin.
            kept: the same for those that were kept.
        """
        for margins, count in drafts:
            self.current.note(margins, count)
            for place, margin in enumerate(margins[: count + 1]):
                drafted[bisect(EDGES, margin)] += 1
                kept[bisect(EDGES, margin)] += place < count
        own = self.current.best()[0]
        best = max(self.outlooks, key=lambda one: one.best()[0])
        if best.best()[0] > BETTER * own:
            self.current = best
        self.speed, self.planned = self.current.best()
