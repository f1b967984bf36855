"""The files of a folder as text: what is taken of each for each part, and what is refused."""

import gzip
import json

import pytest

from modeling_anee.data.documents import token_windows
from modeling_anee.data.own_text import PARTS, OwnText

from .workshop import tiny_tokenizer, words


def test_every_file_is_split_into_parts_that_share_nothing(tmp_path):
    (tmp_path / "a.txt").write_text(words(2000, seed=1))
    with gzip.open(tmp_path / "b.raw.gz", "wt") as file:
        file.write(words(4000, seed=2))
    records = [{"id": "w9", "text": " ".join(["w7"] * 20), "n": i} for i in range(100)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "notes.md").write_text("not for this")
    text, tokenizer = OwnText.of(tmp_path), tiny_tokenizer()
    assert [file["file"] for file in text.files] == ["a.txt", "b.raw.gz", "c.jsonl"]
    assert text.files[2]["template"] == "{text}"
    counts = {part: text.windows(part, tokenizer, 20, 1000) for part in PARTS}
    assert counts == {"train": [80, 159, 84], "choose": [10, 20, 10], "calibrate": [10, 20, 10]}
    for part in PARTS:
        sources = text.sources(part, tokenizer, 20, counts[part], 1000)
        assert len(token_windows(sources, tokenizer, 20, tmp_path, 0)) == sum(counts[part])
        assert sum(source.tokens for source in text.sources(part, tokenizer, 20, counts[part], 8)) >= 8 * 20
    bounds = [(source.start, source.stop) for part in PARTS for source in text.sources(part, tokenizer, 20, [9, 9, 9], 27)]
    assert sorted(set(bounds)) == [(0.0, 0.8), (0.8, 0.9), (0.9, 1.0)]
    assert text.windows("train", tokenizer, 20, 7) == [7, 7, 7], "no more is counted than could be used"


def test_files_that_are_no_text_are_all_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone is not allowed: it must be a folder with text files \(\.txt, "):
        OwnText.of(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"has no file that ends in \.txt, \.raw, \.jsonl, \.gz"):
        OwnText.of(tmp_path)
    (tmp_path / "fine.txt").write_text("w5 w6\n")
    (tmp_path / "bytes.txt").write_bytes(b"w5 \xff\n")
    (tmp_path / "empty.raw").write_text(" \n")
    (tmp_path / "table.csv.gz").write_bytes(gzip.compress(b"a,b\n"))
    (tmp_path / "numbers.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    (tmp_path / "some.jsonl").write_text('{"a": "x"}\n{"b": "y"}\n')
    (tmp_path / "torn.jsonl").write_text('{"a": "x"}\n{"a": \n')
    with pytest.raises(ValueError, match="has what can't be used as text") as error:
        OwnText.of(tmp_path)
    expected = {
        "bytes.txt": "is not text in UTF-8",
        "empty.raw": "is empty",
        "table.csv.gz": "is not allowed: what is packed must be",
        "numbers.jsonl": "has no field that is a text in every line",
        "some.jsonl": "has no field that is a text in every line",
        "torn.jsonl, line 2": "is not JSON",
    }
    assert all(f"{name} {what}" in str(error.value) for name, what in expected.items()), str(error.value)
    assert "fine.txt" not in str(error.value)
