"""YAML files: a key that is there twice is an error with its line."""

import pytest

from modeling_anee.data.yaml_file import read_yaml


def written(tmp_path, text):
    (tmp_path / "some.yaml").write_text(text, encoding="utf-8")
    return tmp_path / "some.yaml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "some.yaml, line 3: 'a' is there twice, first in line 1"),
        ("a:\n  - {x: 1}\n  - x: 1\n    y: 2\n    x: 3\n", "line 5: 'x' is there twice, first in line 3"),
        ("a: {x: 1, x: 2}\n", "line 1: 'x' is there twice, first in line 1"),
        ("a: [", "some.yaml is not YAML"),
        ("a: 1\n---\nb: 1\n", "some.yaml is not YAML"),
        ("[1]: 2\n? [1, 2]\n: 3\n", "some.yaml is not YAML"),
    ],
)
def test_what_is_wrong_is_an_error(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_yaml(written(tmp_path, text))


def test_the_rest_is_read_as_ever(tmp_path):
    assert read_yaml(written(tmp_path, "")) is None
    text = "\ufeffa: &x {k: 1, l: 2}\nb: {<<: *x, k: 3}\nc: *x\nd: {1: a, '1': b}\ne: {x: 1}\nf: {x: 1}\n"
    x = {"k": 1, "l": 2}
    expected = {"a": x, "b": {"k": 3, "l": 2}, "c": x, "d": {1: "a", "1": "b"}, "e": {"x": 1}, "f": {"x": 1}}
    assert read_yaml(written(tmp_path, text)) == expected
