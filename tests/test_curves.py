"""The picture of perplexity against cost."""

import math

import pytest
from matplotlib import image
from matplotlib.figure import Figure

from modeling_anee.evaluation.curves import check_picture, draw_perplexity_curve


ROWS = [
    {"budget": 1.0, "mean_cost": 1.0, "perplexity": 16.2, "standard_error": 0.4},
    {"budget": 0.8, "mean_cost": 0.801, "perplexity": 22.5, "standard_error": 0.7},
    {"budget": 0.6, "mean_cost": 0.602, "perplexity": 61.0, "standard_error": math.nan},
]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[::-1], [ROWS[0] | {"standard_error": None}]])
def test_it_is_drawn_and_nothing_else_is_left(tmp_path, rows):
    draw_perplexity_curve(rows, tmp_path / "curve.png", "a title")
    assert image.imread(tmp_path / "curve.png").ndim == 3 and [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def drawn(monkeypatch, rows, path):
    """The axes of a picture, looked at when it is saved."""
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: (seen.append(figure.axes[0]), file.write_bytes(b"x")))
    draw_perplexity_curve(rows, path)
    return seen[0]


def test_points_bars_and_budgets_are_those_of_the_rows(tmp_path, monkeypatch):
    axes = drawn(monkeypatch, ROWS, tmp_path / "curve.svg")
    (line, _, (bars,)) = axes.containers[0].lines
    assert line.get_xydata().tolist() == [[0.602, 61.0], [0.801, 22.5], [1.0, 16.2]]
    assert bars.get_segments()[2][:, 1].tolist() == pytest.approx([15.8, 16.6])
    assert [text.get_text() for text in axes.texts] == ["0.6", "0.8", "1"]
    assert axes.get_yscale() == "log" and "cost" in axes.get_xlabel()
    assert drawn(monkeypatch, ROWS[:2], tmp_path / "curve.svg").get_yscale() == "linear"


def test_a_picture_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    def half(figure, file, **_):
        file.write_bytes(b"half")
        raise OSError("disk full")

    (tmp_path / "curve.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        draw_perplexity_curve(ROWS, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["curve", "curve.doc", "png"])
def test_an_ending_that_no_picture_has_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is not the name of a picture: .* .png, "):
        check_picture(tmp_path / name)


def test_no_rows_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="rows is empty"):
        draw_perplexity_curve([], tmp_path / "curve.png")
