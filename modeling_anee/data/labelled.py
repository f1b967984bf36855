"""Labelled texts of a TSV file: a text, a tab, its label, in each line; no quotes, no header."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Labelled:
    """Texts and their labels, as the file spells them."""

    texts: list[str]
    labels: list[str]

    @property
    def names(self) -> list[str]:
        """The different labels, numbers by their value, others by the alphabet."""
        different = set(self.labels)
        return sorted(different, key=int if all(name.isdecimal() for name in different) else None)

    @property
    def digest(self) -> str:
        """SHA-256 of the texts."""
        return hashlib.sha256("\n".join(self.texts).encode()).hexdigest()

    def numbers(self, names: Sequence[str]) -> list[int]:
        """Labels as places in `names`.

        Raises:
            ValueError: a label that is not among them.
        """
        known = {name: number for number, name in enumerate(names)}
        if unknown := sorted(set(self.labels) - set(known)):
            raise ValueError(f"label {unknown[0]!r} is not allowed: it must be one of {', '.join(map(repr, names))}")
        return [known[label] for label in self.labels]


def read_labelled(path: Path, limit: int | None = None) -> Labelled:
    """Read the first `limit` rows of a file; None for all.

    Raises:
        OSError: it can't be read.
        ValueError: it is not UTF-8, a line is not a text, a tab and a label, or there are no lines.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[:limit]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        text, tab, label = line.rpartition("\t")
        if not tab or not text.strip() or not label.strip() or "\t" in text:
            raise ValueError(
                f"{path}, line {number} is {line[:80]!r}, which is not allowed: it must be a text, a tab and a label"
            )
        rows.append((text, label.strip()))
    if not rows:
        raise ValueError(f"{path} has no rows: each line must be a text, a tab and a label")
    return Labelled([text for text, _ in rows], [label for _, label in rows])
