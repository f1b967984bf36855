"""Reading text: one reader, whatever the encoding of lines, and errors that say where."""

import gzip
import io
import os
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_anee.data import text as reader
from modeling_anee.data.text import STDIN, check_string, check_text, in_pieces, read_lines, read_pieces, read_text, size_of


@pytest.fixture
def write(tmp_path):
    def to_file(content, name="text.txt"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return to_file


@pytest.fixture
def small(monkeypatch):
    """Pieces and chunks so small that short texts have many."""
    monkeypatch.setattr(reader, "PIECE", 12)
    monkeypatch.setattr(reader, "LONGEST", 40)
    monkeypatch.setattr(reader, "CHUNK", 5)


TEXT = "é a b\n\n  x y\nlast\n"
SPELLINGS = {
    "plain": TEXT.encode(),
    "byte order mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "Windows": TEXT.replace("\n", "\r\n").encode(),
    "old Mac": TEXT.replace("\n", "\r").encode(),
    "gzip": gzip.compress(TEXT.encode()),
    "gzip in parts": gzip.compress(TEXT[:7].encode()) + gzip.compress(TEXT[7:].encode()),
    "all of it": gzip.compress(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode()),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("source", ["file", "standard input"])
def test_a_text_is_the_same_however_it_is_written(write, small, monkeypatch, spelling, source):
    path = write(SPELLINGS[spelling])
    if source == "standard input":
        monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(SPELLINGS[spelling])))
        path = STDIN
    assert read_text(path) == TEXT


def test_standard_input_stays_open(monkeypatch):
    buffer = io.BytesIO(b"a b\n")
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=buffer))
    assert list(read_pieces(STDIN)) == ["a b\n"] and not buffer.closed
    check_text(STDIN)  # there is nothing to be known before it is read
    assert size_of(STDIN) is None
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(OSError, match="no standard input"):
        read_text(STDIN)


@settings(deadline=None)
@given(st.text(alphabet="ab\n\r \u2028é", max_size=200))
def test_lines_are_those_between_newlines(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    path.write_bytes(content.encode())
    expected = content.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    assert list(read_lines(path)) == expected


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab \n", max_size=60), max_size=8))
def test_pieces_are_the_text_and_end_with_a_line_that_is_followed_by_text(stretches):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "PIECE", 12)
        patch.setattr(reader, "LONGEST", 40)
        text = "".join(stretches)
        pieces = list(in_pieces(stretches))
        assert "".join(pieces) == text and all(len(piece) <= 40 for piece in pieces)
        assert pieces == list(in_pieces(list(text))), "whatever the stretches"
        for piece, following in zip(pieces, pieces[1:], strict=False):
            assert len(piece) > 12
            line = piece.endswith("\n") and following[:2].strip()
            assert line or len(piece) + len(following) >= 40, "no such line in reach"


def test_no_more_is_read_than_is_asked_for(write, monkeypatch):
    path = write(b"word \n" * 100_000)
    read = []
    first = next(iter(read_pieces(path, read.append)))
    assert reader.PIECE <= len(first) < 2 * reader.PIECE and sum(read) <= 3 * reader.CHUNK < size_of(path)


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
def test_progress_is_that_of_the_file(write, name):
    content = b"w5 w6 w7\n" * 50_000
    path = write(gzip.compress(content, mtime=0) if name.endswith(".gz") else content, name)
    read = []
    assert sum(map(len, read_pieces(path, read.append))) == len(content)
    assert sum(read) == size_of(path) and min(read) >= 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\r\nb\xe9 c", "text.txt is not text in UTF-8: invalid continuation byte at byte 4, in line 2"),
        (b"\xef\xbb\xbfa\n\xff", "invalid start byte at byte 5, in line 2"),
        (b"a" * 9 + b"\xe2\x82", "unexpected end of data at byte 9, in line 1"),
        (gzip.compress(b"a\n\n\xff", mtime=0), "invalid start byte at byte 3, in line 3"),
        (b"", "text.txt is empty"),
        (b"\xef\xbb\xbf \r\n", "text.txt is empty"),
        (gzip.compress(b"a b c d e f g", mtime=0)[:-9], "text.txt is not a whole gzip file"),
    ],
)
def test_unusable_texts_are_errors_that_say_where(write, small, content, message):
    with pytest.raises(ValueError, match=message):
        check_text(write(content))


def test_a_name_that_promises_gzip_is_kept_to(write):
    with pytest.raises(ValueError, match="text.gz is not a whole gzip file"):
        check_text(write(b"w3 w4", "text.gz"))


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.txt does not exist"):
        check_text(tmp_path / "gone.txt")
    with pytest.raises(IsADirectoryError, match="is a folder: a text must be a file"):
        check_text(tmp_path)


def test_a_pipe_is_read_once(tmp_path):
    ends = os.pipe()
    os.write(ends[1], b"a b\n")
    os.close(ends[1])
    pipe = Path(f"/dev/fd/{ends[0]}")
    check_text(pipe)
    assert size_of(pipe) is None and read_text(pipe) == "a b\n"
    os.close(ends[0])


def test_values_that_are_no_text_are_named():
    assert check_string("é", "it") == "é"
    with pytest.raises(ValueError, match="row 3 is None, not a text"):
        check_string(None, "row 3")
    with pytest.raises(ValueError, match=r"row 3 has '\\ud83d', half of a character, at place 1"):
        check_string("a\ud83d", "row 3")
