"""`anee-pool.json`: what is written is read back; what is not allowed is named with what is."""

import json

import pytest

from modeling_anee.pool.config import (
    FILE_NAME,
    Cascade,
    Fuzzy,
    Gate,
    Layer,
    Measured,
    PoolConfig,
    RungConfig,
    find_config,
    read_config,
)
from modeling_anee.pool.making import parse_rung
from modeling_anee.pool.rules import LEVELS, parse_rule


CORNERS = {"LOW": (0.0, 0.0, 1.0, 2.0), "MEDIUM": (1.0, 2.0, 2.0, 3.0), "HIGH": (2.0, 3.0, 4.0, 4.0)}
RULE = "IF (digits IS HIGH) OR (perplexity IS HIGH) THEN (complexity IS HIGH)"


def config(**fields):
    rungs = [RungConfig(name="small", model="a"), RungConfig(name="large", model="b", energy_budget=0.5)]
    cost = {"bytes_per_text_byte": 1.0, "losses": {}}
    measured = {
        "small": Measured(bytes_per_token=1.0, most_bytes_per_token=2.0, loss=1.0, **cost),
        "large": Measured(bytes_per_token=4.0, most_bytes_per_token=4.0, loss=0.5, **cost),
    }
    return PoolConfig(**({"rungs": rungs, "measured": measured, "glance": "small"} | fields))


def fuzzy(**fields):
    variables = {"perplexity": CORNERS, "digits": CORNERS}
    return Fuzzy(**({"variables": variables, "rules": [RULE], "rungs": dict.fromkeys(LEVELS, "small")} | fields))


def gate(**fields):
    layer = Layer(weight=[[1.0], [-1.0]], bias=[0.0, 0.5])
    names = {"rungs": ["small", "large"], "features": ["digits"]}
    return Gate(**({"price": 0.1, "mean": [0.0], "scale": [1.0], "layers": [layer]} | names | fields))


def test_what_is_written_is_read_back(tmp_path):
    whole = config(
        fuzzy=fuzzy(), learned=[gate()], mixture=[gate()], cascade=Cascade(cheap="small", dear="large", threshold=0.5)
    )
    path = whole.save(tmp_path)
    assert path == tmp_path / FILE_NAME and read_config(path) == whole
    assert find_config(tmp_path) == find_config(path) == path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "best"}, "policy: Input should be 'energy'"),
        ({"glance": "huge"}, "there is no rung 'huge': the rungs are small, large"),
        ({"code": "print(1)"}, "code: Extra inputs are not permitted"),
        ({"format": 2}, "format: Input should be 1"),
        ({"cascade": {"cheap": "small", "dear": "huge", "threshold": 0.5}}, "there is no rung 'huge'"),
    ],
)
def test_what_is_not_allowed_is_named(tmp_path, change, message):
    fields = json.loads(config().model_dump_json()) | change
    (tmp_path / FILE_NAME).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="anee-pool.json") as raised:
        read_config(tmp_path / FILE_NAME)
    assert message in str(raised.value)


def test_what_is_no_json_and_what_is_not_there(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"\x80\x04cpickle")
    with pytest.raises(ValueError, match="Invalid JSON"):
        read_config(tmp_path / FILE_NAME)
    with pytest.raises(FileNotFoundError, match="a pool is a folder with anee-pool.json in it"):
        find_config(tmp_path / "nowhere")


def test_a_rung_has_a_plan_or_a_budget_and_a_name_of_its_own():
    with pytest.raises(ValueError, match="has a plan and an energy_budget: give one of them"):
        RungConfig(name="a", model="m", plan="4*INT8", energy_budget=0.5)
    with pytest.raises(ValueError, match="two rungs are called 'a'"):
        PoolConfig(rungs=[RungConfig(name="a", model="m"), RungConfig(name="a", model="n")])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("__import__('os').system('true')", "it must be like"),
        ("IF (digits IS HIGH) THEN (complexity IS __import__)", "it must be like"),
        ("IF (digits IS HIGH) eval (code IS HIGH) THEN (complexity IS HIGH)", "joined by AND or by OR alone"),
        ("IF (digits IS HIGH) AND (digits IS LOW) OR (digits IS LOW) THEN (complexity IS HIGH)", "by AND or by OR alone"),
        ("IF (code IS HIGH) THEN (complexity IS HIGH)", "speaks of 'code': the variables are digits"),
        ("IF (digits IS HUGE) THEN (complexity IS HIGH)", "has the level 'HUGE': it must be one of LOW, MEDIUM, HIGH"),
    ],
)
def test_a_rule_can_say_nothing_but_what_the_grammar_has(rule, message):
    with pytest.raises(ValueError, match="rule") as raised:
        parse_rule(rule, ["digits"])
    assert message in str(raised.value)


def test_a_rule_is_taken_apart():
    assert parse_rule(RULE, ["digits", "perplexity"]) == ([("digits", "HIGH"), ("perplexity", "HIGH")], "OR", "HIGH")


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (fuzzy, {"variables": {"mood": CORNERS}}, "variable 'mood' is not allowed"),
        (fuzzy, {"variables": {"digits": CORNERS | {"LOW": (1.0, 0.0, 0.0, 0.0)}}}, "must not fall"),
        (fuzzy, {"cuts": (0.7, 0.3)}, "the lower one first"),
        (fuzzy, {"rungs": {"LOW": "small"}}, "it must have LOW, MEDIUM, HIGH"),
        (gate, {"scale": [0.0]}, "every number must be above 0"),
        (gate, {"mean": [0.0, 1.0]}, "has layers of other sizes"),
        (gate, {"features": ["mood"]}, "it must be among length"),
    ],
)
def test_settings_of_policies_are_checked(make, fields, message):
    with pytest.raises(ValueError, match="Value error") as raised:
        make(**fields)
    assert message in str(raised.value)


def test_rungs_as_the_command_names_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "a").mkdir(parents=True)
    found = parse_rung("one=models/a@0.16!", tmp_path / "pool", "float32")
    assert (found.model, found.energy_budget, found.strict, found.plan) == ("../models/a", 0.16, True, None)
    found = parse_rung("two=org/name@4*INT8 / int8", tmp_path / "pool", "auto")
    assert (found.model, found.energy_budget, found.strict, found.plan) == ("org/name", None, False, "4*INT8 / int8")
    assert parse_rung("three=org/name", tmp_path, "auto").energy_budget is None
    for wrong in ("name", "=model", "a b=model", "name=model@"):
        with pytest.raises(ValueError, match="NAME=MODEL@BUDGET"):
            parse_rung(wrong, tmp_path, "auto")
