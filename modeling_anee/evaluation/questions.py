"""Questions by category, from a file of the form that Spec-Bench and MT-bench have, or a few of our own."""

import json
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from .benchmark import PROMPTS


class Question(NamedTuple):
    """What is asked, and what kind of question it is."""

    category: str
    text: str


OWN = tuple(Question("own", prompt) for prompt in PROMPTS)


def read_questions(file: Path) -> list[Question]:
    """The first turn of each line, a JSON object with `category` and `turns`.

    Raises:
        OSError: the file can't be read.
        ValueError: a line is no such object; the message has its number.
    """
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question = Question(str(row["category"]), row["turns"][0])
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(f"{file}, line {number}, is no question with category and turns: {error!r}") from error
        if not isinstance(question.text, str) or not question.text:
            raise ValueError(f"{file}, line {number}, has a first turn that is no text")
        found.append(question)
    if not found:
        raise ValueError(f"{file} has no questions in it")
    return found


def over_categories(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At most so many questions: the first of each category, then the second of each, and so on."""
    by_category: dict[str, list[Question]] = {}
    for question in questions:
        by_category.setdefault(question.category, []).append(question)
    turns: Iterator[Any] = chain.from_iterable(zip_longest(*by_category.values()))
    return [question for question in turns if question is not None][:limit]
