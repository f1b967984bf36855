"""Fitting stages to a time: each gets its share of it, within the least that is of use and the most that there is."""

from dataclasses import dataclass


ROUNDS = 60  # halvings of the scale


class DoesNotFit(ValueError):
    """There is too little time or text for anything useful."""


@dataclass(frozen=True)
class Effort:
    """Windows or steps of a stage, and what they take.

    Args:
        least: how many it needs.
        most: how many it can use, at least as many.
        fixed: seconds besides them.
        each: seconds of each.
        share: of the time.
    """

    least: int
    most: int
    fixed: float
    each: float
    share: float

    def seconds(self, count: int) -> float:
        """What so many of them take."""
        return self.fixed + self.each * count

    def count(self, seconds: float) -> int:
        """How many of them fit into a time."""
        return min(max(int((seconds - self.fixed) / self.each), self.least), self.most)


def least_seconds(efforts: dict[str, Effort]) -> float:
    """The shortest time that all of them fit into."""
    return sum(effort.seconds(effort.least) for effort in efforts.values())


def allot(efforts: dict[str, Effort], seconds: float) -> dict[str, int]:
    """How many windows or steps each stage gets, so that all of them take `seconds` at most.

    What some can't use goes to the others, and what some need at least comes from them.

    Raises:
        DoesNotFit: the time is shorter than `least_seconds`.
    """
    if seconds < least_seconds(efforts):
        raise DoesNotFit(f"{seconds:.0f} s are not enough: the least is {least_seconds(efforts):.0f} s")

    def scaled(scale: float) -> dict[str, int]:
        return {name: effort.count(scale * effort.share) for name, effort in efforts.items()}

    def total(scale: float) -> float:
        return sum(efforts[name].seconds(count) for name, count in scaled(scale).items())

    low, high = 0.0, max(effort.seconds(effort.most) / effort.share for effort in efforts.values())
    if total(high) <= seconds:
        return scaled(high)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) <= seconds else (low, middle)
    return scaled(low)
