"""The figures of a card: reports of other verbs, read from their JSON files."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.report import read_report


@dataclass(frozen=True)
class Evaluated:
    """An artifact's perplexity at one budget on one text, and its ratio to the base's."""

    text: str
    windows: str
    budget: float
    cost: float
    perplexity: float
    ratio: float


@dataclass(frozen=True)
class Measured:
    """Reports of other verbs; what is not given is not on the card.

    Args:
        comparison: of `anee compare`.
        budgets: of `anee perplexity`, on texts that were not used for the fit.
        samples: of `anee samples`.
    """

    comparison: dict[str, Any] | None = None
    budgets: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, Any] | None = None

    @classmethod
    def read(cls, comparison: Path | None, budgets: Iterable[Path], samples: Path | None) -> "Measured":
        """Read the files that those verbs wrote.

        Raises:
            OSError: a file can't be read.
            ValueError: it is not such a report.
        """
        where = ("text", "windows", "length")
        row = ("name", "budget", "cost", "perplexity", "ratio", "standard_error")
        scored = ("budget", "mean_cost", "perplexity", "ratio", "ratio_standard_error")
        answers = ("prompt", "budget", "cost", "text")
        return cls(
            None if comparison is None else read_report(comparison, "compare", where, row),
            [read_report(file, "perplexity", where, scored) for file in budgets],
            None if samples is None else read_report(samples, "samples", ("max_new_tokens",), answers),
        )

    def evaluated(self, controller: str) -> list[Evaluated]:
        """What was measured of an artifact with that kind of controller: `anee compare` names its rows so."""
        found = [
            Evaluated(report["text"], window_count(report), row["budget"], row["mean_cost"], row["perplexity"], row["ratio"])
            for report in self.budgets
            for row in report["rows"]
        ]
        if self.comparison is None:
            return found
        own = [row for row in self.comparison["rows"] if row["name"] == controller]
        text, counted = self.comparison["text"], window_count(self.comparison)
        return found + [Evaluated(text, counted, row["budget"], row["cost"], row["perplexity"], row["ratio"]) for row in own]


def window_count(report: dict[str, Any]) -> str:
    """How much of its text a report was measured on."""
    return f"{report['windows']} windows of {report['length']} tokens"
