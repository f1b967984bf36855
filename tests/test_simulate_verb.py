"""`anee simulate`, as a user runs it on a tiny base."""

import json

import pytest
from matplotlib import image
from typer.testing import CliRunner

from modeling_anee.cli.main import app
from modeling_anee.machines.description import FOLDER
from modeling_anee.machines.simulating import LEVELS

from .profiles import profile_of
from .tiny import tiny_base, wrap
from .workshop import make_workshop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("simulated")
    make_workshop(made)
    profile_of(wrap(tiny_base())).save(made / "profile.json")
    return made


def simulate(folder, *arguments):
    words = ["simulate", folder / "base", *arguments]
    return CliRunner().invoke(app, [str(word) for word in words])


def test_all_machines_are_simulated_by_default(folder):
    done = simulate(folder, "--precisions", "int8,int4", "--budgets", "1.0,0.3", "--batch", 2, "--context", 20, "--prompt", 30)
    assert done.exit_code == 0, done.output
    assert all(file.stem in done.output for file in FOLDER.glob("*.json"))
    assert "batch 2, 20 tokens before; joules are modelled" in done.output and "prompt of 30, ms" in done.output
    assert "analytic" in done.output and "measured" not in done.output and "budget 1: 4*PROCESS" in done.output


def test_a_profile_gives_three_ways_to_know_it_and_pictures(folder):
    files = {name: folder / f"{name}.png" for name in ("roofline", "parts")}
    options = [word for name, file in files.items() for word in (f"--{name}", file)]
    done = simulate(folder, "--profile", folder / "profile.json", "--output", folder / "rows.json", *options)
    assert done.exit_code == 0, done.output
    report = json.loads((folder / "rows.json").read_text())
    assert [row["level"] for row in report["rows"][:3]] == [*LEVELS] and report["machines"].keys() == {"this"}
    assert {point["level"] for point in report["roofline"][0]["points"]} == {"analytic", "measured"}
    for file in files.values():
        pixels = image.imread(file)
        assert pixels.shape[0] > 200 and pixels.std() > 0.02


def test_a_machine_may_be_a_file_of_ones_own(folder):
    own = json.loads((FOLDER / "a100.json").read_text(encoding="utf-8")) | {"name": "mine"}
    (folder / "mine.json").write_text(json.dumps(own))
    done = simulate(folder, "--hardware", folder / "mine.json", "--hardware", "a100")
    assert done.exit_code == 0 and "mine" in done.output and "a100" in done.output


def test_a_check_measures_and_tells_errors(folder):
    options = "--profile", folder / "profile.json", "--check", "--points", 4, "--repeats", 1, "--output", folder / "check.json"
    done = simulate(folder, "--precisions", "int8,int4", *options)
    assert done.exit_code == 0, done.output
    report = json.loads((folder / "check.json").read_text())
    assert len(report["points"]) == 4 and report["errors"].keys() == set(LEVELS)
    assert all(point["ms"] > 0 and point["measured"] > 0 for point in report["points"])
    assert "4 points that nothing was fitted to" in done.output and "90th percentile" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hardware", "nothing"), "hardware 'nothing' is not allowed: it must be a JSON file or one of a100"),
        (("--hardware", "this"), "--hardware this needs --profile: `anee profile` measures this machine"),
        (("--check",), "--check needs --profile"),
        (("--profile", "{}", "--hardware", "a100", "--hardware", "h100"), "--profile is of one machine"),
        (("--budgets", "2"), "--budgets 2: '2' is not a number between 0 and 1"),
    ],
)
def test_what_can_not_be_is_told_in_one_line(folder, arguments, message):
    done = simulate(folder, *(str(word).replace("{}", str(folder / "profile.json")) for word in arguments))
    assert done.exit_code == 1 and message in done.stderr and "Traceback" not in done.stderr
