"""The state of a run: which recipe a folder belongs to, and under which others it may go on."""

from dataclasses import replace

import pytest

from modeling_anee.training.recipe import Recipe
from modeling_anee.training.state import NAME, RunState, work_of

from .workshop import recipe_fields


def recipe_with(tmp_path, seed=0, steps=7, batch_tokens=8, **stages):
    """A recipe with the stages bridges and supervised, and with more of them; None leaves one out."""
    fields = recipe_fields(tmp_path, seed=seed)
    fields["stages"]["bridges"]["steps"] = steps
    fields["stages"]["supervised"]["batch_tokens"] = batch_tokens
    fields["stages"] |= stages
    return Recipe.model_validate(fields)


@pytest.fixture
def folder(tmp_path):
    """A run whose first stage is done."""
    (tmp_path / "run").mkdir()
    state = RunState.of(recipe_with(tmp_path), tmp_path / "run")
    replace(state, done=["bridges"], own="own-bridges.safetensors").write(tmp_path / "run")
    return tmp_path / "run"


def test_a_run_that_did_nothing_goes_on_under_any_recipe(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".run.json.0123abcd.part").touch()
    RunState.of(recipe_with(tmp_path), tmp_path).write(tmp_path)
    (tmp_path / "log.jsonl").touch()
    other = recipe_with(tmp_path, seed=4, steps=8)
    assert RunState.of(other, tmp_path) == RunState(other.model_dump(), other.digest())
    work_of("bridges", tmp_path).touch()
    with pytest.raises(ValueError, match=r"another recipe \(it differs in seed, stages\.bridges\.steps\): give another"):
        RunState.of(other, tmp_path)


def test_stages_whose_turn_has_not_come_may_change(folder):
    before = RunState.of(recipe_with(folder.parent), folder)
    exits = {"steps": 3, "learning_rate": 0.1, "batch_windows": 1}
    for other in (
        recipe_with(folder.parent, batch_tokens=4),
        recipe_with(folder.parent, supervised=None),
        recipe_with(folder.parent, exits=exits),
    ):
        state = RunState.of(other, folder)
        assert state == replace(before, recipe=other.model_dump(), recipe_sha256=other.digest())


def test_what_is_done_and_what_it_was_done_with_may_not(folder):
    windows = {"windows": 3, "ridge": 0.1}
    for change, name in (
        ({"seed": 4}, "seed"),
        ({"steps": 8}, r"stages\.bridges\.steps"),
        ({"bridges": None}, r"stages\.bridges"),
        ({"closed_form": windows}, r"stages\.closed_form"),
    ):
        with pytest.raises(ValueError, match=rf"another recipe \(it differs in {name}\): give another folder"):
            RunState.of(recipe_with(folder.parent, **change), folder)


def test_a_stage_under_way_may_change_once_its_work_is_deleted(folder):
    work_of("supervised", folder).touch()
    assert RunState.of(recipe_with(folder.parent), folder).done == ["bridges"]
    exits = {"steps": 3, "learning_rate": 0.1, "batch_windows": 1}
    for change in ({"batch_tokens": 4}, {"supervised": None}, {"exits": exits}):
        other = recipe_with(folder.parent, **change)
        with pytest.raises(ValueError, match=f"in the midst of supervised: delete {work_of('supervised', folder)} to begin"):
            RunState.of(other, folder)
    work_of("supervised", folder).unlink()
    assert RunState.of(other, folder).recipe_sha256 == other.digest()


def test_files_of_a_stage_that_is_done_are_not_under_way(tmp_path):
    traces = {"windows": 3, "kl_windows": 1}
    state = RunState.of(recipe_with(tmp_path, bridges=None, traces=traces), tmp_path)
    work_of("traces", tmp_path).mkdir()
    state.write(tmp_path)
    other = recipe_with(tmp_path, bridges=None, traces=traces, batch_tokens=4)
    with pytest.raises(ValueError, match="in the midst of traces"):
        RunState.of(recipe_with(tmp_path, bridges=None, traces=traces | {"windows": 4}), tmp_path)
    replace(state, done=["traces"]).write(tmp_path)
    assert RunState.of(other, tmp_path).done == ["traces"]


def test_a_damaged_state_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / NAME).write_text('{"done": ')
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        RunState.of(recipe_with(tmp_path), tmp_path)
