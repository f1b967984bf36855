"""Replayed exits are those of the model; calibration: temperatures, dials that keep budgets, expected calibration error."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from modeling_anee.configuration_classifier import EXIT_RULES
from modeling_anee.evaluation.classification import as_text, exits_at, report
from modeling_anee.evaluation.classifier_time import measure, spread, times_as_text
from modeling_anee.evaluation.early_exits import (
    HeadLogits,
    batches,
    calibration_bins,
    expected_calibration_error,
    head_logits,
    outcome,
    replay,
)
from modeling_anee.pictures.classifier import draw_accuracy, draw_reliability
from modeling_anee.training.classifier_calibration import calibrate, optimal_thresholds, temperature

from .test_sequence_classification import classifier
from .tiny import LAYERS, VOCABULARY, token_ids


def some_rows(count: int = 60, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def calibrated():
    """A classifier with dials, and what its heads say of the rows that they are for."""
    model, rows = classifier(), some_rows()
    labels = [row[0] % 3 for row in rows]
    calibrate(model, head_logits(model, rows, labels, batch_size=5))
    return model, rows, head_logits(model, rows, labels, batch_size=7)


def run(model, rows, **setting):
    """Exits, answers and total cost of rows, run by the model in batches."""
    exits, answers, spent = torch.zeros(len(rows), dtype=torch.long), torch.zeros(len(rows), 3), 0.0
    for places, ids, mask in batches(rows, 8):
        output = model(ids, mask, **setting)
        exits[places], answers[places] = output.exits, output.logits.detach()
        spent += float(output.execution.cost.double().sum())
    return exits, answers, spent / sum(map(len, rows))


@pytest.mark.parametrize("rule", EXIT_RULES)
@pytest.mark.parametrize("budget", [0.3, 0.55, 0.8, 1.0])
def test_replayed_exits_are_those_of_the_model(calibrated, rule, budget):
    model, rows, said = calibrated
    places = exits_at(model, rule, said, budget)
    exits, answers, cost = run(model, rows, exit_rule=rule, energy_budget=budget)
    assert torch.equal(places + 1, exits)
    expected = said.logits[torch.arange(len(rows)), places]
    torch.testing.assert_close(answers, expected, atol=1e-4, rtol=1e-4)
    assert outcome(said, places, model.exit_costs).cost == pytest.approx(cost, abs=1e-5)


@pytest.mark.parametrize("rule", EXIT_RULES)
def test_budgets_are_kept_and_more_of_it_is_never_worse_on_the_rows_of_the_calibration(calibrated, rule):
    model, _, said = calibrated
    budgets = [0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9]
    found = [outcome(said, exits_at(model, rule, said, budget), model.exit_costs) for budget in budgets]
    floor = found[0].cost
    assert all(one.cost <= max(budget, floor) + 1e-6 for one, budget in zip(found, budgets, strict=True))
    for values in ([one.cost for one in found], [one.accuracy for one in found[1:]]):
        assert values == sorted(values)


def test_thresholds_are_those_of_the_least_errors_and_cost():
    """Two heads: the best threshold is found by trying all, for any price."""
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(40, 2, generator=generator, dtype=torch.float64)
    right = (torch.rand(40, 2, generator=generator) < torch.stack((scores[:, 0], torch.full((40,), 0.8)), dim=1)).double()
    costs, tokens = type("Costs", (), {"reached": torch.tensor([0.5, 1.0])}), torch.ones(40)
    for price in (0.0, 0.1, 0.5, 3.0):

        def loss(threshold, price=price):
            leave = scores[:, 0] > threshold
            return float(torch.where(leave, 1 - right[:, 0], 1 - right[:, 1] + price * 0.5).sum())

        (found,) = optimal_thresholds(scores, right, tokens, costs, price).tolist()
        tried = [-1.0, *scores[:, 0].tolist(), 1.0]
        assert loss(found) == pytest.approx(min(map(loss, tried)))


def test_calibrating_again_changes_nothing(calibrated):
    model, _, said = calibrated
    before, temperatures = model.config.classifier["dials"], model.heads.temperature.clone()
    assert len(temperatures.unique()) > 1
    calibrate(model, said)
    torch.testing.assert_close(model.heads.temperature, temperatures, atol=1e-4, rtol=1e-4)
    assert {rule: len(dial["budgets"]) for rule, dial in before.items()} == {
        rule: len(dial["budgets"]) for rule, dial in model.config.classifier["dials"].items()
    }


def test_a_temperature_is_that_of_the_least_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (4000,), generator=generator)
    honest = torch.stack((-(labels * 2.0 - 1), labels * 2.0 - 1), dim=1) + torch.randn(4000, 2, generator=generator)
    found = temperature(3 * honest, labels)
    assert found == pytest.approx(3 * temperature(honest, labels), rel=1e-3)
    for other in (0.9 * found, 1.1 * found):
        assert cross_entropy(3 * honest / found, labels) < cross_entropy(3 * honest / other, labels)


def test_calibration_errors_of_what_is_known():
    right = torch.tensor([0.0, 1.0]).repeat(50, 1)  # confidence 0.731, always right
    said = HeadLogits(right.unsqueeze(1), torch.ones(50, dtype=torch.long), torch.ones(50, dtype=torch.long))
    assert expected_calibration_error(said, 0) == pytest.approx(1 - 1 / (1 + torch.e**-1), abs=1e-6)
    ((confidence, accuracy, count),) = calibration_bins(said, 0)
    assert (accuracy, count) == (1.0, 50) and confidence == pytest.approx(0.7311, abs=1e-4)


def test_exits_at_random_are_worth_the_mean_of_their_heads():
    logits = torch.zeros(4, 2, 2)
    logits[:2, 0, 1] = 1.0  # the first head is right about half of the rows, the second about all
    logits[:, 1, 1] = 1.0
    said = HeadLogits(logits, torch.ones(4, dtype=torch.long), torch.full((4,), 3))
    costs = classifier().exit_costs
    costs = type(costs)(costs.layers[[0, -1]], costs.heads[[0, -1]])
    found = outcome(said, replay("confidence", said.scores("confidence"), torch.tensor([0.6])), costs)
    assert found.accuracy == 1.0 and found.shuffled == pytest.approx(0.75) and found.used == [0.5, 0.5]


def test_the_report_has_tables_and_pictures(calibrated, tmp_path):
    model, rows, said = calibrated
    figures = report(model, said, [1.0, 0.5])
    text = as_text(figures)
    assert text.count("\n| ") == 2 + 8 + LAYERS and "| fixed | 0.5 |" in text
    assert [head["layers"] for head in figures["heads"]] == [1, 2, 3, 4]
    draw_accuracy(figures, tmp_path / "curve.png")
    draw_reliability(figures, tmp_path / "reliability.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("curve.png", "reliability.png"))


def test_times_have_every_way_to_leave_once_and_the_plain_base(calibrated, tmp_path):
    model, rows, said = calibrated
    budgets = [0.999, 0.5, 0.4999, 0.25]
    counted = []
    found = measure(model, rows[:4], budgets, batch_size=2, repeats=1, done=counted.append)
    assert [(row["rule"], row["budget"]) for row in found][:2] == [("plain base", 1.0), ("confidence", 1.0)]
    assert {row["rule"] for row in found[2:]} == {"confidence", "fixed"} and len(counted) == 2 * len(found)
    fixed = [row["budget"] for row in found if row["rule"] == "fixed"]
    layers = [model(token_ids(1, 4), exit_rule="fixed", energy_budget=budget).exits.item() for budget in fixed]
    assert layers == sorted(set(layers), reverse=True) and len(fixed) < len(budgets) and fixed[-1] == 0.25
    assert all(row["milliseconds"] > 0 and row["speedup"] > 0 for row in found)
    figures = report(model, said, budgets) | {"seconds": found}
    text = times_as_text(found, figures["rows"], figures["last"])
    assert text.count("\n") == 1 + len(found) and "| plain base | 1 |" in text
    draw_accuracy(figures, tmp_path / "times.png")
    assert (tmp_path / "times.png").stat().st_size > 5000


def test_rows_that_are_timed_have_all_lengths():
    rows = [[0] * length for length in (9, 1, 5, 3, 7, 2, 8, 4, 6)]
    assert [len(rows[place]) for place in spread(rows, 3)] == [2, 5, 8]
    assert sorted(spread(rows, 100)) == list(range(9))
