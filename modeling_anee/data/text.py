"""The one reader of text: UTF-8 without byte order mark, every line ended by a newline; from files, the standard input, gzip.

Texts come in pieces, since one may be larger than memory. Pieces end where a tokenizer would part them anyway.
"""

import codecs
import contextlib
import gzip
import io
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


STDIN = Path("-")
CHUNK = 1 << 16  # bytes that are read at once
PIECE = 1 << 16  # characters of a piece at least
LONGEST = 1 << 19  # and at most
GZIP = b"\x1f\x8b"  # how such a file begins, and no text in UTF-8
# Tokens reach over the end of a line only into blank lines or an indentation.
BREAK = re.compile(r"\n(?= ?\S)")


def read_pieces(path: Path, progress: Callable[[int], Any] | None = None) -> Iterator[str]:
    """A text in pieces.

    Args:
        path: a file, or `-` for the standard input.
        progress: called with the number of bytes that have just been read, of `size_of(path)`.

    Raises:
        OSError: the file is not there, is a folder or can't be read.
        ValueError: it is not text in UTF-8, with its place, or not a whole gzip file.
    """
    return in_pieces(_stretches(path, progress))


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text without their ends; what is after the last end is one too. Raises as `read_pieces`."""
    parts: list[str] = []
    for stretch in _stretches(path):
        first, *others = stretch.split("\n")
        parts.append(first)
        if others:
            yield "".join(parts)
            yield from others[:-1]
            parts = [others[-1]]
    yield "".join(parts)


def read_text(path: Path) -> str:
    """A whole text, which should be small. Raises as `read_pieces`."""
    return "".join(_stretches(path))


def check_text(path: Path) -> None:
    """Notice a text that can't be read before other work is done; what can be read only once is not read.

    Raises:
        OSError, ValueError: as `read_pieces`; there is nothing in the text.
    """
    if path == STDIN or (path.exists() and not path.is_file() and not path.is_dir()):
        return
    filled = sum(bool(stretch.strip()) for stretch in _stretches(path))  # all of it is read
    if not filled:
        raise ValueError(f"{path} is empty: there is no text in it")


def name_of_text(path: Path) -> str:
    """What a text is called in figures."""
    return "standard input" if path == STDIN else path.name


def size_of(path: Path) -> int | None:
    """Bytes of a file; None where nobody can tell."""
    return path.stat().st_size if path.is_file() else None


def check_string(value: Any, what: str) -> str:
    """Return a value that should be a text.

    Raises:
        ValueError: it is something else, or has half of a character; the message begins with `what` it is.
    """
    if not isinstance(value, str):
        raise ValueError(f"{what} is {value!r:.80}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} has {value[error.start]!r}, half of a character, at place {error.start}") from error
    return value


def in_pieces(stretches: Iterable[str]) -> Iterator[str]:
    """The same text, cut elsewhere: after lines, as far as these are not longer than `LONGEST` characters."""
    rest = ""
    for stretch in stretches:
        rest += stretch
        while place := _place_to_cut(rest):
            yield rest[:place]
            rest = rest[place:]
    if rest:
        yield rest


def _place_to_cut(text: str) -> int:
    """Where the first piece of a text ends; 0 if more of the text must be known to say so."""
    found = BREAK.search(text, PIECE, LONGEST)
    if found or len(text) < LONGEST:
        return found.end() if found else 0
    line = text.rfind("\n", PIECE, LONGEST) + 1
    blank = max(text.rfind(" ", PIECE, LONGEST), 0)  # which begins the next piece: tokens begin with blanks
    return line or blank or LONGEST


def _stretches(path: Path, progress: Callable[[int], Any] | None = None) -> Iterator[str]:
    """A text as it is read, in stretches of any length."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    count, lines, data = 0, 1, b"-"
    for data in _chunks(path, progress):
        count += len(data)
        try:
            stretch = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            place = count - len(error.object) + error.start
            line = lines + error.object[: error.start].count(b"\n")
            raise ValueError(f"{path} is not text in UTF-8: {error.reason} at byte {place}, in line {line}") from error
        lines += stretch.count("\n")
        yield stretch


def _chunks(path: Path, progress: Callable[[int], Any] | None) -> Iterator[bytes]:
    """The bytes of a text, unpacked; the last chunk is empty."""
    with _opened(path) as file:
        measured, place = progress is not None and path.is_file(), 0
        packed = path.suffix == ".gz" or file.peek(len(GZIP)).startswith(GZIP)
        stream: Any = gzip.GzipFile(fileobj=file) if packed else file
        chunk = b"-"
        while chunk:
            try:
                chunk = stream.read(CHUNK)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(f"{path} is not a whole gzip file: {error}") from error
            if measured and progress is not None:
                progress(file.tell() - place)
                place = file.tell()
            yield chunk


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    if path == STDIN:
        if sys.stdin is None:
            raise OSError("there is no standard input to read text from")
        source: Any = sys.stdin.buffer
        file = io.BufferedReader(source)
        try:
            yield file
        finally:
            file.detach()  # it is not ours to close
        return
    try:
        opened = path.open("rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise IsADirectoryError(f"{path} is a folder: a text must be a file") from error
    with opened:
        yield opened
