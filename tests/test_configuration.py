"""Every field is checked, and a configuration survives being written, copied and changed."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, Cache
from transformers.utils.logging import warning_once

from modeling_anee import AneeConfig
from modeling_anee.actions import DEFAULT_TABLE, PROCESS, SKIP, SKIP_FFN, ActionTable
from modeling_anee.configuration_anee import (
    BASE_DTYPES,
    BUDGET_MODES,
    CONFIDENCE_METRICS,
    FORMAT_VERSION,
    check_budget,
)
from modeling_anee.configuration_calibration import COLUMNS
from modeling_anee.configuration_classifier import completed
from modeling_anee.configuration_gated import default_variants, strategic_layers, with_gated_rows
from modeling_anee.configuration_prices import COUNTED, PRICED
from modeling_anee.controller_kinds import CONTROLLER_CLASSES

from .tiny import CONFIGS, FAMILIES, LAYERS, VOCABULARY, tiny_base, token_ids, wrap


TEXT_CONFIGS = {family: CONFIGS[family]().to_dict() for family in FAMILIES}
NUMBER = "number between 0 and 1"
LAYER_LIST = f"list of different layers from 0 to {LAYERS - 1}"
BAD_BUDGETS = (-0.01, 1.01, float("nan"), float("inf"), "0.5", True, [0.5])
BAD_LAYERS = (5, "12", [0, 0], [LAYERS], [-1], [1.0], ["1"], [True], [[1]])
BAD_COUNTS = (-1, LAYERS + 1, 1.0, "1", True, None)

# What every field refuses, and what its message must say is allowed.
BAD = {
    "text_config": ((3, "llama", [1]), "dict"),
    "base_model_name_or_path": ((3, None, ["a"]), "string"),
    "base_model_revision": ((3, ["main"], True), "string"),
    "base_gguf_file": ((3, ["a.gguf"]), "string"),
    "base_fingerprint": ((3, None), "string"),
    "base_dtype": (("int8", "fp16", 3), "'float32', 'bfloat16', 'float16', 'float64'"),
    "strict_base": (("yes", None, 2, 1, 0), "True, False"),
    "energy_budget": ((*BAD_BUDGETS, None), NUMBER),
    "prompt_energy_budget": (BAD_BUDGETS, NUMBER),
    "controller": (("plans", "", None, 3, ["plan"]), ", ".join(map(repr, CONTROLLER_CLASSES))),
    "cost_unit": (("joule", None, 1), ", ".join(map(repr, (*COUNTED, *PRICED)))),
    "prices": ((3, []), "not allowed"),
    "decision_interval": ((0, -1, 1.0, "1", True, None), "integer from 1"),
    "min_layers": (BAD_COUNTS, f"integer from 0 to {LAYERS}"),
    "keep_last_layers": (BAD_COUNTS, f"integer from 0 to {LAYERS}"),
    "exit_budget_threshold": ((*BAD_BUDGETS, None), NUMBER),
    "skip_order": (BAD_LAYERS, LAYER_LIST),
    "plans": (([], "P" * LAYERS, 3, ["P"], ["P" * (LAYERS + 1)], ["P" * LAYERS, 3], [["P"] * LAYERS]), "must be a"),
    "actions": ((3, "PROCESS", [3]), "list of dicts"),
    "precisions": (("int8", 8, ["int3"], ["full"], ["int8", "int8"]), "list of different ones of"),
    "narrow": (("int8_half", 8, ["half"], ["int8_half"], ["full_half", "full_half"]), "list of different ones of ['full_half'"),
    "exit_layers": (BAD_LAYERS, LAYER_LIST),
    "confidence_metric": (("surprise", 3), ", ".join(map(repr, CONFIDENCE_METRICS))),
    "confidence_threshold": (BAD_BUDGETS, NUMBER),
    "classifier": ((4, [4], "last"), "it must be a dict of layers, pooling, hidden_size, precision, dials"),
    "exit_rule": (("luck", None, 1), "'confidence', 'agreement', 'patience', 'fixed'"),
    "patience": ((-1, 1.5, "2", True), "integer from 0"),
    "controller_hidden_sizes": ((8, "8", [0], [-1], [8.0], [True], [None]), "list of positive integers"),
    "budget_mode": (("mean", None, True), "'average', 'strict'"),
    **dict.fromkeys(
        ("keep_first_tokens", "bridge_rank", "ffn_bridge_rank", "exit_translator_rank"),
        ((-1, 1.0, "1", True, None), "integer from 0"),
    ),
    "bridge_layers": (BAD_LAYERS, LAYER_LIST),
    "ffn_bridge_layers": (BAD_LAYERS, LAYER_LIST),
    "controller_actions": (("SKIP", ["PROCESS"], ["skip"], [1], [None], [["SKIP"]], 3), "'SKIP', 'EXIT', 'SKIP_FFN'"),
    "calibration": ((3, [0.5], {}, {"settings": [1.0]}, {"budgets": 0.5}, {"budgets": [0.5], "price": [1.0]}), "'budgets'"),
    "budget_feedback": ((*BAD_BUDGETS, None), NUMBER),
    "router_budgets": ((0.5, "0.5", [], [0.5, 0.5], [1.5], [-0.1], ["a"], [True], [None]), "different numbers between 0 and 1"),
    "router_plans": ((0, [], [0], [-1], [True], ["a"]), "list of places in plans, which has 0"),
    "gated_variants": (
        (3, "full", [], ["full"], ["none", "full"], ["full", "full"], ["int8", "none"], [None]),
        "in this order",
    ),
    "refine_plans": (("PPPP", ["PPPP"], [3, 4]), "it must be a list of two plans"),
    "refine_from": ((-1, 1.5, 99, True), "refine_from"),
    "gated_head": ((3, "none", "int8", True, ["full"]), "must be one of ['full']"),
    "corrections": (
        (3, [3], {"qkv": 3}, {"qkv": [LAYERS, 2]}, {"head": [1, 2, 3]}, {"qkv": [LAYERS + 1, 2, 3]}, {"head": [0, 2]}),
        "must be a dict of lists",
    ),
    "orders": (
        (3, ["heads"], {"layers": [LAYERS, 2]}, {"heads": 3}, {"heads": [LAYERS + 1, 2]}, {"neurons": [LAYERS, 0]}),
        "must be a dict of lists",
    ),
    "drafts": (
        (3, [], {"plans": ["4*PROCESS"]}, {"plans": [], "drafted": [], "kept": []}),
        "must be a dict of lists of equal length",
    ),
    "format_version": ((0, -1, "1", 1.5, None, True), "integer from 1"),
}
CASES = [(field, value, allowed) for field, (values, allowed) in BAD.items() for value in values]


def config(family: str = "llama", **fields) -> AneeConfig:
    return AneeConfig(**({"text_config": TEXT_CONFIGS[family]} | fields))


def fields_of(configuration: AneeConfig) -> dict:
    return {name: getattr(configuration, name) for name in BAD if name != "text_config"}


@st.composite
def calibrations(draw) -> dict:
    budgets = sorted(draw(st.sets(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=4)))
    count = len(budgets)
    columns = st.lists(st.floats(-9, 9, allow_subnormal=False), min_size=count, max_size=count)
    table = {"budgets": budgets}
    if draw(st.booleans()):
        table["settings"] = sorted(draw(columns), reverse=draw(st.booleans()))
    for name in draw(st.lists(st.sampled_from(COLUMNS[2:]), unique=True)):
        table[name] = draw(columns)
    return table


def table_with_one_more() -> list[dict]:
    row = {"name": "HALF", "attention": "full", "feed_forward": "none"}
    return ActionTable.of([*DEFAULT_TABLE.stored(), row]).stored()


@st.composite
def good_fields(draw) -> dict:
    budget = st.floats(0, 1, allow_subnormal=False)
    layers = st.lists(st.integers(0, LAYERS - 1), unique=True)
    plan = st.lists(st.sampled_from([PROCESS, SKIP, SKIP_FFN]), min_size=LAYERS, max_size=LAYERS).map(DEFAULT_TABLE.text)
    choices = {
        "base_model_name_or_path": st.sampled_from(["", "org/name", "./base", "/tmp/ä b"]),
        "base_model_revision": st.sampled_from([None, "main"]),
        "base_gguf_file": st.sampled_from([None, "a.gguf"]),
        "base_fingerprint": st.sampled_from(["", "0123-4567"]),
        "base_dtype": st.sampled_from([None, *BASE_DTYPES]),
        "strict_base": st.booleans(),
        "energy_budget": budget,
        "prompt_energy_budget": st.none() | budget,
        "controller": st.sampled_from(list(CONTROLLER_CLASSES)),
        "cost_unit": st.sampled_from(COUNTED),
        "prices": st.none(),  # of other units, see test_configuration_prices.py
        "decision_interval": st.integers(1, LAYERS),
        "min_layers": st.integers(0, LAYERS),
        "keep_last_layers": st.integers(0, LAYERS),
        "exit_budget_threshold": budget,
        "skip_order": st.none() | layers,
        "actions": st.sampled_from([DEFAULT_TABLE.stored(), table_with_one_more()]),
        "precisions": st.sampled_from([[], ["int8"], ["int8", "int4"], ["int4", "int8"]]),
        "narrow": st.sampled_from([[], ["full_half"], ["full_half", "full_quarter"]]),
        "plans": st.none() | st.lists(plan, min_size=1, max_size=3),
        "exit_layers": st.none() | layers,
        "budget_mode": st.sampled_from(BUDGET_MODES),
        "keep_first_tokens": st.integers(0, 3),
        "bridge_rank": st.integers(0, 9),
        "bridge_layers": st.none() | layers,
        "ffn_bridge_rank": st.integers(0, 9),
        "ffn_bridge_layers": st.none() | layers,
        "exit_translator_rank": st.integers(0, 9),
        "controller_actions": st.lists(st.sampled_from(["SKIP", "SKIP_FFN", "EXIT"]), unique=True),
        "calibration": st.none() | calibrations(),
        "budget_feedback": budget,
        "confidence_metric": st.sampled_from(CONFIDENCE_METRICS),
        "confidence_threshold": budget,
        "classifier": st.sampled_from([None, completed({"layers": [1, LAYERS]}, LAYERS, [])]),
        "exit_rule": st.sampled_from(["confidence", "agreement"]),
        "patience": st.none(),  # excludes a threshold
        "controller_hidden_sizes": st.lists(st.integers(1, 64), max_size=3),
        "router_budgets": st.lists(budget, min_size=1, max_size=4, unique=True),
        "router_plans": st.none(),  # depends on plans, see test_other_dtype.py
        "corrections": st.none() | st.just({"qkv": [LAYERS, 2, 3], "head": [1, 2]}),
        "refine_plans": st.none() | st.lists(plan, min_size=2, max_size=2),
        "refine_from": st.none() | st.integers(0, LAYERS),
        "orders": st.none() | st.just({"neurons": [LAYERS, 48], "heads": [LAYERS, 2]}),
        "drafts": st.none() | st.just({"plans": [f"{LAYERS}*SKIP"], "drafted": [[2.0] * 8], "kept": [[1] * 8]}),
        "format_version": st.just(FORMAT_VERSION),
    }
    fields = {name: draw(strategy) for name, strategy in choices.items()}
    variants = st.lists(st.sampled_from(["full", *fields["precisions"], "none"]), min_size=2, unique=True)
    order = ["full", *fields["precisions"], "none"].index
    fields["gated_variants"] = draw(st.none() | variants.map(lambda names: sorted(names, key=order)))
    fields["gated_head"] = draw(st.sampled_from([None, "full", *fields["precisions"]]))
    return fields | ({"budget_feedback": 0.0} if fields["budget_mode"] == "strict" else {})


def test_the_table_of_bad_values_covers_every_field():
    assert set(BAD) == {name for name in AneeConfig.__annotations__ if not name.startswith("_")} - {
        "keys_to_ignore_at_inference"
    }


@pytest.mark.parametrize(("field", "value", "allowed"), CASES, ids=[f"{field}={value!r}" for field, value, _ in CASES])
def test_a_bad_value_is_named_with_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError) as caught:
        config(**{field: value})
    message = str(caught.value)
    bad = value[-1] if field == "plans" and isinstance(value, list) and value else value
    assert field in message and repr(bad) in message and allowed in message, message


@pytest.mark.parametrize(("plan", "reason"), [("PXPP", "unknown action"), ("PEPP", "goes on after a layer")])
def test_a_bad_plan_is_named(plan, reason):
    with pytest.raises(ValueError, match=f"plan '{plan}'.*{reason}"):
        config(plans=["P" * LAYERS, plan])


@pytest.mark.parametrize("field", [name for name in BAD if name not in ("text_config", "format_version")])
def test_check_finds_what_was_changed_by_hand(field):
    configuration = config()
    setattr(configuration, field, BAD[field][0][0])
    with pytest.raises(ValueError, match=field):
        configuration.check()


@pytest.mark.parametrize(
    ("table", "column", "allowed"),
    [
        ({"budgets": []}, "budgets=[]", "ascending numbers between 0 and 1"),
        ({"budgets": [0.8, 0.5]}, "budgets=[0.8, 0.5]", "ascending"),
        ({"budgets": [0.5, 0.5]}, "budgets=[0.5, 0.5]", "ascending"),
        ({"budgets": [-0.1, 0.5]}, "budgets=[-0.1, 0.5]", "between 0 and 1"),
        ({"budgets": [0.5, 1.5]}, "budgets=[0.5, 1.5]", "between 0 and 1"),
        ({"budgets": ["0.5"]}, "budgets=['0.5']", "list of numbers"),
        ({"budgets": [0.5, None]}, "budgets=[0.5, None]", "list of numbers"),
        ({"budgets": [float("nan")]}, "budgets=[nan]", "list of numbers"),
        ({"budgets": [0.2, 0.5], "settings": [1.0]}, "settings=[1.0]", "as many as budgets"),
        ({"budgets": [0.5], "settings": 1.0}, "settings=1.0", "list of numbers"),
        ({"budgets": [0.5], "settings": [float("inf")]}, "settings=[inf]", "list of numbers"),
        ({"budgets": [0.5], "settings": [True]}, "settings=[True]", "list of numbers"),
        ({"budgets": [0.2, 0.5, 0.8], "settings": [1.0, 3.0, 2.0]}, "settings=[1.0, 3.0, 2.0]", "monotone"),
        ({"budgets": [0.5], "cost": ["much"]}, "cost=['much']", "list of numbers"),
        ({"budgets": [0.5], "standard_error": []}, "standard_error=[]", "as many as budgets"),
    ],
)
def test_a_bad_calibration_is_named_by_its_column(table, column, allowed):
    with pytest.raises(ValueError) as caught:
        config(calibration=table)
    assert all(part in str(caught.value) for part in ("calibration", column, allowed)), caught.value


def test_feedback_is_refused_in_strict_mode():
    assert config(budget_mode="strict", budget_feedback=0).budget_feedback == 0.0
    with pytest.raises(ValueError, match="budget_feedback=0.5 is not allowed with budget_mode='strict'"):
        config(budget_mode="strict", budget_feedback=0.5)


def test_a_newer_format_is_refused_before_anything_else():
    with pytest.raises(ValueError, match=f"format_version={FORMAT_VERSION + 1} is newer.*update"):
        config(format_version=FORMAT_VERSION + 1, controller="of the future", energy_budget="of the future")


def test_a_newer_format_is_refused_when_loading(tmp_path):
    config().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["format_version"] == FORMAT_VERSION
    (tmp_path / "config.json").write_text(json.dumps(written | {"format_version": FORMAT_VERSION + 1}))
    for loader in (AneeConfig, AutoConfig):
        with pytest.raises(ValueError, match="is newer than this code"):
            loader.from_pretrained(tmp_path)


@given(good_fields())
@settings(deadline=None, derandomize=True, max_examples=60)
def test_good_fields_survive_dict_json_pickle_and_copies(fields):
    configuration = config(**fields)
    table = ActionTable.of(fields["actions"]).with_precisions(fields["precisions"], fields["narrow"])
    if fields["controller"] == "gated":
        fields["gated_variants"] = fields["gated_variants"] or default_variants(fields["precisions"])
        fields["exit_layers"] = strategic_layers(LAYERS) if fields["exit_layers"] is None else fields["exit_layers"]
        table = with_gated_rows(table, fields["gated_variants"])
    fields["actions"] = table.stored()
    assert fields_of(configuration) == fields
    copies = [
        AneeConfig.from_dict(configuration.to_dict()),
        AneeConfig(**configuration.to_dict()),
        AneeConfig.from_dict(json.loads(configuration.to_json_string())),
        AneeConfig.from_dict(json.loads(configuration.to_json_string(use_diff=False))),
        pickle.loads(pickle.dumps(configuration)),
        copy.deepcopy(configuration),
    ]
    for twin in copies:
        assert fields_of(twin) == fields
        assert twin.text_config.to_dict() == configuration.text_config.to_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(family, tmp_path):
    saved = config(family, controller="plan", plans=["PSSP", "PSEE"], energy_budget=0.4, exit_layers=[2, 1])
    saved.save_pretrained(tmp_path)
    for loader in (AneeConfig, AutoConfig):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is AneeConfig and fields_of(loaded) == fields_of(saved)
        assert type(loaded.text_config) is type(saved.text_config)
        assert loaded.text_config.to_dict() == saved.text_config.to_dict()
        assert loaded.num_layers == saved.num_layers == LAYERS


def test_arguments_override_what_is_saved_and_are_checked(tmp_path):
    config(energy_budget=0.4).save_pretrained(tmp_path)
    assert AneeConfig.from_pretrained(tmp_path, energy_budget=0.7).energy_budget == 0.7
    with pytest.raises(ValueError, match="energy_budget=7 is not allowed"):
        AneeConfig.from_pretrained(tmp_path, energy_budget=7).check()


def test_text_config_may_be_a_config_and_is_not_shared_by_copies():
    configuration = AneeConfig(text_config=CONFIGS["qwen2"]())
    twin = copy.deepcopy(configuration)
    twin.text_config.hidden_size = 99
    assert configuration.text_config.model_type == "qwen2" and configuration.text_config.hidden_size == 32


def test_defaults_are_not_shared():
    first, second = config(), config()
    first.controller_hidden_sizes.append(8)
    assert second.controller_hidden_sizes == [32]


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_the_base_s_own_answer(tied):
    assert config(text_config=TEXT_CONFIGS["llama"] | {"tie_word_embeddings": tied}).tie_word_embeddings is tied


@given(st.floats(0, 1) | st.sampled_from([0, 1]))
def test_check_budget_returns_a_float(value):
    checked = check_budget(value)
    assert isinstance(checked, float) and checked == value


def test_check_budget_names_the_field():
    with pytest.raises(ValueError, match="prompt_energy_budget=2 is not allowed"):
        check_budget(2, "prompt_energy_budget")


SHAPES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
SETTINGS = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id")


@pytest.mark.parametrize("family", CONFIGS)
def test_fields_of_the_base_are_read_at_the_top_and_kept_once(family, tmp_path):
    base = CONFIGS[family]()
    configuration = config(text_config=base.to_dict())
    for name in SHAPES + SETTINGS:
        assert getattr(configuration, name) == getattr(base, name), name
    for name in ("num_key_value_heads", "head_dim", "intermediate_size"):  # not every family has them
        assert getattr(configuration, name, None) == getattr(base, name, None), name
    configuration.use_cache, configuration.eos_token_id = False, [2, 3]
    assert configuration.text_config.use_cache is False and configuration.text_config.eos_token_id == [2, 3]
    configuration.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not written.keys() & {*SHAPES, *SETTINGS}
    loaded = AutoConfig.from_pretrained(tmp_path, pad_token_id=5)
    assert loaded.use_cache is False and loaded.eos_token_id == [2, 3] and loaded.pad_token_id == 5
    assert AneeConfig(**loaded.to_dict()).to_dict() == loaded.to_dict()


@pytest.mark.parametrize("name", SHAPES)
def test_the_shape_of_the_base_is_not_ours_to_change(name, tmp_path):
    configuration = config()
    setattr(configuration, name, getattr(configuration, name))
    configuration.save_pretrained(tmp_path)
    for change in (
        lambda: setattr(configuration, name, 7),
        lambda: config(**{name: 7}),
        lambda: AutoConfig.from_pretrained(tmp_path, **{name: 7}),
    ):
        with pytest.raises(ValueError, match=f"{name}=7 is not allowed: it is the base's"):
            change()


def test_settings_of_the_base_may_be_given():
    assert config(use_cache=False, eos_token_id=9).text_config.eos_token_id == 9
    model, ids = wrap(), token_ids()
    for use_cache in (True, False):
        model.config.use_cache = use_cache
        assert any(isinstance(part, Cache) for part in model(ids).values()) is use_cache


def test_a_misspelt_field_is_named_with_the_nearest(tmp_path):
    config().save_pretrained(tmp_path)
    for loader in (AneeConfig, AutoConfig):
        with pytest.raises(ValueError, match="'energy_buget' .did you mean 'energy_budget'"):
            loader.from_pretrained(tmp_path, energy_buget=0.5)
        loader.from_pretrained(tmp_path, padding_side="left", use_fast=True)  # what a tokenizer passes on
    with pytest.raises(ValueError, match="'energy_buget' .did you mean 'energy_budget'.*must be a field of AneeConfig"):
        config(energy_buget=0.5)


def test_unknown_fields_of_a_file_are_left_out_with_a_warning(tmp_path, said):
    """A newer version of ours may have written them."""
    config().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"energy_buget": 0.3, "custom_pipelines": {}}))
    for loader in (AneeConfig, AutoConfig):
        loaded = loader.from_pretrained(tmp_path)
        assert not hasattr(loaded, "energy_buget") and loaded.custom_pipelines == {}
    assert sum("'energy_buget' (did you mean 'energy_budget'?)" in message for message in said) == 1


def test_the_file_of_a_plain_model_points_to_from_base(tmp_path):
    CONFIGS["llama"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'llama' model, not an artifact: wrap it with AneeForCausalLM.from_base"):
        AneeConfig.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_a_prompt_beyond_the_context_does_as_with_the_base(said):
    base = tiny_base()
    base.config.max_position_embeddings = 10
    model, ids = wrap(base), token_ids(tokens=12)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    for each in (base, model):
        before = len(said)
        each.generate(ids, **greedy)
        assert "predefined maximum length (10)" in said[before]
        assert each.generate(ids[:, :5], do_sample=False, eos_token_id=[]).shape[1] == 10  # the default length is capped
        warning_once.cache_clear()


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_positions_that_were_never_learned_are_named(family):
    model = wrap(tiny_base(family))
    ids = torch.full((1, 140), VOCABULARY - 1)
    with pytest.raises(ValueError, match=f"position 139, but this {family} base has learned only 128 positions"):
        model(ids)
    with pytest.raises(ValueError, match="position 128"):
        model.generate(ids[:, :127], max_new_tokens=9, min_new_tokens=9)
