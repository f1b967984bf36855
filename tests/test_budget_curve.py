"""The budget curve: what is read from the figures of other verbs, and the picture."""

import json
import math

import pytest
import torch
from matplotlib import image
from matplotlib.colors import to_rgb
from typer.testing import CliRunner

from modeling_anee.cli.main import app
from modeling_anee.evaluation.report import write_report
from modeling_anee.pictures.budget_curve import (
    MAX_RATIO,
    PALE,
    STRONG,
    Curve,
    Point,
    draw_budget_curve,
    quality,
    read_quality,
    read_speed,
)


COMMON = {"windows_sha256": "ab" * 32}


def compare_report(budgets=(0.8, 0.6), **changes):
    """As `anee compare` writes one: a controller that loses little, a control that explodes below 0.7."""
    rows = [{"name": "base", "budget": 1.0, "cost": 1.0, "perplexity": 20.0, "ratio": 1.0, "standard_error": 0.0}]
    for budget in budgets:
        for name, ratio in (("plan", 2 - budget), ("static plan, no bridges", 2.0 if budget > 0.7 else 1264.2)):
            row = {"name": name, "budget": budget, "cost": budget + 0.01, "perplexity": 20 * ratio, "ratio": ratio}
            rows.append(row | {"standard_error": 0.05 * ratio})
    return COMMON | {"controllers": {"plan": "plan"}, "rows": rows} | changes


def with_fixed(report, **ratios):
    """The same with rows of what has no dial, as `anee compare` writes them."""
    rows = [
        {
            "name": name,
            "budget": cost,
            "cost": cost,
            "ratio": ratio,
            "standard_error": 0.01,
            "perplexity": 20 * ratio,
            "fixed": True,
        }
        for name, (cost, ratio) in ratios.items()
    ]
    return report | {"rows": [*report["rows"][:1], *rows, *report["rows"][1:]]}


def perplexity_report(**changes):
    rows = [
        {"budget": b, "mean_cost": b, "ratio": 2 - b, "ratio_standard_error": 0.1 * (1 - b), "perplexity": 5.0}
        for b in (1.0, 0.8)
    ]
    return COMMON | {"controller": "learned", "rows": rows} | changes


def bench_report():
    cases = {"plain": (1.0, 1.0, None), "budget 1.0": (1.2, 1.0, 1.0), "budget 0.5": (1.8, 0.51, 0.6)}
    cases["half the layers"] = (9.0, 0.52, 0.6)  # not of the dial
    rows = [
        {"case": c, "ratio": r, "ratio_low": 0.9 * r, "ratio_high": 1.1 * r, "mean_cost": cost, "weights_read": read}
        for c, (r, cost, read) in cases.items()
    ]
    batched = [row | {"weights_read": None} for row in rows]
    return {"tables": {"decode, batch 1, 9 new tokens": rows, "decode, batch 8, 9 new tokens": batched}}


@pytest.fixture
def write(tmp_path):
    def to_file(name, report):
        write_report(report, tmp_path / name)
        return tmp_path / name

    return to_file


def test_figures_of_both_verbs_become_curves(write):
    curves = read_quality([write("a", compare_report()), write("b", perplexity_report())])
    assert [(curve.name, curve.control) for curve in curves] == [
        ("plan", False),
        ("static plan, no bridges", True),
        ("learned", False),
    ]
    assert curves[0].points[0.8] == pytest.approx(Point(0.81, 1.2, 1.14, 1.26))
    assert all(curve.points[1.0] == Point(1.0, 1.0, 1.0, 1.0) for curve in curves)


def test_what_has_no_dial_is_a_single_point(write):
    plain, both = compare_report(), with_fixed(compare_report(), INT8=(0.25, 1.01), INT4=(0.18, 1.3))
    curves = {curve.name: curve for curve in read_quality([write("a", both), write("b", with_fixed(plain, INT8=(0.25, 1.01)))])}
    assert [name for name, curve in curves.items() if curve.fixed] == ["INT8", "INT4"]
    assert curves["INT8"].control and curves["INT8"].points == {0.25: pytest.approx(Point(0.25, 1.01, 1.0, 1.02))}
    assert [curve for curve in curves.values() if not curve.fixed] == read_quality([write("c", plain)])


def test_budgets_may_come_from_several_files(write):
    whole = read_quality([write("a", compare_report((0.8, 0.6, 0.5)))])
    assert read_quality([write("b", compare_report((0.8, 0.6))), write("c", compare_report((0.6, 0.5)))]) == whole


def test_files_that_do_not_belong_together_are_refused(write):
    one = write("one", compare_report())
    with pytest.raises(ValueError, match="one and .*two are of different windows"):
        read_quality([one, write("two", perplexity_report(windows_sha256="cd" * 32))])
    other = compare_report()
    other["rows"][1]["ratio"] = 1.3
    with pytest.raises(ValueError, match="three has other figures for 'plan' at budget 0.8"):
        read_quality([one, write("three", other)])


def test_a_control_can_be_highlighted(write):
    files = [write("a", compare_report())]
    assert not any(curve.control for curve in read_quality(files, ["static plan, no bridges"]))
    with pytest.raises(ValueError, match="highlight='mine' is not among the curves: 'plan', 'static plan, no bridges'"):
        read_quality(files, ["mine"])


def test_other_files_are_refused(write, tmp_path):
    with pytest.raises(ValueError, match="not a report of anee compare.*and not a report of anee perplexity"):
        read_quality([write("bench", bench_report())])
    with pytest.raises(ValueError, match="not a report of anee bench: it lacks tables"):
        read_speed(write("compare", compare_report()))
    with pytest.raises(ValueError, match="not a report of anee bench: its tables lack ratio_low"):
        read_speed(write("old", {"tables": {"decode": [{"case": "plain", "ratio": 1.0}]}}))
    with pytest.raises(OSError, match="gone"):
        read_quality([tmp_path / "gone"])


def test_speed_and_its_ceiling(write):
    first, ceiling, second = read_speed(write("bench", bench_report()))
    assert set(first.points) == {1.0, 0.51}
    assert first.points[0.51] == pytest.approx(Point(0.51, 1.8, 1.62, 1.98)) and not first.control
    assert "batch 1" in first.name and "batch 8" in second.name and second.points == first.points
    assert ceiling.control and ceiling.points[0.51].value == pytest.approx(1.2 / 0.6)
    assert ceiling.points[1.0].value == pytest.approx(1.2)


def test_the_base_in_one_precision_is_a_point_of_its_table(write):
    report = bench_report()
    uniform = {"ratio": 3.0, "ratio_low": 2.5, "ratio_high": 3.5, "mean_cost": 0.25, "weights_read": None}
    for title, case in zip(report["tables"], ("uniform INT8", "uniform INT4, INT8 head"), strict=True):
        report["tables"][title].append(uniform | {"case": case})
    first, ceiling, int8, second, int4 = read_speed(write("bench", report))
    assert (
        int8 == Curve("uniform INT8", {0.25: Point(0.25, 3.0, 2.5, 3.5)}, fixed=True) and int4.name == "uniform INT4, INT8 head"
    )
    assert [first, ceiling, second] == read_speed(write("plain", bench_report()))


def draw(path, curves, speed=()):
    """Pixels [H, W, 3] of the picture."""
    draw_budget_curve(curves, path, speed)
    assert path.read_bytes().startswith(b"\x89PNG") and len(path.read_bytes()) < 150_000
    return torch.from_numpy(image.imread(path)).float()[..., :3]


def rows_of(pixels, colour):
    """Lines of pixels that have a colour, from above, the legend's at the right left out."""
    found = (pixels - torch.tensor(to_rgb(colour))).abs().amax(dim=-1) < 0.02
    return found[:, : pixels.shape[1] // 2].any(dim=1).nonzero().flatten()


def line(*values, control=False, name="one"):
    """A curve over costs from 1 downwards."""
    points = {1 - i / 10: Point(1 - i / 10, value, value, value) for i, value in enumerate(values)}
    return Curve(name, points, control)


def test_a_value_that_explodes_does_not_crush_the_others(tmp_path):
    """The picture of the sensible curve is that at an edge of `MAX_RATIO`, however large the other values are."""
    sensible = line(1, 1.5, 2, 3, 4, 5)
    spans = []
    for value in (1.5 * MAX_RATIO, 15000.0):
        rows = rows_of(draw(tmp_path / "x.png", [sensible, line(1, 3, value, value, control=True, name="two")]), STRONG[0])
        spans.append((int(rows[0]), int(rows[-1])))
    assert len(set(spans)) == 1
    high, low = spans[0]
    assert low - high > 90  # pixels; of the whole range of 15,000 it would be some 40


def test_the_mark_at_the_edge_has_the_colour_of_its_curve(tmp_path):
    edge = [draw(tmp_path / "x.png", [line(1, 2, 3), line(1, 3, v, v, control=True)]) for v in (9.0, 5000.0)]
    top = rows_of(edge[1], PALE[0])[0]
    with_mark, without = (rows_of(pixels[: top + 4], PALE[0]) for pixels in edge[::-1])
    assert len(with_mark) > len(without)
    assert top < edge[1].shape[0] // 8


def test_a_point_without_a_dial_is_drawn_with_its_name_and_not_in_the_legend(tmp_path):
    """Ink right of a point, at its height; a longer name reaches further; lines keep their colours and marks."""
    sensible, ink = line(1, 1.5, 2, 3, 4, 5), []
    for name in ("", "name", "a long name"):
        point = Curve(name, {0.7: Point(0.7, 4.5, 4.5, 4.5)}, control=True, fixed=True)
        pixels = draw(tmp_path / "x.png", [point, sensible])
        ink.append(int((pixels.amax(dim=-1) < 0.45).sum()))
    assert ink[0] < ink[1] < ink[2]
    alone = draw(tmp_path / "y.png", [sensible])
    with_point = draw(tmp_path / "z.png", [Curve("n", {0.7: Point(0.7, 4.5, 4.5, 4.5)}, control=True, fixed=True), sensible])
    assert torch.equal(rows_of(with_point, STRONG[0]), rows_of(alone, STRONG[0]))


def test_a_point_without_a_dial_that_explodes_is_named_at_the_edge(tmp_path):
    sensible, ink = line(1, 1.5, 2, 3, 4, 5), []
    for name in ("n", "a long name"):
        point = Curve(name, {0.6: Point(0.6, 4000.0, 4000.0, 4000.0)}, control=True, fixed=True)
        top = draw(tmp_path / "x.png", [point, sensible])[:80]
        ink.append(int((top.amax(dim=-1) < 0.45).sum()))
    assert ink[1] > ink[0] + 50


def test_speed_is_drawn_beside_quality(tmp_path):
    one, both = draw(tmp_path / "a.png", [line(1, 2)]), draw(tmp_path / "b.png", [line(1, 2)], [line(1.2, 1.9)])
    alone = draw(tmp_path / "c.png", [], [line(1.2, 1.9)])
    assert both.shape[1] > 1.8 * one.shape[1] and one.shape == alone.shape
    with pytest.raises(ValueError, match="no curve to draw"):
        draw_budget_curve([], tmp_path / "d.png")
    assert not (tmp_path / "d.png").exists()


def test_error_bars_are_drawn(tmp_path):
    """A wide bar reaches further than the line; one without ends is no problem."""
    low, high = Point(0.8, 2.0, 1.9, 2.1), Point(0.8, 2.0, 1.2, 2.8)
    spans = []
    for point in (low, high, Point(0.8, 2.0, math.nan, math.nan)):
        points = {1.0: Point(1.0, 2.0, 2.0, 2.0), 0.8: point, 0.6: Point(0.6, 3.0, 3.0, 3.0), 0.5: Point(0.5, 1, 1, 1)}
        flat = draw(tmp_path / "x.png", [Curve("one", points)])
        column = flat[:, int(0.55 * flat.shape[1]) : int(0.75 * flat.shape[1])]
        spans.append(int(((column - torch.tensor(to_rgb(STRONG[0]))).abs().amax(dim=-1) < 0.3).sum()))
    assert spans[1] > spans[0] > spans[2]


@pytest.mark.parametrize("value", ["null", "NaN", "Infinity"])
def test_figures_that_are_no_numbers_are_refused(tmp_path, value):
    """As earlier versions and other tools write them."""
    report = json.dumps(compare_report()).replace("1264.2", value)
    (tmp_path / "a").write_text(report)
    with pytest.raises(ValueError, match=r"a has ratio=\w+ at name static plan, no bridges, budget 0.6: .* finite number"):
        read_quality([tmp_path / "a"])
    (tmp_path / "b").write_text(json.dumps(bench_report()).replace("1.8", value, 1))
    with pytest.raises(ValueError, match=r"b has ratio=\w+ at case budget 0.5"):
        read_speed(tmp_path / "b")


def test_the_error_of_a_single_window_is_not_known(write):
    report = compare_report()
    report["rows"][1]["standard_error"] = None
    assert math.isnan(read_quality([write("a", report)])[0].points[0.8].low)
    assert quality(report)[0].points[0.8].value == pytest.approx(1.2)


def anee(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_verb_draws_from_files(write, tmp_path):
    output = tmp_path / "curve.png"
    files = ("--figures", write("a", compare_report()), "--figures", write("b", perplexity_report()))
    done = anee("curve", *files, "--bench", write("c", bench_report()), "--output", output)
    assert done.exit_code == 0 and f"curve: {output}" in done.stdout, done.output
    assert image.imread(output).shape[1] > 1000
    assert json.loads((tmp_path / "a").read_text())  # read, not moved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --figures, --bench or both"),
        (["--figures", "no_such_file"], "no_such_file"),
        (["--bench", __file__], "not a report of anee bench"),
        (["--bench", __file__, "--output", "no/such/folder/x.png"], "--output no/such/folder"),
    ],
)
def test_errors_of_the_verb(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = anee("curve", *arguments)
    assert done.exit_code == 1 and message in done.stderr and "Traceback" not in done.output
    assert not (tmp_path / "anee_curve.png").exists()
