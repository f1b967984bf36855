"""Recipes: what is read, and errors that say where, what and what is allowed."""

from pathlib import Path

import pytest
import yaml

from modeling_anee.configuration_anee import AneeConfig
from modeling_anee.data.bases import DEMO_BASE
from modeling_anee.data.section import Section
from modeling_anee.data.sources import DatasetSource, FileSource, GeneratedSource
from modeling_anee.training.recipe import ANEE_FIELDS, STAGE_NAMES, Recipe, read_recipe

from .workshop import recipe_fields


ROOT = Path(__file__).parents[1]


def written(tmp_path, fields):
    path = tmp_path / "recipe.yaml"
    path.write_text(fields if isinstance(fields, str) else yaml.safe_dump(fields))
    return path


def changed(tmp_path, path, value):
    """The small recipe with one field changed, which a path with dots names."""
    fields = place = recipe_fields(tmp_path)
    *parents, last = (int(name) if name.isdigit() else name for name in path.split("."))
    for name in parents:
        place = place[name]
    place[last] = value
    return fields


def test_what_is_read_is_what_was_written(tmp_path):
    fields = recipe_fields(tmp_path, seed=3)
    recipe = read_recipe(written(tmp_path, fields))
    assert recipe.model_dump() == Recipe.model_validate(fields).model_dump() and recipe.seed == 3 and recipe.length == 8
    assert recipe.planned == ["bridges", "supervised"] and recipe.stages.exits is None
    assert recipe.base.dtype == "float32" and recipe.stages.bridges.budgets == [0.5, 0.9]


def test_stages_are_planned_in_their_order_not_the_files(tmp_path):
    stages = recipe_fields(tmp_path)["stages"]
    backwards = dict(reversed(stages.items()))
    assert read_recipe(written(tmp_path, recipe_fields(tmp_path, stages=backwards))).planned == ["bridges", "supervised"]
    assert STAGE_NAMES[0] == "corrections" and STAGE_NAMES[-1] == "calibration" and len(STAGE_NAMES) == 16


def test_numbers_without_a_point_are_numbers(tmp_path):
    path = written(tmp_path, "base: {name: x}\nstages: {exits: {steps: 3, batch_windows: 1, learning_rate: 1e-3}}\n")
    assert read_recipe(path).stages.exits.learning_rate == 0.001


def test_each_kind_of_source_is_told_by_its_field(tmp_path):
    train = [
        {"file": "a.raw", "tokens": 10, "start": 0.5, "stop": 1},
        {"dataset": "org/name", "tokens": 10, "split": "train[:1%]"},
        {"generated": "bos", "tokens": 10, "documents": 2},
    ]
    recipe = read_recipe(written(tmp_path, recipe_fields(tmp_path, text={"train": train})))
    assert [type(source) for source in recipe.text.train] == [FileSource, DatasetSource, GeneratedSource]


def test_the_digest_tells_recipes_apart(tmp_path):
    fields = recipe_fields(tmp_path)
    same, other = Recipe.model_validate(fields), Recipe.model_validate(fields | {"seed": 1})
    assert same.digest() == Recipe.model_validate(fields).digest() != other.digest()


@pytest.mark.parametrize(
    "path, value, allowed",
    [
        ("seed", -1, "greater than or equal to 0"),
        ("seed", True, "valid integer"),
        ("length", 1, "greater than or equal to 2"),
        ("device", "tpu", "'cpu', 'cuda' or 'auto'"),
        ("lenght", 8, "the fields are base, seed, length"),
        ("base.dtype", "int8", "'float32', 'bfloat16' or 'float16'"),
        ("base.nam", "x", "the fields are name, revision"),
        ("anee", {"bridge_rnk": 2}, "the fields are strict_base, energy_budget"),
        ("anee", {"base_fingerprint": "x"}, "no field 'base_fingerprint' to set"),
        ("stages.dance", {}, "the fields are corrections, importance, closed_form, plans, refit, bridges"),
        ("stages.bridges.steps", 0, "greater than 0"),
        ("stages.bridges.steps", "7", "valid integer"),
        ("stages.bridges.learning_rate", float("nan"), "finite"),
        ("stages.bridges.budgets", [0.9, 0.5], "lowest budget comes first"),
        ("stages.bridges.budgets", [0.9], "at least 2"),
        ("stages.bridges.budgets.1", 1.5, "less than or equal to 1"),
        ("stages.bridges.warmup", 1.0, "less than 1"),
        ("text.train.0", {"tokens": 3}, "one of the fields file, dataset, generated"),
        ("text.train.0.tokens", 0, "greater than 0"),
        ("text.train.0.token", 5, "the fields are file, tokens, lines"),
        ("text.train.0", {"file": "a.csv", "tokens": 3}, "must end in .jsonl, .txt or .raw"),
        ("text.train.0", {"file": "a.jsonl", "tokens": 3}, "either template or chat"),
        ("text.train.0", {"file": "a.txt", "tokens": 3, "template": "x"}, "are for .jsonl"),
        ("text.train.0", {"file": "a.txt", "tokens": 3, "start": 0.5, "stop": 0.5}, "below stop=0.5"),
        ("text.train.0", {"file": "a.jsonl", "tokens": 3, "template": "{a"}, "template='{a' is not allowed: expected '}'"),
        ("text.train.0", {"file": "a.jsonl", "tokens": 3, "template": "a}"}, "template='a}' is not allowed: Single '}'"),
        ("text.train.0", {"file": "a.jsonl", "tokens": 3, "chat": [["user", "{}"]]}, "a field needs a name"),
        ("text.train.0", {"file": "a.jsonl", "tokens": 3, "template": "a"}, "template='a' is not allowed: it has no field"),
        ("text.train.0", {"generated": "poem", "tokens": 3, "documents": 1}, "'chat' or 'bos'"),
    ],
)
def test_errors_have_field_value_and_what_is_allowed(tmp_path, path, value, allowed):
    fields = changed(tmp_path, path, value)
    with pytest.raises(ValueError) as error:
        read_recipe(written(tmp_path, fields))
    message = str(error.value)
    assert "recipe.yaml" in message and path in message and allowed in message
    assert repr(value) in message or isinstance(value, dict | list)


def test_all_errors_are_listed_at_once(tmp_path):
    fields = recipe_fields(tmp_path, seed=-1, device="tpu")
    fields["stages"]["bridges"].pop("steps")
    with pytest.raises(ValueError, match=r"(?s)seed=-1.*device='tpu'.*stages\.bridges\.steps is missing"):
        read_recipe(written(tmp_path, fields))


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [", "not YAML"),
        ("", "the file=None"),
        ("- 1", "the file="),
        ("base: {name: x}\nstages: {}\nseed: 1\nstages: {}\n", "recipe.yaml, line 4: 'stages' is there twice, first in line 2"),
    ],
)
def test_files_that_are_no_recipe_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(written(tmp_path, text))


def test_folders_are_relative_to_the_recipe(tmp_path, monkeypatch):
    for name in ("base", "artifact", "texts"):
        (tmp_path / "there" / name).mkdir(parents=True)
    text = {"train": [{"dataset": "texts", "tokens": 1}, {"dataset": "org/name", "tokens": 1}]}
    fields = recipe_fields(tmp_path, base={"name": "base"}, start="../there/artifact", text=text)
    recipe = read_recipe(written(tmp_path / "there", fields))
    digest = recipe.digest()
    for folder in (tmp_path, tmp_path / "there" / "base"):
        monkeypatch.chdir(folder)
        located = recipe.located()
        assert located.base.name == str(tmp_path / "there" / "base")
        assert located.start == str(tmp_path / "there" / "artifact")
        assert [source.dataset for source in located.text.train] == [str(tmp_path / "there" / "texts"), "org/name"]
    assert recipe.digest() == digest != located.digest() and located.stages == recipe.stages


def test_names_of_the_hub_and_of_the_demo_stay_and_folders_elsewhere_are_refused(tmp_path, monkeypatch):
    def located(name):
        return read_recipe(written(tmp_path, recipe_fields(tmp_path, base={"name": name}))).located().base.name

    (tmp_path / DEMO_BASE).mkdir()
    assert located("org/name") == "org/name" and located(DEMO_BASE) == DEMO_BASE
    assert located(f"./{DEMO_BASE}") == str(tmp_path / DEMO_BASE)
    with pytest.raises(FileNotFoundError, match=r"base.name='./gone' is not allowed: there is no folder /.*/gone"):
        located("./gone")
    (tmp_path / "elsewhere" / "models").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="base.name='models' is not allowed: a path is relative to the recipe"):
        located("models")


def test_every_field_is_described():
    def sections(kind):
        return [kind, *(found for child in kind.__subclasses__() for found in sections(child))]

    for section in sections(Section)[1:]:
        assert section.__doc__
    described = [Recipe.model_fields[name] for name in Recipe.model_fields if name not in ("base", "text", "stages")]
    assert all(field.description for field in described) and "controller" in ANEE_FIELDS


@pytest.mark.parametrize("file", sorted((ROOT / "configuration").glob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_that_come_with_the_project_are_recipes(file):
    recipe = read_recipe(file)
    kind = recipe.anee.get("controller") or AneeConfig.from_pretrained(recipe.located().start).controller
    kinds = {"learned": "learned", "gated": "gated", "refine": "refine", "narrow": "plan"}
    assert kind == next((kind for name, kind in kinds.items() if name in file.stem), "routed")
    assert set(recipe.planned) <= set(STAGE_NAMES)
    if kind == "plan":
        assert recipe.planned[-1] == "plans"
        return
    if not {"supervised", "routing", "routers"} & set(recipe.planned):  # of an artifact that has learned already
        assert recipe.planned[-1] == "calibration" and recipe.start
        return
    for stage, of_kind in (("supervised", "learned"), ("routing", "routed"), ("routers", "gated")):
        assert (stage in recipe.planned) == (kind == of_kind)


@pytest.mark.parametrize(
    ("stage", "fields", "message"),
    [
        (
            "routers",
            {"capacities": [0.9, 0.5]},
            r"routers\.capacities=\[0\.9, 0\.5\] is not allowed: .* the lowest first",
        ),
        ("gates", {"capacities": [0.5, 1.0]}, "they must lie between 0 and 1"),
        ("routers", {"forward": [0.5]}, "at least 2 items"),
        ("gates", {"backward": [0.0, 1.0]}, "greater than 0"),
        ("gates", {"supervised": 1.5}, "less than or equal to 1"),
        ("routers", {"layer_dropout": -0.1}, "greater than or equal to 0"),
    ],
)
def test_what_stages_of_gates_refuse(tmp_path, stage, fields, message):
    section = {"steps": 3, "batch_windows": 1, "learning_rate": 0.001} | fields
    with pytest.raises(ValueError, match=message):
        read_recipe(written(tmp_path, {"base": {"name": "x"}, "stages": {stage: section}}))
