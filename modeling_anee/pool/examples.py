"""Texts that rungs are measured on: a prompt that policies look at, and what should come next.

The loss of a language model is the bits that it needs for what comes next; that of a classifier is 1 for a wrong answer.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..data.labelled import read_labelled
from ..data.text import name_of_text, read_lines
from ..data.windows import spread


class Example(NamedTuple):
    """A prompt, what comes next, the name of the text that it is from, and whether what comes next is the name of a class."""

    prompt: str
    answer: str
    source: str
    is_label: bool = False

    @property
    def weight(self) -> int:
        """What its loss is divided by."""
        return 1 if self.is_label else len(self.answer.encode())

    @property
    def size(self) -> int:
        """Bytes of the text that is run."""
        return len(self.prompt.encode()) + (0 if self.is_label else len(self.answer.encode()))


def read_examples(path: Path, limit: int | None = None, prompt: int = 300, answer: int = 300) -> list[Example]:
    """Examples of a file, at most so many, evenly spread over it.

    Of `.tsv`, a text and its label in each line. Of `.jsonl`, the fields `question` and `answer` of each record. Of other text,
    lines that are long enough: about `prompt` characters, up to the end of a word, and about `answer` more; where no line is,
    as many lines together as are.

    Raises:
        ValueError: a record without those fields, a line without a label, or nothing that is long enough.
        OSError: the file can't be read.
    """
    source = name_of_text(path)
    if path.suffix == ".tsv":
        rows = read_labelled(path)
        return spread([Example(*row, source, True) for row in zip(rows.texts, rows.labels, strict=True)], limit)
    pairs = list(_records(path)) if path.suffix == ".jsonl" else _cut(path, prompt, answer)
    found = [Example(first, second, source) for first, second in pairs]
    if not found:
        raise ValueError(f"{path} has no records and less than {prompt + answer} characters: there is nothing to measure on")
    return spread(found, limit)


def _records(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            yield f"{record['question']}\n", str(record["answer"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: it must be a JSON record with the fields question and answer") from error


def _cut(path: Path, prompt: int, answer: int) -> list[tuple[str, str]]:
    """The beginnings of long lines; or else of stretches of short ones."""
    lines = [line.strip() for line in read_lines(path)]
    whole = [parts for parts in (_parts(line, prompt, answer) for line in lines) if parts is not None]
    if whole:
        return whole
    stretch, found = "", []
    for line in lines:
        stretch = f"{stretch}\n{line}" if stretch else line
        parts = _parts(stretch, prompt, answer)
        if parts is not None:
            found.append(parts)
            stretch = ""
    return found


def _parts(text: str, prompt: int, answer: int) -> tuple[str, str] | None:
    """A prompt and what comes next, both ending with a word; None if the text is too short for that."""
    cut = text.find(" ", prompt)
    end = text.find(" ", cut + answer) if cut >= 0 else -1
    return (text[:cut], text[cut:end]) if end >= 0 else None
