"""Labelled texts: what a file may be, in which order its labels come, what is said of a bad line."""

import pytest

from modeling_anee.data.labelled import Labelled, read_labelled


def test_rows_are_read_in_order(tmp_path):
    file = tmp_path / "data.tsv"
    file.write_text('a fine day\t1\nrain , " again "\t0\n', encoding="utf-8")
    found = read_labelled(file)
    assert found.texts == ["a fine day", 'rain , " again "'] and found.labels == ["1", "0"]
    assert read_labelled(file, 1).labels == ["1"]
    assert found.digest != read_labelled(file, 1).digest


@pytest.mark.parametrize(
    ("labels", "names"), [(["10", "9", "9"], ["9", "10"]), (["pos", "neg"], ["neg", "pos"]), (["2", "x"], ["2", "x"])]
)
def test_labels_are_numbered_in_their_order(labels, names):
    found = Labelled(["text"] * len(labels), labels)
    assert found.names == names and found.numbers(names) == [names.index(label) for label in labels]
    with pytest.raises(ValueError, match="'9' is not allowed|'neg'|'2'"):
        found.numbers(names[1:])


@pytest.mark.parametrize("line", ["no label", "two\ttabs\t1", "\t1", "text\t", ""])
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "data.tsv").write_text(f"fine\t1\n{line}\nfine\t0\n")
    with pytest.raises(ValueError, match="line 2"):
        read_labelled(tmp_path / "data.tsv")


def test_a_file_that_is_no_text_or_has_nothing_is_named(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\t1\n")
    (tmp_path / "empty").write_text("")
    for name, said in (("binary", "not UTF-8"), ("empty", "no rows")):
        with pytest.raises(ValueError, match=said):
            read_labelled(tmp_path / name)
