"""`anee profile` and `anee plan`, as a user runs them on a tiny base."""

import json

import pytest
from typer.testing import CliRunner

from modeling_anee.cli.main import app
from modeling_anee.cli.profiles import calibrated_ratio
from modeling_anee.machines import measuring
from modeling_anee.machines.profile import Profile
from modeling_anee.training.recipe import check_anee_fields

from .test_profile import LITTLE
from .tiny import tiny_base, wrap
from .workshop import make_workshop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("machines")
    make_workshop(made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "READ", 1 << 16)
        patch.setattr(measuring, "effort_for", lambda model: LITTLE)
        files = "--output", made / "anee_profile.json", "--prices", made / "prices.json"
        done = anee("profile", made / "base", *files, "--context", 20)
    assert done.exit_code == 0, done.output
    (made / "said.txt").write_text(done.output)
    return made


def anee(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def plan(folder, *arguments):
    return anee("plan", folder / "base", "--profile", folder / "anee_profile.json", *arguments)


def test_a_profile_is_written_and_told(folder):
    profile, said = Profile.load(folder / "anee_profile.json"), (folder / "said.txt").read_text()
    assert profile.machine in said and "GB/s" in said and f"profile: {folder / 'anee_profile.json'}" in said.replace("\n", "")
    assert all(f"{one.variant} {one.name} {one.outputs}x{one.inputs}" in said for one in profile.maps)


def test_prices_are_fields_of_a_recipe(folder):
    fields = json.loads((folder / "prices.json").read_text())
    assert check_anee_fields(fields) == fields and fields["prices"]["context"] == 20
    model = wrap(tiny_base(), precisions=["int8", "int4"], **fields)
    assert model.costs.unit == "ms" and model.costs.total > 0


def test_the_plan_for_a_speed_says_what_is_predicted_and_by_what(folder):
    output = folder / "plan.json"
    done = plan(folder, "--max-ms-per-token", 1e6, "--output", output)
    assert done.exit_code == 0, done.output
    report = json.loads(output.read_text())
    assert report["plan"] == "4*PROCESS" and report["energy_budget"] == pytest.approx(1.0)
    assert sum(report["parts_ms"].values()) == pytest.approx(report["ms_per_token"])
    assert report["tokens_per_second"] == pytest.approx(1e3 / report["ms_per_token"])
    for text in ("plan: 4*PROCESS", "predicted: ", "anee_profile.json", report["predicted_by"]["machine"]):
        assert text in done.output


def test_a_rate_is_of_all_rows(folder):
    one, output = plan(folder, "--tokens-per-second", 1e-3, "--batch", 2, "--context", 7), folder / "plan.json"
    assert one.exit_code == 0 and "a step of 2 after 7 tokens" in one.output
    done = plan(folder, "--tokens-per-second", 0.5, "--batch", 2, "--output", output)
    assert done.exit_code == 0 and json.loads(output.read_text())["most_ms"] == pytest.approx(4000.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--max-ms-per-token and --tokens-per-second both say how fast it is to be: give one of them"),
        (("--max-ms-per-token", 1, "--tokens-per-second", 1), "both say how fast it is to be"),
        (("--max-ms-per-token", 0), "--max-ms-per-token=0.0 is not allowed: it must be a number above 0"),
        (("--tokens-per-second", 1e9), "no plan is predicted to take 1e-06 ms or less: the fastest of"),
    ],
)
def test_what_can_not_be_is_told_in_one_line(folder, arguments, message):
    done = plan(folder, *arguments)
    assert done.exit_code == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_without_a_profile_the_command_that_makes_one_is_told(folder):
    done = anee("plan", folder / "base", "--max-ms-per-token", 1, "--profile", folder / "none.json")
    assert done.exit_code == 1 and f"`anee profile --output {folder / 'none.json'}` measures this machine" in done.stderr


def test_a_profile_of_another_machine_is_told(folder):
    profile = json.loads((folder / "anee_profile.json").read_text())
    (folder / "other.json").write_text(json.dumps(profile | {"machine": "another machine"}))
    done = anee("plan", folder / "base", "--max-ms-per-token", 1e6, "--profile", folder / "other.json")
    assert done.exit_code == 0 and "the profile is of another machine; this is" in done.stderr


def test_quality_is_read_between_calibrated_budgets():
    calibration = {"budgets": [0.2, 0.6], "cost": [0.2, 0.6], "perplexity_ratio": [2.0, 1.2]}
    assert calibrated_ratio(calibration, 0.4) == pytest.approx(1.6) and calibrated_ratio(calibration, 0.8) == pytest.approx(1.1)
    assert calibrated_ratio(calibration, 0.1) is None and calibrated_ratio(None, 0.5) is None
    assert calibrated_ratio({"budgets": [0.5]}, 0.5) is None
