"""When rows leave a classifier: scores of the rules against their definitions, settings for budgets, bad values."""

import pytest
import torch

from modeling_anee.configuration_classifier import DEFAULTS, completed
from modeling_anee.exit_rules import NEVER, exit_scores, exits_of, leaves, settings_for

from .tiny import LAYERS


# Three heads, two classes: the third agrees with the first only.
PROBABILITIES = torch.tensor([[[0.6, 0.4], [0.3, 0.7], [0.8, 0.2]], [[0.4, 0.6], [0.1, 0.9], [0.05, 0.95]]])
REACHED = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
DIALS = {
    "confidence": {"budgets": [0.25, 0.75], "settings": [[0.5, 0.6], [0.9, 1.0]]},
    "patience": {"budgets": [0.25, 0.5], "settings": [[0, 0], [1, 1]]},
}


class Config:
    classifier = {"dials": DIALS}
    energy_budget, exit_rule, confidence_threshold, patience = 0.5, "confidence", None, None


def asked(**given):
    return exits_of(
        Config(), REACHED, 2, dict.fromkeys(("energy_budget", "exit_rule", "confidence_threshold", "patience")) | given
    )


def test_scores_are_what_the_rules_say():
    assert exit_scores("confidence", PROBABILITIES).tolist() == pytest.approx([0.8, 0.95])
    assert exit_scores("patience", PROBABILITIES).tolist() == [0.0, 2.0]
    assert exit_scores("agreement", PROBABILITIES).tolist() == pytest.approx([0.8 * 1.4 / 2.1, 0.95])


def test_a_threshold_of_one_keeps_all_and_a_patience_of_nought_none():
    assert not leaves("confidence", torch.ones(2), torch.ones(2)).any()
    assert leaves("confidence", torch.tensor([0.5]), torch.tensor([0.4])).all()
    assert leaves("patience", torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0])).tolist() == [True, False]


def test_settings_are_the_dearest_that_a_budget_affords():
    budgets = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9, 1.0], dtype=torch.float64)
    half, most, never = [0.5, 0.6], [0.9, NEVER], [NEVER, NEVER]
    assert settings_for("confidence", budgets, DIALS, REACHED).tolist() == [[-1, -1], half, half, most, most, never]
    assert settings_for("patience", budgets, DIALS, REACHED).tolist() == [[-1, -1], [0, 0], [1, 1], [1, 1], [1, 1], never]
    first, second = [-1, -1], [NEVER, -1]
    assert settings_for("fixed", budgets, {}, REACHED).tolist() == [first, first, second, second, second, never]


def test_arguments_come_before_the_configuration():
    assert asked().settings.tolist() == [[0.5, 0.6]] * 2
    assert asked(energy_budget=[0.25, 1.0]).settings.tolist() == [[0.5, 0.6], [NEVER, NEVER]]
    assert asked(confidence_threshold=0.6).settings.tolist() == [[0.6, 0.6]] * 2
    assert asked(confidence_threshold=1.0).settings.tolist() == [[NEVER, NEVER]] * 2
    found = asked(patience=2)
    assert (found.rule, found.settings.tolist()) == ("patience", [[2, 2]] * 2)
    assert asked(exit_rule="agreement", confidence_threshold=0.6).rule == "agreement"
    assert asked(exit_rule="fixed", energy_budget=0.5).leave(1, PROBABILITIES[:, :1]).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"energy_budget": 1.2}, "energy_budget=1.2"),
        ({"energy_budget": [0.5, 0.5, 0.5]}, "2 rows"),
        ({"energy_budget": torch.ones(2, 3)}, "one for each row"),
        ({"exit_rule": "luck"}, "exit_rule='luck'"),
        ({"exit_rule": "agreement"}, "not calibrated"),
        ({"confidence_threshold": -0.1}, "confidence_threshold=-0.1"),
        ({"confidence_threshold": True}, "confidence_threshold=True"),
        ({"confidence_threshold": 0.5, "exit_rule": "patience"}, "not allowed with exit_rule='patience'"),
        ({"patience": 1.5}, "patience=1.5"),
        ({"patience": 1, "exit_rule": "fixed"}, "not allowed with exit_rule='fixed'"),
        ({"patience": 1, "energy_budget": 0.5}, "patience and energy_budget exclude each other"),
        ({"patience": 1, "confidence_threshold": 0.5}, "exclude each other"),
    ],
)
def test_bad_arguments_are_named(given, said):
    with pytest.raises(ValueError) as raised:
        asked(**given)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("classifier", "said"),
    [
        ([1, 4], "classifier=[1, 4]"),
        ({"layer": [4]}, "did you mean 'layers'"),
        ({"layers": [2]}, "of which the last is 4"),
        ({"layers": [2, 2, 4]}, "classifier.layers=[2, 2, 4]"),
        ({"layers": [0, 4]}, "classifier.layers=[0, 4]"),
        ({"pooling": "max"}, "classifier.pooling='max'"),
        ({"hidden_size": -1}, "classifier.hidden_size=-1"),
        ({"precision": "int8"}, "classifier.precision='int8'"),
        ({"dials": {"luck": {}}}, "'luck'"),
        ({"dials": {"confidence": {"budgets": [0.5], "settings": []}}}, "of one length"),
        ({"dials": {"confidence": {"budgets": [0.5, 0.4], "settings": [[0.1] * 3] * 2}}}, "must be ascending"),
        ({"dials": {"confidence": {"budgets": [0.5, 1.4], "settings": [[0.1] * 3] * 2}}}, "1.4"),
        ({"dials": {"confidence": {"budgets": [0.5], "settings": [[0.1] * 4]}}}, "it must be 3 numbers, one a head"),
    ],
)
def test_a_bad_classifier_is_named(classifier, said):
    with pytest.raises(ValueError) as raised:
        completed(classifier, LAYERS, [])
    assert said in str(raised.value)


def test_what_is_left_open_is_filled_in():
    assert completed({}, 30, [])["layers"] == list(range(2, 31, 2))
    assert completed({}, LAYERS, []) == {"layers": [1, 2, 3, 4], "dials": {}, **DEFAULTS}
