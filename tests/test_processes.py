"""Several processes measure what one does: started by torchrun, they share the work and only one of them speaks."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from modeling_anee.cli.main import app
from modeling_anee.configuration_anee import AneeConfig
from modeling_anee.data.windows import windows
from modeling_anee.evaluation.perplexity import score
from modeling_anee.evaluation.processes import ALONE, Processes, joined_processes
from modeling_anee.hardware import GATHERING_FLOPS
from modeling_anee.training.checkpoint import read_tensors

from . import children
from .tiny import token_ids, wrap
from .workshop import make_workshop, recipe_fields, words


AS_SHIPPED = GATHERING_FLOPS["cpu"]  # other processes have it


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workshop")
    make_workshop(folder)
    (folder / "text.txt").write_text(words(300))
    recipe = recipe_fields(folder, stages={"traces": {"windows": 5, "kl_windows": 2}})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


ANEE = "from modeling_anee.cli.main import app; app()"


def two_processes(folder, *arguments):
    """Run `anee` in two processes that work together, as docs/measuring.md starts them."""
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    return children.run([*launch, "modeling_anee.cli.main", *arguments], folder, env=variables)


def two_forks(forks, *arguments):
    """The same without the launcher, which starts new ones."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return forks.run_together(ANEE, *arguments, each=[common | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)])


def test_two_processes_score_what_one_does_and_only_one_prints_and_writes(workshop, forks, tmp_path, monkeypatch):
    monkeypatch.setitem(GATHERING_FLOPS, "cpu", AS_SHIPPED)
    call = ("perplexity", workshop / "base", "--text", workshop / "text.txt", "--length", 32, "--stride", 20, "--batch-size", 3)
    alone = CliRunner().invoke(app, [str(part) for part in (*call, "--output", tmp_path / "one.json")])
    assert alone.exit_code == 0, alone.output
    first, second = two_forks(forks, *call, "--output", tmp_path / "two.json")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    rows = [(own, other) for own, other in zip(one.pop("rows"), two.pop("rows"), strict=True)]
    assert one == two and one["windows"] == 15 and len(rows) == 3
    for own, other in rows:
        assert own == pytest.approx(other, rel=1e-6)
    assert first.stdout.replace("two.json", "one.json") == alone.stdout and second.stdout == ""


@pytest.mark.slow
def test_traces_of_two_processes_are_those_of_one(workshop, tmp_path, monkeypatch):
    monkeypatch.setitem(GATHERING_FLOPS, "cpu", AS_SHIPPED)
    call = ("fit", workshop / "recipe.yaml", "--data", workshop / "data", "--output")
    alone = CliRunner().invoke(app, [str(part) for part in (*call, tmp_path / "one")])
    assert alone.exit_code == 0, alone.output
    together = two_processes(tmp_path / "printed", *call, tmp_path / "two")
    assert together.returncode == 0, together.stderr
    assert together.stdout == alone.stdout.replace("one", "two")
    names = [path.name for path in sorted((tmp_path / "one" / "traces").iterdir())]
    assert names == [path.name for path in sorted((tmp_path / "two" / "traces").iterdir())] and len(names) == 5
    for name in names:
        one, two = (read_tensors(tmp_path / run / "traces" / name)[0] for run in ("one", "two"))
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")


class Member(Processes):
    """One of several processes, whose sums are only its own."""

    def sum(self, tensor):
        return tensor


@pytest.mark.parametrize("count", [2, 3, 8])
def test_shares_are_of_the_same_batches_and_add_up_to_the_whole(count):
    model, cut = wrap(), windows(token_ids(1, 75)[0], 16, 9)
    whole = score(model, cut, 0.6, batch_size=2)
    done: list[list[int]] = [[] for _ in range(count)]
    shares = [score(model, cut, 0.6, 2, done[index].append, Member(index, count, index)) for index in range(count)]
    assert torch.equal(sum(share.nll for share in shares), whole.nll)
    assert torch.equal(sum(share.cost for share in shares), whole.cost)
    assert all(sum(counted) == len(cut) for counted in done)
    assert {share.digest for share in shares} == {whole.digest}


def test_without_a_launcher_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined_processes() as processes:
        assert processes == ALONE and processes.is_main and not torch.distributed.is_initialized()
        with processes.main_first():
            assert torch.equal(processes.sum(torch.ones(2)), torch.ones(2))


def test_every_process_has_a_cuda_device_of_its_own():
    assert [Processes(index, 2, index).device("cuda") for index in range(2)] == ["cuda:0", "cuda:1"]
    assert ALONE.device("cuda") == "cuda" and Processes(1, 2, 1).device("cpu") == "cpu"


@pytest.mark.slow
def test_plans_and_curve_of_two_processes_are_those_of_one(workshop, tmp_path, monkeypatch):
    monkeypatch.setitem(GATHERING_FLOPS, "cpu", AS_SHIPPED)
    source = [{"file": "text.txt", "tokens": 40}]
    stages = {
        "closed_form": {"windows": 4, "ridge": 0.001},
        "plans": {"windows": 2, "lowest_budget": 0.4},
        "calibration": {"windows": 4, "budgets": [0.5, 0.7, 0.9]},
    }
    text = {"train": source, "choose": source, "calibrate": source}
    anee = {"controller": "plan", "bridge_rank": 4, "ffn_bridge_rank": 4}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_fields(workshop, text=text, anee=anee, stages=stages)))
    call = ("fit", recipe, "--data", workshop, "--output")
    alone = CliRunner().invoke(app, [str(part) for part in (*call, tmp_path / "one")])
    assert alone.exit_code == 0, alone.output
    together = two_processes(tmp_path / "printed", *call, tmp_path / "two")
    assert together.returncode == 0, together.stderr
    one, two = (AneeConfig.from_pretrained(tmp_path / run / "artifact") for run in ("one", "two"))
    assert one.plans == two.plans and len(one.plans) > 1
    assert one.calibration.keys() == two.calibration.keys()
    for name, values in one.calibration.items():
        assert values == pytest.approx(two.calibration[name], abs=1e-3)
