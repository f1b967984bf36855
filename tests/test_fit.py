"""Fits: an interrupted one ends as an undisturbed one, bit by bit; order of stages; the artifact; the command."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from modeling_anee import AneeForCausalLM
from modeling_anee.cli.main import app
from modeling_anee.training import fit as fitting
from modeling_anee.training.checkpoint import read_tensors
from modeling_anee.training.fit import fit
from modeling_anee.training.recipe import STAGE_NAMES
from modeling_anee.training.run import Run

from . import children
from .tiny import token_ids
from .workshop import make_workshop, recipe_fields, recipe_of, use_stages


RESULTS = ("own-bridges.safetensors", "own-supervised.safetensors", "log.jsonl", "run.json")
UPDATES = {"energy_budget": 0.75}


class Interrupted(Exception):
    """What stops a run."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workshop")
    make_workshop(folder)
    return folder


def results(folder):
    return {name: (folder / name).read_bytes() for name in RESULTS}


@pytest.fixture(scope="module")
def undisturbed(workshop):
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_stages(monkeypatch, updates=UPDATES)
        fit(recipe_of(workshop), workshop / "undisturbed", workshop / "data")
    return workshop / "undisturbed"


def stop_once(stage, step):
    """A hook that raises at one step, the first time."""
    left = [(stage, step)]

    def before_step(*now):
        if now in left:
            left.remove(now)
            raise Interrupted

    return before_step


@pytest.mark.parametrize(
    "stage, step", [("bridges", step) for step in (0, 1, 3, 5, 6)] + [("supervised", 0), ("supervised", 3)]
)
def test_an_interrupted_run_ends_as_an_undisturbed_one(workshop, undisturbed, tmp_path, monkeypatch, stage, step):
    use_stages(monkeypatch, stop_once(stage, step), UPDATES)
    with pytest.raises(Interrupted):
        fit(recipe_of(workshop), tmp_path, workshop / "data")
    torch.manual_seed(step)  # whatever the process drew before
    artifact = fit(recipe_of(workshop), tmp_path, workshop / "data")
    assert results(tmp_path) == results(undisturbed)
    assert (artifact / "model.safetensors").read_bytes() == (undisturbed / "artifact" / "model.safetensors").read_bytes()


FIT = """
workshop, folder = map(Path, sys.argv[1:])
with pytest.MonkeyPatch.context() as monkeypatch:
    use_stages(monkeypatch, updates={"energy_budget": 0.75})
    fit(recipe_of(workshop), folder, workshop / "data")
"""
IMPORTS = """
import os, signal, sys
from pathlib import Path
import pytest
from modeling_anee.data import files
from modeling_anee.training.fit import fit
from tests.workshop import recipe_of, use_stages
"""
KILL = """
replace = os.replace
def kill_before_the_second_checkpoint(source, target):
    if Path(target).name == "checkpoint-bridges.safetensors" and Path(target).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

files.os.replace = kill_before_the_second_checkpoint
"""


def in_processes(script, *arguments, count=1):
    """Run a script in one process of its own, or in several that work together."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    return children.run([sys.executable, *launch, script, *arguments], script.parent, env=variables)


def test_a_run_that_was_killed_while_it_saved_ends_as_an_undisturbed_one(workshop, undisturbed, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    (tmp_path / "script.py").write_text(IMPORTS + KILL + FIT)
    killed = in_processes(tmp_path / "script.py", workshop, folder)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(folder.glob(".checkpoint-bridges.safetensors.*.part"))
    use_stages(monkeypatch, updates=UPDATES)
    steps = Run.open(recipe_of(workshop), folder, workshop / "data").load("bridges")[0]
    assert steps == 3, "the checkpoint before is whole"
    fit(recipe_of(workshop), folder, workshop / "data")
    assert results(folder) == results(undisturbed)
    assert not list(folder.glob("*.part")) and not list(folder.glob("checkpoint-*"))


@pytest.mark.slow
def test_two_processes_end_where_one_does(workshop, undisturbed, tmp_path):
    (tmp_path / "script.py").write_text(IMPORTS + FIT)
    done = in_processes(tmp_path / "script.py", workshop, tmp_path / "run", count=2)
    assert done.returncode == 0, done.stderr
    one, two = (read_tensors(folder / "own-supervised.safetensors")[0] for folder in (undisturbed, tmp_path / "run"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    assert any(not torch.equal(one[name], two[name]) for name in one), "sums over halves are rounded differently"
    entries, lines = ((folder / "log.jsonl").read_text().splitlines() for folder in (undisturbed, tmp_path / "run"))
    assert len(entries) == len(lines)


def test_a_run_whose_second_stage_diverged_ends_under_a_better_recipe_as_one_that_never_had_another(
    workshop, tmp_path, monkeypatch
):
    use_stages(monkeypatch, stop_once("supervised", 4))
    with pytest.raises(Interrupted):
        fit(recipe_of(workshop), tmp_path / "run", workshop / "data")
    stages = recipe_fields(workshop)["stages"]
    better = recipe_of(workshop, stages=stages | {"supervised": stages["supervised"] | {"learning_rate": 0.001}})
    work = tmp_path / "run" / "checkpoint-supervised.safetensors"
    with pytest.raises(ValueError, match=f"in the midst of supervised: delete {work}"):
        fit(better, tmp_path / "run", workshop / "data")
    work.unlink()
    for folder in ("run", "fresh"):
        fit(better, tmp_path / folder, workshop / "data")
    assert results(tmp_path / "run") == results(tmp_path / "fresh")


def test_a_second_run_in_a_folder_is_refused_while_the_first_is_at_work(workshop, tmp_path, monkeypatch):
    def second(stage, step):
        with pytest.raises(ValueError, match=f"{tmp_path} is in use by another run"):
            fit(recipe_of(workshop), tmp_path, workshop / "data")

    use_stages(monkeypatch, second)
    fit(recipe_of(workshop), tmp_path, workshop / "data")
    use_stages(monkeypatch)
    fit(recipe_of(workshop), tmp_path, workshop / "data")


def test_training_changed_our_modules_and_only_them(workshop, undisturbed):
    artifact = AneeForCausalLM.from_pretrained(undisturbed / "artifact").state_dict()
    untrained = Run.open(recipe_of(workshop), workshop / "untrained", workshop / "data").model.state_dict()
    changed = [name for name, value in artifact.items() if not torch.allclose(value, untrained[name], rtol=1e-3, atol=1e-4)]
    assert changed and not any(name.startswith("base.") for name in changed)
    assert all(torch.equal(value, untrained[name]) for name, value in artifact.items() if name.startswith("base."))


def test_the_artifact_is_what_was_trained(workshop, undisturbed):
    artifact = AneeForCausalLM.from_pretrained(undisturbed / "artifact")
    run = Run.open(recipe_of(workshop), undisturbed, workshop / "data")
    assert run.done == ["bridges", "supervised"] and artifact.config.energy_budget == 0.75
    for budget in (1.0, 0.6):
        own, expected = (model(token_ids(), energy_budget=budget).logits for model in (artifact, run.model))
        torch.testing.assert_close(own, expected, rtol=1e-2, atol=1e-2)
    assert AutoTokenizer.from_pretrained(undisturbed / "artifact")("w5 w6")["input_ids"] == [5, 6]
    assert not list(undisturbed.glob("artifact.*"))


def test_the_artifact_is_small_and_loads_in_float32(workshop, undisturbed, tmp_path):
    run = Run.open(recipe_of(workshop), undisturbed, workshop / "data")
    run.model.save_pretrained(tmp_path, tokenizer=run.tokenizer)
    weights, whole = (load_file(folder / "model.safetensors") for folder in (undisturbed / "artifact", tmp_path))
    assert weights.keys() == whole.keys()
    for name, value in weights.items():
        floating = whole[name].is_floating_point()
        assert value.dtype == (torch.float16 if floating else whole[name].dtype), name
        assert torch.equal(value, whole[name].half() if floating else whole[name])
    sizes = [sum(t.nbytes for t in tensors.values() if t.is_floating_point()) for tensors in (weights, whole)]
    assert sizes[0] == sizes[1] / 2
    loaded = AneeForCausalLM.from_pretrained(undisturbed / "artifact").state_dict()
    assert all(loaded[name].dtype == value.dtype for name, value in whole.items())
    assert not (workshop / "undisturbed" / "artifact" / "tokenizer.json.part").exists()


def test_the_tokenizer_of_the_artifact_is_compact_and_the_same(workshop, undisturbed):
    own, base = ((folder / "tokenizer.json").read_text() for folder in (undisturbed / "artifact", workshop / "base"))
    assert len(own) < len(base) and json.loads(own) == json.loads(base)


def test_weights_too_large_for_half_precision_are_an_error():
    with pytest.raises(ValueError, match="half precision: values of large are not finite"):
        fitting.in_half({"large": torch.tensor([1e6]), "fine": torch.ones(2)})


def test_compacting_keeps_letters_and_order(tmp_path):
    file = tmp_path / "tokenizer.json"
    fitting.compact(file)
    assert not file.exists()
    file.write_text(json.dumps({"b": "Ġé", "a": [1, 2]}, indent=2))
    fitting.compact(file)
    assert file.read_text(encoding="utf-8") == '{"b":"Ġé","a":[1,2]}'


def test_a_finished_run_does_no_stage_again_and_exports_the_same(workshop, undisturbed, monkeypatch):
    before = results(undisturbed)
    monkeypatch.setattr(fitting, "STAGES", {})
    artifact = fit(recipe_of(workshop), undisturbed, workshop / "data")
    assert artifact == undisturbed / "artifact" and (artifact / "config.json").is_file()
    assert results(undisturbed) == before


def test_stages_one_by_one_give_the_same(workshop, undisturbed, tmp_path, monkeypatch):
    use_stages(monkeypatch, updates=UPDATES)
    recipe = recipe_of(workshop)
    with pytest.raises(ValueError, match="stage='supervised' is not allowed yet: run first: bridges"):
        fit(recipe, tmp_path, workshop / "data", only="supervised")
    fit(recipe, tmp_path, workshop / "data", only="bridges")
    assert Run.open(recipe, tmp_path, workshop / "data").done == ["bridges"]
    fit(recipe, tmp_path, workshop / "data", only="supervised")
    assert results(tmp_path) == results(undisturbed)


def test_a_stage_that_the_recipe_lacks_is_an_error_before_anything_is_done(workshop, tmp_path):
    with pytest.raises(ValueError, match="stage='exits' is not allowed: the stages of this recipe are: bridges, supervised"):
        fit(recipe_of(workshop), tmp_path / "run", workshop / "data", only="exits")
    assert not (tmp_path / "run").exists()


def test_every_stage_of_a_recipe_has_an_entry():
    assert tuple(fitting.STAGES) == STAGE_NAMES


# The command


def anee_fit(*arguments):
    return CliRunner().invoke(app, ["fit", *map(str, arguments)])


def test_the_command_fits_and_names_the_artifact(workshop, undisturbed, tmp_path, monkeypatch):
    use_stages(monkeypatch, updates=UPDATES)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_fields(workshop)))
    call = (tmp_path / "recipe.yaml", "--data", workshop / "data", "--output", tmp_path / "run")
    done = anee_fit(*call, "--stage", "bridges")
    assert done.exit_code == 0, done.output
    done = anee_fit(*call)
    assert done.exit_code == 0 and done.stdout.split() == ["artifact:", str(tmp_path / "run" / "artifact")]
    assert results(tmp_path / "run") == results(undisturbed)


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({"seed": -1}, [], "seed=-1 is not allowed"),
        ({}, ["--stage", "exits"], "stage='exits' is not allowed"),
        ({"text": {"train": [{"file": "gone.txt", "tokens": 8}]}}, [], "gone.txt does not exist: --data"),
        ({"anee": {"controller": "psychic"}}, [], "controller='psychic' is not allowed"),
    ],
)
def test_errors_of_the_command_are_one_message(workshop, tmp_path, monkeypatch, changes, options, message):
    use_stages(monkeypatch)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_fields(workshop, **changes)))
    call = (tmp_path / "recipe.yaml", "--data", workshop / "data", "--output", tmp_path / "run")
    done = anee_fit(*call, *options)
    assert done.exit_code == 1 and message in done.stderr and "Traceback" not in done.output


def test_without_its_libraries_the_error_names_the_extra(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("modeling_anee.training", "modeling_anee.data"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "yaml", None)
    done = anee_fit(tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert done.exit_code == 1 and "needs yaml: pip install 'modeling-anee[train]'" in done.stderr


def test_a_missing_recipe_is_an_error(tmp_path):
    done = anee_fit(tmp_path / "gone.yaml", "--output", tmp_path / "run")
    assert done.exit_code == 1 and "gone.yaml" in done.stderr


def test_the_log_has_every_step_once(undisturbed):
    entries = [json.loads(line) for line in (undisturbed / "log.jsonl").read_text().splitlines()]
    expected = [("bridges", step) for step in range(7)] + [("supervised", step) for step in range(5)]
    assert [(entry["stage"], entry["step"]) for entry in entries] == expected
