"""Runs that go on from an artifact."""

import pytest
import torch
import yaml

from modeling_anee import AneeForCausalLM
from modeling_anee.hardware import GATHERING_FLOPS
from modeling_anee.training.fit import fit, in_half
from modeling_anee.training.recipe import read_recipe
from modeling_anee.training.run import Run
from modeling_anee.training.start import Start

from .workshop import assert_same_run, fit_killed_in, make_workshop, recipe_of


AS_SHIPPED = GATHERING_FLOPS["cpu"]  # the other process has it
ANEE = {"controller": "routed", "bridge_rank": 4, "ffn_bridge_rank": 4, "router_budgets": [0.8, 0.6], "plans": ["PFPP", "PSFP"]}
ROUTING = {"steps": 6, "learning_rate": 0.01, "batch_windows": 2, "budgets": [0.5, 0.9], "checkpoint_every": 2}
STAGES = {
    "closed_form": {"windows": 8, "ridge": 0.001},
    "routing": ROUTING,
    "calibration": {"windows": 4, "budgets": [0.5, 0.9]},
}
TEXT = {"train": [{"file": "text.txt", "tokens": 400}], "calibrate": [{"file": "text.txt", "tokens": 200}]}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workshop")
    make_workshop(folder)
    fit(recipe_of(folder, anee=ANEE, stages=STAGES, text=TEXT), folder / "run", folder / "data")
    return folder


def more(fitted, **changes):
    """A recipe that goes on with the router of the artifact."""
    fields = {"start": str(fitted / "run" / "artifact"), "anee": {}, "stages": {"routing": ROUTING}, "text": TEXT, "seed": 1}
    return recipe_of(fitted, **(fields | changes))


def opened(fitted, folder, recipe):
    return Run.open(recipe, folder, fitted / "data")


def test_a_run_begins_with_fields_and_weights_of_the_artifact(fitted, tmp_path):
    before = opened(fitted, fitted / "run", recipe_of(fitted, anee=ANEE, stages=STAGES, text=TEXT))
    run = opened(fitted, tmp_path, more(fitted))
    assert run.model.config.plans == before.model.config.plans and run.model.config.controller == "routed"
    assert run.model.config.base_fingerprint == before.model.config.base_fingerprint
    assert run.own().keys() == before.own().keys()
    half = in_half(before.own())
    assert all(torch.equal(run.own()[name], half[name].to(run.own()[name])) for name in half)


def test_its_calibration_ends_with_the_weights_that_it_was_made_for(fitted, tmp_path):
    assert opened(fitted, tmp_path, more(fitted)).model.config.calibration is None


def test_the_recipe_comes_before_the_artifact(fitted, tmp_path):
    run = opened(fitted, tmp_path, more(fitted, anee={"controller": "plan", "plans": ["PSPP"]}))
    assert run.model.config.plans == ["PROCESS, SKIP, 2*PROCESS"] and run.model.config.controller == "plan"
    assert not any("predictor" in name for name in run.own())


def test_tuning_goes_on_from_there_and_the_artifact_stays(fitted, tmp_path):
    artifact = fitted / "run" / "artifact" / "model.safetensors"
    before = artifact.read_bytes()
    started = opened(fitted, tmp_path / "started", more(fitted)).own()
    small = {"stages": {"routing": ROUTING | {"learning_rate": 1e-5}}}
    fit(more(fitted, **small), tmp_path / "run", fitted / "data")
    tuned = opened(fitted, tmp_path / "run", more(fitted, **small)).own()
    moved = {name: float((tuned[name] - started[name]).abs().max()) for name in tuned if tuned[name].is_floating_point()}
    moved.pop("controller.predictor.2.bias")  # begins where the means over this text are
    assert max(moved.values()) < 1e-3 and any(moved.values())
    assert artifact.read_bytes() == before


def test_a_fit_killed_and_resumed_makes_the_same(fitted, forks, tmp_path, monkeypatch):
    monkeypatch.setitem(GATHERING_FLOPS, "cpu", AS_SHIPPED)
    recipe = more(fitted)
    fit(recipe, tmp_path / "whole", fitted / "data")
    fit_killed_in(forks, "routing", recipe, tmp_path / "killed", fitted / "data")
    fit(recipe, tmp_path / "killed", fitted / "data")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_weights_of_another_shape_are_refused_and_nothing_is_written(fitted, tmp_path):
    with pytest.raises(ValueError, match=r"bridges.skip.*has the shape \(.*4.*\), that of this recipe \(.*2"):
        opened(fitted, tmp_path / "run", more(fitted, anee={"bridge_rank": 2}))
    assert not (tmp_path / "run").exists()


def test_base_and_artifact_are_found_from_the_recipe_wherever_the_fit_is_run(fitted, tmp_path, monkeypatch):
    fields = more(fitted, base={"name": "./base"}, start="run/artifact").model_dump(exclude_none=True)
    (fitted / "recipe.yaml").write_text(yaml.safe_dump(fields))
    monkeypatch.chdir(tmp_path)
    run = opened(fitted, tmp_path / "run", read_recipe(fitted / "recipe.yaml"))
    assert run.model.config.base_model_name_or_path == str(fitted / "base")
    assert run.model.config.plans == opened(fitted, tmp_path / "other", more(fitted)).model.config.plans
    assert run.state.recipe["start"] == "run/artifact", "the run may be moved with its recipe"


def test_a_model_of_another_kind_is_refused(fitted, tmp_path):
    with pytest.raises(ValueError, match="it is a 'llama' model, not an artifact"):
        opened(fitted, tmp_path / "run", more(fitted, start=str(fitted / "base")))


def test_an_artifact_that_is_not_there_leaves_no_folder(fitted, tmp_path):
    with pytest.raises(OSError, match="no-such-artifact"):
        opened(fitted, tmp_path / "run", more(fitted, start=str(tmp_path / "no-such-artifact")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype, times", [("float32", 1.0), ("bfloat16", 2.0)])
def test_budgets_of_the_ways_are_shares_of_the_base_that_the_recipe_names(fitted, tmp_path, dtype, times):
    budgets = [0.2, 0.1]
    fields = {"precisions": ["int8"], "router_budgets": budgets, "base_model_name_or_path": str(fitted / "base")}
    AneeForCausalLM.from_base(fitted / "base", controller="routed", dtype="float32", **fields).save_pretrained(tmp_path)
    start = Start.of(more(fitted, start=str(tmp_path), base={"name": str(fitted / "base"), "dtype": dtype}))
    assert start is not None and start.fields["router_budgets"] == [budget * times for budget in budgets]
