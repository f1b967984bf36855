"""The text files of a folder as sources of a recipe: each is split by position into parts that share nothing."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .documents import count_tokens
from .encoding import start_tokens
from .sources import TEXT_SUFFIXES, FileSource
from .text import check_text, read_lines
from .windows import room_of


ENDINGS = (*TEXT_SUFFIXES, ".jsonl", ".gz")
# What each part of a recipe's text takes of every file, as shares of it.
PARTS = {"train": (0.0, 0.8), "choose": (0.8, 0.9), "calibrate": (0.9, 1.0)}
FIELD = re.compile(r"[^\W\d][\w -]*")  # names of fields that a template can have


@dataclass(frozen=True)
class OwnText:
    """Files of a folder, each as the fields of a `FileSource` that say what it is."""

    folder: Path
    files: list[dict[str, Any]]

    @classmethod
    def of(cls, folder: Path) -> "OwnText":
        """Every file of the folder that ends in one of `ENDINGS`, in the order of their names.

        Raises:
            ValueError: there is no such folder or no such file in it, or some of them are no text; all of these are named.
        """
        if not folder.is_dir():
            raise ValueError(f"--data {folder} is not allowed: it must be a folder with text files ({', '.join(ENDINGS)})")
        paths = sorted(path for path in folder.iterdir() if path.name.endswith(ENDINGS) and path.name[0] != ".")
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise ValueError(f"--data {folder} is not allowed: it has no file that ends in {', '.join(ENDINGS)}")
        files, wrong = [], []
        for path in paths:
            try:
                files.append(fields_of(path))
            except (ValueError, OSError) as error:
                wrong.append(str(error))
        if wrong:
            raise ValueError(f"--data {folder} has what can't be used as text; take it away or mend it: {'; '.join(wrong)}")
        return cls(folder, files)

    def windows(self, part: str, tokenizer: Any, length: int, most: int) -> list[int]:
        """How many windows of `length` tokens each file has in a part, at most `most` each."""
        room = room_of(length, start_tokens(tokenizer))
        sources = [self._source(file, part, most * room) for file in self.files]
        return [count_tokens(source, tokenizer, self.folder) // room for source in sources]

    def sources(self, part: str, tokenizer: Any, length: int, counts: Sequence[int], wanted: int) -> list[FileSource]:
        """Sources that together give `wanted` windows of a part, or all there are, from each file in proportion.

        Args:
            part: one of `PARTS`.
            tokenizer: the base's.
            length: tokens of a window.
            counts: what `windows` said; a file that has none is left out.
            wanted: windows.
        """
        room, total = room_of(length, start_tokens(tokenizer)), sum(counts)
        shares = [count if total <= wanted else -(-wanted * count // total) for count in counts]
        return [self._source(file, part, n * room) for file, n in zip(self.files, shares, strict=True) if n]

    def _source(self, file: dict[str, Any], part: str, tokens: int) -> FileSource:
        start, stop = PARTS[part]
        return FileSource(**file, start=start, stop=stop, tokens=tokens)


def fields_of(path: Path) -> dict[str, Any]:
    """What a `FileSource` must be told to read a file.

    Raises:
        OSError, ValueError: it can't be read as text, it is empty, or it is of another kind; the message names it.
    """
    if not path.name.removesuffix(".gz").endswith((*TEXT_SUFFIXES, ".jsonl")):
        allowed = ", ".join((*TEXT_SUFFIXES, ".jsonl"))
        raise ValueError(f"{path} is not allowed: what is packed must be one of {allowed}, as in name.txt.gz")
    check_text(path)
    if not path.name.removesuffix(".gz").endswith(".jsonl"):
        return {"file": path.name}
    return {"file": path.name, "template": "{" + longest_field(path) + "}"}


def longest_field(path: Path) -> str:
    """The field of a file's records that has most text; every record must have it.

    Raises:
        ValueError: a line is not a JSON object, or there is no such field; the message names the file.
    """
    characters: Counter[str] = Counter()
    common: set[str] | None = None
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        texts = {name: value for name, value in _record(path, number, line).items() if isinstance(value, str)}
        characters.update({name: len(value) for name, value in texts.items()})
        common = set(texts) if common is None else common & set(texts)
    usable = sorted(name for name in common or () if FIELD.fullmatch(name) and characters[name])
    if not usable:
        raise ValueError(f"{path} has no field that is a text in every line")
    return max(usable, key=lambda name: characters[name])


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}, line {number} is not a JSON object")
    return record
