"""`anee deadline`: prompts against a deadline while the machine becomes slower, by a clock that only work moves."""

import json

import pytest
from matplotlib import image

from modeling_anee.evaluation.deadlines import FIXED, FOLLOWS, PROMPTS, OtherProcesses, as_text, measure
from modeling_anee.pictures.budget_path import draw_budget_path

from .clocks import passes_with_cost
from .tiny import token_ids, wrap


NEW = 40


class Slowing:
    """A machine on which a token takes 0.3 seconds and as many as it costs, and twice as long while others are busy."""

    def __init__(self):
        self.now, self.factor, self.begun = 0.0, 1.0, []

    def run(self, cost):
        self.now += (0.3 + cost) * self.factor

    def begin(self):
        self.factor = 2.0
        self.begun.append(self.now)

    def end(self):
        self.factor = 1.0


@pytest.fixture
def machine(monkeypatch):
    made = Slowing()
    passes_with_cost(monkeypatch, lambda: made.now, lambda cost: made.run(float(cost[:, -1].mean())))
    return made


@pytest.fixture
def report(machine):
    model = wrap(keep_first_tokens=0, precisions=["int8", "int4"])
    prompts = [{"input_ids": token_ids(1, 5, seed=seed)} for seed in range(3)]
    return measure(model, prompts, NEW, machine)


def test_a_deadline_is_kept_where_a_fixed_budget_is_late(report, machine):
    assert report["deadline"] == pytest.approx(1.2 * 1.3 * NEW)
    follows, fixed = report["ways"]
    assert (follows["way"], follows["kept"], follows["of"]) == (FOLLOWS, 3, 3) and follows["cost"] < fixed["cost"] == 1.0
    assert (fixed["way"], fixed["kept"]) == (FIXED, 0) and fixed["earliest"] > 0.05
    assert len(machine.begun) == 6 and machine.factor == 1.0
    for row in report["rows"]:
        assert len(row["times"]) == len(row["budgets"]) == NEW and row["times"] == sorted(row["times"])
        assert row["disturbed"] == pytest.approx(report["deadline"] / 2, abs=1.4)
        assert row["seconds"] == row["times"][-1] == pytest.approx(report["deadline"] * (1 + row["late"]))
        assert set(row["budgets"]) == {1.0} if row["way"] == FIXED else len(set(row["budgets"])) > 3


def test_the_figures_are_told_and_drawn(report, tmp_path):
    text = as_text(report)
    assert "| deadline | 3 of 3 |" in text and "| budget 1.0 | 0 of 3 |" in text and "\n| 3 | " in text
    draw_budget_path(report, tmp_path / "path.png")
    assert image.imread(tmp_path / "path.png").ndim == 3
    json.dumps(report, allow_nan=False)


def test_there_are_twenty_prompts():
    assert len(set(PROMPTS)) == 20


def test_other_processes_end_with_their_context():
    with OtherProcesses(2) as others:
        others.begin()
        others.end()
    assert [process.returncode for process in others._processes] == [0, 0]
