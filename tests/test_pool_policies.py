"""Policies and how they are fitted: gates are what scikit-learn says, rules what their text says, choices explained."""

import math

import numpy as np
import pytest

from modeling_anee.pool.complexity import ComplexityPolicy, fuzzy_system
from modeling_anee.pool.config import Cascade, Measured
from modeling_anee.pool.features import FEATURES, Glance, features_of
from modeling_anee.pool.fitting import (
    fit_cascade,
    fit_fuzzy,
    fit_learned,
    fit_mixture,
    front,
    levels_of,
    objective,
    standardised,
)
from modeling_anee.pool.gates import GatePolicy, chances, gate_at
from modeling_anee.pool.measuring import Sample, summarise
from modeling_anee.pool.policies import CascadePolicy, Case, EnergyPolicy, FixedPolicy
from modeling_anee.pool.rules import LEVELS
from modeling_anee.pool.rungs import Outcome

from .test_pool_config import CORNERS, RULE, fuzzy, gate


NAMES = ("small", "large")


def sample(number, digits, small, large):
    """A text with so many digits, and the bits that two rungs need for its 10 bytes."""
    text = "word " * 5 + "7" * digits
    glance = Glance(0.5 + 0.1 * number, 6, 5.0)
    outcomes = {
        name: Outcome(loss, work, 10, confidence, work / 10, glance)
        for name, loss, work, confidence in (("small", small, 100.0, 1 / small), ("large", large, 400.0, 0.9))
    }
    return Sample(text, "text", 10, 50, outcomes)


@pytest.fixture
def samples():
    """Where there are digits the large rung is far better; elsewhere the small one is a little."""
    return [sample(i, 20 * (i % 2), 30.0 if i % 2 else 10.0, 10.0 if i % 2 else 11.0) for i in range(20)]


def case(samples, place=0, rungs=NAMES):
    one = samples[place]
    return Case(one.text, list(rungs), summarise(samples), lambda: one.outcomes["small"].glance)


def test_features_say_what_they_mean():
    found = features_of("ab {c} 12\n34", Glance(1.5, 9, 0.0))
    assert tuple(found) == FEATURES
    assert found == {"length": 4, "rarity": 9 / 4, "perplexity": 1.5, "digits": 4 / 12, "code": 2 / 12}
    assert all(math.isfinite(value) for value in features_of("", Glance(0.0, 0, 0.0)).values())


def test_the_prompt_is_looked_at_only_by_policies_that_ask(samples):
    looked = []
    seen = case(samples)
    seen.take_look = lambda: looked.append(1) or samples[0].outcomes["small"].glance
    EnergyPolicy().choose(seen), FixedPolicy("small").choose(seen), CascadePolicy(cascade()).choose(seen)
    assert not looked
    policy = GatePolicy(gate())
    policy.choose(seen), policy.choose(seen)
    assert looked == [1]


def cascade(threshold=0.5):
    return Cascade(cheap="small", dear="large", threshold=threshold)


def test_energy_takes_the_least_loss_and_the_cheaper_of_equals(samples):
    assert EnergyPolicy().choose(case(samples)).rung == "large"
    assert EnergyPolicy().choose(case(samples, rungs=["small"])).rung == "small"
    equal = [sample(i, 0, 10.0, 10.0) for i in range(3)]
    assert EnergyPolicy().choose(case(equal)).rung == "small"


def test_another_rung_stands_in_the_next_dearer_one_or_else_the_next_cheaper(samples):
    measured = {name: Measured(bytes_per_token=cost, most_bytes_per_token=cost, bytes_per_text_byte=1, loss=1, losses={})
                for name, cost in (("a", 1.0), ("b", 2.0), ("c", 3.0))}  # fmt: skip
    assert Case("", ["a", "c"], measured, None).nearest("b") == "c"
    assert Case("", ["a"], measured, None).nearest("b") == "a"
    assert Case("", ["a", "b"], measured, None).nearest("b") == "b"


def test_a_cascade_goes_on_below_the_threshold_if_the_dear_rung_may_serve(samples):
    policy = CascadePolicy(cascade())
    assert policy.choose(case(samples)).rung == "small"
    assert policy.reconsider(case(samples), 0.5) is None
    assert policy.reconsider(case(samples), 0.49).rung == "large"
    assert policy.reconsider(case(samples, rungs=["small"]), 0.1) is None


def test_learned_is_what_scikit_learn_says(samples):
    linear_model = pytest.importorskip("sklearn.linear_model")
    fitted = fit_learned(samples, "small", NAMES, 0.1)
    inputs, _, _ = standardised(samples, "small")
    values = objective(samples, NAMES, 0.1)
    weights = values.mean(axis=1) - values.min(axis=1)
    reference = linear_model.LogisticRegression(max_iter=2000).fit(inputs, values.argmin(axis=1), weights / weights.mean())
    for one, expected in zip(samples, reference.predict_proba(inputs), strict=True):
        found = chances(fitted, features_of(one.text, one.outcomes["small"].glance))
        assert list(found.values()) == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("fit", [fit_learned, fit_mixture])
def test_gates_find_where_the_dear_rung_pays(samples, fit):
    policy = GatePolicy(fit(samples, "small", NAMES, 0.1))
    assert [policy.choose(case(samples, i)).rung for i in range(20)] == ["small", "large"] * 10
    dear = GatePolicy(fit(samples, "small", NAMES, 1000.0))  # nothing is worth that
    assert {dear.choose(case(samples, i)).rung for i in range(20)} == {"small"}
    assert fit(samples, "small", NAMES, 0.1) == fit(samples, "small", NAMES, 0.1)


def test_a_gate_chooses_among_those_that_may_serve_and_the_nearest_price_counts(samples):
    choice = GatePolicy(gate()).choose(case(samples, rungs=["small"]))
    assert choice.rung == "small" and set(choice.figures["gate"]) == set(NAMES) and "gate gives small" in choice.reason
    assert gate_at([gate(price=0.1), gate(price=1.0)], 0.3).price == 0.1


def test_what_lies_far_out_says_no_more_than_what_lies_out():
    features = dict.fromkeys(FEATURES, 0.0)
    near, far = (chances(gate(), features | {"digits": value}) for value in (3.0, 1000.0))
    assert near == far != chances(gate(), features | {"digits": 2.0})


def test_gates_dont_see_how_long_the_prompts_were_cut(samples):
    assert "length" not in fit_learned(samples, "small", NAMES, 0.1).features
    assert "length" not in fit_mixture(samples, "small", NAMES, 0.1).features


def test_levels_meet_at_their_crossings_also_of_features_that_are_mostly_zero():
    for values in (np.arange(100.0), np.zeros(50), np.r_[np.zeros(90), 1.0]):
        levels = levels_of(values)
        low, middle, high = (levels[level] for level in LEVELS)
        assert low[2:] == middle[:2] and middle[2:] == high[:2] and low[0] < low[2] < low[3] < high[1] < high[3]
        fitted = fuzzy(variables={"perplexity": CORNERS, "digits": levels})
        for value in np.linspace(low[2], high[1], 7):
            assert sum(memberships(fitted, "digits", float(value)).values()) == pytest.approx(1.0)


def memberships(config, feature, value):
    pytest.importorskip("simpful")
    return {level: float(strength) for level, strength in fuzzy_system(config)._lvs[feature].get_values(value).items()}


def test_rules_mean_what_their_text_says(samples, capsys):
    rules = [RULE, "IF (digits IS LOW) AND (perplexity IS LOW) AND (digits IS LOW) THEN (complexity IS LOW)"]
    config = fuzzy(rules=rules, rungs={"LOW": "small", "MEDIUM": "small", "HIGH": "large"})
    for perplexity, digits in ((0.0, 0.0), (1.4, 0.2), (2.3, 0.0), (0.0, 2.6), (4.5, 9.0)):
        seen = case(samples)
        seen.features = features_of("", Glance(0.0, 0, 0.0)) | {"perplexity": perplexity, "digits": digits}
        choice = ComplexityPolicy(config).choose(seen)
        low = min(memberships(config, "digits", digits)["LOW"], memberships(config, "perplexity", perplexity)["LOW"])
        high = max(memberships(config, "digits", digits)["HIGH"], memberships(config, "perplexity", perplexity)["HIGH"])
        assert choice.figures["complexity"] == pytest.approx(high / (low + high))
        fired = {rules[0]: high, rules[1]: low}
        assert choice.figures["rules"] == {rule: pytest.approx(strength) for rule, strength in fired.items() if strength}
        assert choice.rung == ("large" if high / (low + high) >= 2 / 3 else "small")
        assert choice.figures["level"] in choice.reason and "most of all by: IF" in choice.reason
    assert not capsys.readouterr().out


def test_where_no_rule_applies_a_request_is_medium(samples):
    pytest.importorskip("simpful")
    seen = case(samples)
    seen.features = dict.fromkeys(FEATURES, 0.0)
    choice = ComplexityPolicy(fuzzy(rungs={"LOW": "large", "MEDIUM": "small", "HIGH": "large"})).choose(seen)
    assert choice.rung == "small" and "no rule applies" in choice.reason


def test_default_rules_always_say_something(samples):
    config = fit_fuzzy(samples, "small", summarise(samples))
    assert set(config.variables) == set(FEATURES) and config.rungs["HIGH"] == "large"
    choice = ComplexityPolicy(config).choose(case(samples, 1))
    assert choice.figures["rules"] and choice.rung in NAMES


def test_the_front_has_what_is_worth_its_cost(samples):
    measured = summarise(samples)
    assert front(measured) == ["small", "large"]
    useless = measured["small"].model_copy(update={"bytes_per_text_byte": 100.0, "loss": measured["large"].loss * 0.999})
    assert front(measured | {"huge": useless}) == ["small", "large"]
    found = fit_cascade(samples, measured)
    assert (found.cheap, found.dear) == NAMES and found.others == sorted(found.others)
