"""Runs: folders, checkpoints, the log, and randomness that is a function of the step."""

import json
import sys
import types

import pytest
import torch

from modeling_anee.training.checkpoint import load_optimizer, optimizer_tensors, read_tensors, write_tensors
from modeling_anee.training.log import RunLog
from modeling_anee.training.run import Run

from .tiny import token_ids
from .workshop import make_workshop, recipe_of


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workshop")
    make_workshop(folder)
    return folder


def open_run(workshop, folder, **changes):
    return Run.open(recipe_of(workshop, **changes), folder, workshop / "data")


def scramble(run):
    """Give our modules weights that no seed would give them."""
    with torch.no_grad():
        for parameter in run.own_parameters().values():
            parameter.copy_(torch.randn_like(parameter))


# Folders


def test_a_new_run_has_our_modules_and_none_of_the_bases(workshop, tmp_path):
    run = open_run(workshop, tmp_path / "run")
    assert run.done == [] and (tmp_path / "run" / "run.json").is_file()
    assert run.own().keys() >= run.own_parameters().keys() >= {"controller.policies.0.0.weight"}
    base = {f"base.{name}" for name in run.model.base.state_dict()}
    assert run.own().keys() | base == set(run.model.state_dict()) and not run.own().keys() & base
    assert run.model.config.base_model_name_or_path == str(workshop / "base")


def test_untrained_modules_depend_on_the_seed_only(workshop, tmp_path):
    torch.manual_seed(5)
    first = open_run(workshop, tmp_path / "a").own()
    torch.manual_seed(6)
    second, other = open_run(workshop, tmp_path / "b").own(), open_run(workshop, tmp_path / "c", seed=1).own()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_finished_stages_weights_and_fields_are_there_again(workshop, tmp_path):
    run = open_run(workshop, tmp_path)
    scramble(run)
    run.finish("bridges", {"energy_budget": 0.7})
    run.finish("supervised", {"prompt_energy_budget": 0.8})
    again = open_run(workshop, tmp_path)
    assert again.done == ["bridges", "supervised"]
    assert (again.model.config.energy_budget, again.model.config.prompt_energy_budget) == (0.7, 0.8)
    assert run.own().keys() == again.own().keys()
    assert all(torch.equal(run.own()[name], again.own()[name]) for name in run.own())


def test_fields_of_a_stage_act_at_once_as_they_do_in_a_resumed_run(workshop, tmp_path):
    run = open_run(workshop, tmp_path, anee={"controller": "plan"})
    before = run.model
    run.finish("plans", {"plans": ["PSSP", "PSPP"]})
    assert run.model is not before and run.model.base is before.base
    again, ids = open_run(workshop, tmp_path, anee={"controller": "plan"}), token_ids()
    here, there = (model(ids, energy_budget=0.8) for model in (run.model, again.model))
    assert torch.equal(here.logits, there.logits) and torch.equal(here.execution.actions, there.execution.actions)
    assert not torch.equal(here.execution.actions, before(ids, energy_budget=0.8).execution.actions)


def test_modules_that_new_fields_bring_are_seeded_and_others_keep_their_weights(workshop, tmp_path):
    run = open_run(workshop, tmp_path, anee={"controller": "plan"})
    torch.manual_seed(7)
    run.finish("plans", {"controller": "learned"})
    fresh = open_run(workshop, tmp_path / "fresh", anee={"controller": "learned"})
    assert run.own().keys() == fresh.own().keys()
    assert all(torch.equal(run.own()[name], fresh.own()[name]) for name in run.own())
    scramble(run)
    weights = {name: value.clone() for name, value in run.own().items()}
    run.finish("bridges", {"decision_interval": 2})
    assert all(torch.equal(run.own()[name], weights[name]) for name in weights)


def test_a_stage_may_not_set_what_the_base_decides(workshop, tmp_path):
    run = open_run(workshop, tmp_path)
    with pytest.raises(ValueError, match="no field 'base_fingerprint' to set"):
        run.finish("bridges", {"base_fingerprint": "x"})
    assert open_run(workshop, tmp_path).done == []


def test_a_foreign_folder_is_refused_and_left_alone(workshop, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        open_run(workshop, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_state_is_an_error_that_names_the_file(workshop, tmp_path):
    (tmp_path / "run.json").write_text('{"done": ')
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        open_run(workshop, tmp_path)


def test_a_base_that_is_not_there_leaves_no_folder(workshop, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError):
        open_run(workshop, tmp_path / "run", base={"name": str(tmp_path / "gone")})
    assert not (tmp_path / "run").exists()


def test_a_copy_stands_in_for_a_base_of_the_hub(workshop, tmp_path, monkeypatch):
    monkeypatch.setenv("ANEE_BASE_PATH", str(workshop))
    run = open_run(workshop, tmp_path, base={"name": "someone/base", "revision": "abc", "gguf_file": "x.gguf"})
    config = run.model.config
    named = (config.base_model_name_or_path, config.base_model_revision, config.base_gguf_file)
    assert named == ("someone/base", "abc", "x.gguf")


# Checkpoints


def test_a_checkpoint_comes_back_as_it_was_saved(workshop, tmp_path):
    run = open_run(workshop, tmp_path)
    assert run.load("bridges") is None
    half = torch.randn(3, 4)
    tensors = {"a": half[:, :2], "b": half[0], "whole": half, "number": torch.tensor(3)}  # of one storage
    run.save("bridges", 5, tensors, {"best": 0.1 + 0.2})
    step, loaded, values = run.load("bridges")
    assert (step, values) == (5, {"best": 0.1 + 0.2}) and loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert run.load("supervised") is None
    run.finish("bridges")
    assert run.load("bridges") is None, "a finished stage needs none"


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_files_are_errors_that_name_them(workshop, tmp_path, keep):
    run = open_run(workshop, tmp_path)
    run.save("bridges", 5, run.own())
    path = tmp_path / "checkpoint-bridges.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(OSError, match=r"checkpoint-bridges\.safetensors is truncated"):
        run.load("bridges")


def test_values_that_json_cannot_hold_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="as JSON"):
        write_tensors(tmp_path / "file", {}, {"x": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_weights_of_another_version_are_refused(workshop, tmp_path):
    run = open_run(workshop, tmp_path)
    with pytest.raises(ValueError, match=r"lacks controller\.policies\.0\.0\.bias"):
        run.load_own({name: value for name, value in run.own().items() if name != "controller.policies.0.0.bias"})


NAMES = ["first", "second.weight", "unused"]


def optimizer_of(kind=torch.optim.AdamW, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3,), (2, 2), (4,))]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.1}]
    return kind(groups, lr=0.01, **settings), parameters


def take_step(optimizer, parameters, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters[:2]:  # the third never gets a gradient
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize(
    "kind, settings",
    [(torch.optim.AdamW, {}), (torch.optim.AdamW, {"amsgrad": True}), (torch.optim.SGD, {"momentum": 0.9})],
)
def test_an_optimizer_goes_on_from_its_tensors(tmp_path, kind, settings):
    optimizer, parameters = optimizer_of(kind, **settings)
    for step in range(3):
        take_step(optimizer, parameters, step)
    write_tensors(tmp_path / "file", optimizer_tensors(optimizer, NAMES) | {"other": torch.ones(1)})
    other, copies = optimizer_of(kind, **settings)
    load_optimizer(other, NAMES, read_tensors(tmp_path / "file")[0])
    for copy, parameter in zip(copies, parameters, strict=True):
        copy.data = parameter.data.clone()
    for step in range(3, 6):
        take_step(optimizer, parameters, step)
        take_step(other, copies, step)
    assert all(torch.equal(copy, parameter) for copy, parameter in zip(copies, parameters, strict=True))


def test_adamw_has_three_tensors_for_each_trained_parameter():
    optimizer, parameters = optimizer_of()
    take_step(optimizer, parameters, 0)
    expected = {f"optimizer/{key}/{name}" for key in ("exp_avg", "exp_avg_sq", "step") for name in NAMES[:2]}
    assert optimizer_tensors(optimizer, NAMES).keys() == expected


def test_state_of_other_parameters_is_refused():
    optimizer, parameters = optimizer_of()
    take_step(optimizer, parameters, 0)
    with pytest.raises(ValueError, match="'third', which is not a parameter"):
        load_optimizer(optimizer, NAMES, {"optimizer/exp_avg/third": torch.ones(3)})
    with pytest.raises(ValueError, match=r"shape \[4\], but the parameter has \[3\]"):
        load_optimizer(optimizer, NAMES, {"optimizer/exp_avg/first": torch.ones(4)})
    with pytest.raises(ValueError, match="names has 2 different names, but the optimiser has 3"):
        optimizer_tensors(optimizer, ["a", "b", "a"])


# Randomness and text


def test_randomness_is_a_function_of_seed_stage_and_step(workshop, tmp_path):
    run = open_run(workshop, tmp_path / "a")
    other = open_run(workshop, tmp_path / "b", seed=1)

    def draw(of, stage, step):
        return torch.randn(4, generator=of.generator(stage, step)).tolist()

    assert draw(run, "bridges", 3) == draw(run, "bridges", 3)
    drawn = [draw(run, "bridges", 3), draw(run, "bridges", 4), draw(run, "exits", 3), draw(other, "bridges", 3)]
    assert len({tuple(numbers) for numbers in drawn}) == 4


def test_windows_are_made_once(workshop, tmp_path):
    run = open_run(workshop, tmp_path / "run")
    first = run.windows("train")
    assert first.shape == (50, 8)
    again = Run.open(run.recipe, run.folder, tmp_path / "no data any more")
    assert torch.equal(again.windows("train"), first)
    with pytest.raises(ValueError, match=r"text\.calibrate=\[\] is not allowed"):
        run.windows("calibrate")


def test_windows_of_another_recipe_are_made_again(workshop, tmp_path):
    first = open_run(workshop, tmp_path).windows("train")
    again = open_run(workshop, tmp_path, length=10)
    assert again.state.done == [] and again.windows("train").shape == (40, 10) and first.shape == (50, 8)
    assert torch.equal(open_run(workshop, tmp_path).windows("train"), first)


# The log


def lines(run):
    return [json.loads(line) for line in run.run_log.path.read_text().splitlines()]


def test_a_resumed_stage_drops_what_it_will_log_again(workshop, tmp_path):
    run = open_run(workshop, tmp_path)
    for step in range(6):
        run.log("bridges", step, loss=step / 2)
        run.log("exits", step, loss=1)
    run.save("bridges", 4, {})
    with run.run_log.path.open("a") as file:
        file.write('{"stage": "exits", "st')  # torn by a crash
    run.run_log.begin("bridges", 4, done=["exits"])
    assert lines(run) == [
        entry
        for step in range(6)
        for entry in ({"stage": "bridges", "step": step, "loss": step / 2}, {"stage": "exits", "step": step, "loss": 1})
        if entry["stage"] == "exits" or step < 4
    ]
    run.begin("bridges")
    assert [entry["stage"] for entry in lines(run)] == ["bridges"] * 4, "a stage that is not done has no lines beside it"
    run.begin("exits")
    assert lines(run) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_errors(workshop, tmp_path, value):
    run = open_run(workshop, tmp_path)
    wrong = rf"stage bridges, step 3: loss={value} is not a finite number\. To begin the stage bridges again, change "
    with pytest.raises(ValueError, match=wrong + r"stages\.bridges in the recipe, a lower learning_rate for example, and give"):
        run.log("bridges", 3, kl=1.0, loss=value)
    assert not run.run_log.path.exists()
    run.save("bridges", 2, run.own())
    with pytest.raises(ValueError, match=f"for example, delete {tmp_path / 'checkpoint-bridges.safetensors'}, and give"):
        run.log("bridges", 3, loss=value)


def test_weights_that_have_diverged_do_not_finish_a_stage(workshop, tmp_path):
    run = open_run(workshop, tmp_path)
    with torch.no_grad():
        next(iter(run.own_parameters().values())).fill_(1e5)
    with pytest.raises(ValueError, match=r"not finite in it\. To begin the stage bridges again, change stages\.bridges"):
        run.finish("bridges")
    assert open_run(workshop, tmp_path).done == []


def test_without_tensorboard_the_error_names_the_extra(workshop, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"modeling-anee\[tensorboard\]"):
        open_run(workshop, tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_same_numbers(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder.name, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    log = RunLog(tmp_path, tensorboard=True)
    log.begin("bridges", 2)
    log.write("bridges", 2, {"loss": torch.tensor(0.5)})
    log.begin("exits", 0)
    assert written == [("bridges", 2), ("loss", 0.5, 2), "closed", ("exits", 0)]


# Devices and processes


def test_one_process_has_all_rows_and_its_own_sums(workshop, tmp_path):
    run, batch = open_run(workshop, tmp_path), torch.arange(6).view(3, 2)
    assert torch.equal(run.rows(batch), batch) and torch.equal(run.sum(batch), batch)
    parameter = torch.nn.Parameter(torch.ones(2))
    run.reduce_gradients([parameter])
    assert parameter.grad is None


def test_rows_are_shared_without_overlap_or_refused(workshop, tmp_path):
    run, batch = open_run(workshop, tmp_path), torch.arange(12).view(6, 2)
    run.accelerator = types.SimpleNamespace(num_processes=3, process_index=0)
    shares = []
    for run.accelerator.process_index in range(3):
        shares.append(run.rows(batch))
    assert torch.equal(torch.cat(shares), batch) and all(len(share) == 2 for share in shares)
    with pytest.raises(ValueError, match="5 rows can't be shared equally by 3 processes"):
        run.rows(batch[:5])


def test_a_device_that_is_not_there_is_an_error(workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda' is not allowed"):
        open_run(workshop, tmp_path, device="cuda")


def test_progress_counts_from_the_checkpoint(workshop, tmp_path, capsys):
    run = open_run(workshop, tmp_path)
    assert list(run.track(5, "bridges", 2)) == [2, 3, 4]
    captured = capsys.readouterr()
    assert "5/5" in captured.err and not captured.out
