"""Figures as JSON files: what is no number is refused, with its place."""

import json
import math

import pytest

from modeling_anee.evaluation.report import plus_minus, read_report, write_report


def test_what_is_written_is_read(tmp_path):
    report = {"rows": [{"a": 1.5, "standard_error": None, "more": [1, "x"]}], "c": True}
    write_report(report, tmp_path / "r.json")
    assert read_report(tmp_path / "r.json", "compare", ("c",), ("a", "standard_error")) == report
    assert [*tmp_path.iterdir()] == [tmp_path / "r.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_no_figure(tmp_path, value):
    with pytest.raises(ValueError, match=rf"rows\[1\].deep\[0\].a={value} is not a finite number"):
        write_report({"rows": [{"a": 1.0}, {"deep": [{"a": value}]}]}, tmp_path / "r.json")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("value", [None, math.nan])
def test_figures_of_others_that_are_no_numbers_are_refused(tmp_path, value):
    (tmp_path / "r.json").write_text(json.dumps({"rows": [{"budget": 0.6, "a": value}]}))
    with pytest.raises(ValueError, match="r.json has a=(None|nan) at budget 0.6: it must be a finite number"):
        read_report(tmp_path / "r.json", "compare", (), ("a",))


def test_an_error_is_shown_where_there_is_one():
    assert plus_minus(1.23456, 0.0123, 3) == "1.235 +- 0.012" and plus_minus(1.23456, None, 2) == "1.23"
