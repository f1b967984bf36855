"""A recipe for a user's own base, text and time: what it says, what it refuses, and `anee fit BASE` as a user would run it."""

import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from modeling_anee import AneeForCausalLM
from modeling_anee.cli.main import app
from modeling_anee.data.own_text import PARTS
from modeling_anee.training import default_recipe, speed
from modeling_anee.training import fit as fitting
from modeling_anee.training.allotment import DoesNotFit
from modeling_anee.training.checkpoint import read_tensors
from modeling_anee.training.default_recipe import Request, base_section, lengths, make_recipe
from modeling_anee.training.default_stages import (
    ACTIONS,
    BATCH_WINDOWS,
    BRIDGED,
    BRIDGED_ACTIONS,
    CAPACITIES,
    DEFAULT_STAGES,
    PLANS,
    STAGES_OF,
    WITHOUT_DATA,
    anee_fields,
    chosen_stages,
)
from modeling_anee.training.recipe import STAGE_NAMES, read_recipe
from modeling_anee.training.recipe_file import is_there, write_recipe
from modeling_anee.training.shape import Shape, check_layers
from modeling_anee.training.speed import Speed

from . import children
from .tiny import GROUPED, tiny_base
from .workshop import make_workshop, tiny_tokenizer, words


# That of SmolLM2-135M-Instruct, with bridges.
SHAPE = Shape(
    30, 576, 8192, len(BRIDGED_ACTIONS), True, head=0.2105, in_8_bits=0.2516, in_4_bits=0.1766, least=0.1563, least_head=0.0329
)


def speed_of(model, length, budgets):
    """A machine on which a forward of 64 tokens takes a tenth of a second."""
    return Speed(length, 0.1 * length / 64, 0.1 * length / 64, 0.3 * length / 64, 0.01)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workshop")
    make_workshop(folder)
    tiny_base().save_pretrained(folder / "bos")
    tiny_tokenizer(begins_with_bos=True).save_pretrained(folder / "bos")
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Speeds that are always the same."""
    monkeypatch.setattr(default_recipe, "measure_speed", speed_of)
    monkeypatch.setattr(default_recipe, "measure_sampling", lambda model: 1e-4)
    monkeypatch.setattr(default_recipe, "time", SimpleNamespace(perf_counter=lambda: 0.0))


def anee_fit(*arguments):
    return CliRunner().invoke(app, ["fit", *map(str, arguments)])


def request_of(workshop, minutes=1.0, stages=None, base="base", data="data"):
    return Request(str(workshop / base), workshop / data, minutes, stages)


# Time


def test_more_minutes_make_more_of_it_and_estimates_keep_to_them(workshop, quick):
    made = [make_recipe(request_of(workshop, minutes)) for minutes in (0.6, 0.9)]
    less, more = ({one.stage: one for one in each.estimates} for each in made)
    assert [*less] == [*more] == [*made[0].recipe["stages"]] == [*STAGES_OF["routed"]]
    assert sum(one.seconds for one in less.values()) <= 36.0 and sum(one.seconds for one in more.values()) <= 54.0
    assert more["bridges"].count > less["bridges"].count >= 10
    assert made[0].recipe["stages"]["bridges"]["steps"] == less["bridges"].count and less["bridges"].unit == "steps"


def test_too_few_minutes_are_an_error_with_the_least_that_is_enough(workshop, quick):
    with pytest.raises(
        DoesNotFit, match=r"--minutes 0\.01 is not allowed: corrections, closed_form.* need at least ([\d.]+) on"
    ) as error:
        make_recipe(request_of(workshop, 0.01))
    least = float(str(error.value).split("at least ")[1].split()[0])
    make_recipe(request_of(workshop, least))
    with pytest.raises(DoesNotFit):
        make_recipe(request_of(workshop, least - 0.1))


def test_windows_are_shorter_where_time_is_short(tmp_path, workshop, quick):
    (tmp_path / "long.txt").write_text(words(60_000))
    long, short = (make_recipe(Request(str(workshop / "base"), tmp_path, minutes)).recipe for minutes in (20.0, 0.6))
    assert long["length"] == 512 > short["length"] >= 64


def test_speed_is_that_of_this_machine():
    fields = {"base_model_name_or_path": "tiny/base", "controller": "plan", "precisions": ["int8", "int4"]}
    model = AneeForCausalLM.from_base(tiny_base(), **fields, bridge_rank=4, ffn_bridge_rank=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured = speed.measure_speed(model, 16, (0.1, 0.15))
    assert measured.length == 16 and 0 < measured.forward < measured.step and measured.cheap > 0 and measured.solve > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    alone = AneeForCausalLM.from_base(tiny_base(), **fields)
    measured = speed.measure_speed(alone, 16, (0.2, 0.3))
    assert measured.cheap > 0 and measured.step == measured.solve == 0 and speed.measure_sampling(alone) > 0


def test_plans_take_a_look_at_each_action_of_each_layer_and_some_more():
    machine, alone = Speed(256, 1.0, 1.0), replace(SHAPE, actions=2, bridged=False)
    half = 0.5 * (1 + alone.head)
    for shape, looks in ((alone, 2 + 2), (SHAPE, 4 + 5)):
        assert DEFAULT_STAGES[PLANS].seconds(shape, machine) == (0.0, pytest.approx(30 * looks * half))
    fixed, each = DEFAULT_STAGES[PLANS].seconds(alone, replace(machine, prepare=7.0, sample=0.1))
    assert fixed == 14.0 and each == pytest.approx(30 * 4 * half + 25.6)


# The base


def test_numbers_are_in_proportion_to_the_base(workshop, quick):
    made = make_recipe(request_of(workshop))
    anee, stages = made.recipe["anee"], made.recipe["stages"]
    assert made.recipe["base"] == {"name": str(workshop / "base"), "dtype": "float32"}
    assert (anee["bridge_rank"], anee["ffn_bridge_rank"], anee["min_layers"]) == (5, 3, 1)
    assert anee["controller"] == "routed" and anee["controller_actions"] == [*BRIDGED_ACTIONS]
    model = AneeForCausalLM.from_base(tiny_base(), base_model_name_or_path="tiny/base", precisions=["int8", "int4"])
    table, costs = model.config.table, model.costs
    layers = float(costs.layers[:, table.place("INT4")].sum())
    head = costs.heads[table.heads.index("int4")]
    lowest, highest = stages["bridges"]["budgets"]
    assert highest == pytest.approx(head + layers, abs=1e-4) and lowest == pytest.approx(head + 0.7 * layers, abs=1e-4)
    assert stages["plans"]["lowest_budget"] < lowest == min(stages["refit"]["budgets"] + stages["calibration"]["budgets"])
    assert max(stages["refit"]["budgets"]) < highest < max(stages["calibration"]["budgets"]) < 1


def test_budgets_follow_from_what_fewer_bits_cost():
    assert SHAPE.budgets((1.0, 0.5, 0.0)) == [0.1563, 0.0946, 0.0329]
    assert DEFAULT_STAGES["bridges"].section(180, SHAPE) == {
        "steps": 180,
        "batch_windows": BATCH_WINDOWS,
        "learning_rate": 0.0012,
        "budgets": [0.1193, 0.1563],
    }
    alone = replace(SHAPE, bridged=False)
    assert DEFAULT_STAGES[PLANS].section(2, alone) == {"windows": 2, "lowest_budget": 0.0}
    assert DEFAULT_STAGES["calibration"].section(2, alone)["budgets"] == [0.1766, 0.2141, 0.2516, 0.6258]


def test_a_base_of_few_bits_is_refused():
    model = AneeForCausalLM.from_base(tiny_base(), base_model_name_or_path="tiny/base", precisions=["int8", "int4"])
    model.costs = replace(model.costs, layers=model.costs.layers[:, :1].expand(-1, len(model.config.table)), heads=(0.1,) * 3)
    with pytest.raises(ValueError, match="have few bits already"):
        Shape.of(model)


def test_windows_are_no_longer_than_what_the_base_takes():
    for context, expected in ((None, [512, 256, 128, 64]), (8192, [512, 256, 128, 64]), (200, [200, 100]), (40, [40])):
        assert lengths(replace(SHAPE, context=context)) == expected
    assert lengths(replace(SHAPE, bridged=False)) == [256, 128, 64], "plans alone"


def test_the_dtype_is_the_base_s_own(tmp_path):
    tiny_base().to(torch.bfloat16).save_pretrained(tmp_path)
    assert base_section(str(tmp_path)).dtype == "bfloat16"


def test_a_base_that_can_be_none_is_refused(workshop, tmp_path):
    with pytest.raises(ValueError, match="the base has 2 layers: at least 3"):
        check_layers(LlamaConfig(**GROUPED | {"num_hidden_layers": 2}))
    model = AneeForCausalLM.from_base(tiny_base(), base_model_name_or_path=str(workshop / "base"))
    model.save_pretrained(tmp_path / "artifact")
    with pytest.raises(ValueError, match="artifact is an artifact: name its base"):
        base_section(str(tmp_path / "artifact"))
    for name in (str(tmp_path / "gone"), "./gone", "a/b/c", __file__, "two words"):
        with pytest.raises(ValueError, match=r"is not allowed: it must be a recipe .* or a base \(smollm2-135m-instruct"):
            Request(name, tmp_path, 1.0)
    for name in ("gpt2", "organisation/model-1.5", "smollm2-135m-instruct"):
        Request(name, tmp_path, 1.0)
    for minutes in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="--minutes .* is not allowed: it must be above 0"):
            Request("gpt2", tmp_path, minutes)


# Stages


def test_stages_are_in_their_order_with_those_that_they_need():
    assert chosen_stages(["bridges", PLANS]) == [PLANS, "bridges"]
    with pytest.raises(ValueError, match=f"'refit', which is not allowed without {PLANS}: add it"):
        chosen_stages(["refit"])
    with pytest.raises(ValueError, match="'exits', which is not allowed: the stages of the default recipe are corrections, "):
        chosen_stages(["exits"])
    with pytest.raises(ValueError, match="--stages is empty"):
        chosen_stages([])
    assert set(DEFAULT_STAGES) <= set(STAGE_NAMES) and set(BRIDGED) <= set(DEFAULT_STAGES)
    assert all([*own] == [name for name in STAGE_NAMES if name in own] for own in STAGES_OF.values())
    assert set().union(*STAGES_OF.values()) == set(DEFAULT_STAGES)
    for name, stage in DEFAULT_STAGES.items():
        assert all(STAGE_NAMES.index(need) < STAGE_NAMES.index(name) for need in stage.needs)


def test_plans_alone_need_no_text_to_train_on_and_no_bridges(tmp_path, workshop, quick):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "short.txt").write_text(words(640))  # one window of 64 to choose on, too few to train or calibrate
    request = Request(str(workshop / "base"), tmp_path / "data", 1.0, (PLANS,))
    made = make_recipe(request)
    assert [*made.recipe["text"]] == ["choose"] and [*made.recipe["stages"]] == [PLANS]
    assert made.recipe["anee"] == anee_fields([PLANS], 4, 32)
    assert made.recipe["anee"]["controller_actions"] == [*ACTIONS] and "bridge_rank" not in made.recipe["anee"]
    with pytest.raises(DoesNotFit, match=r"64 tokens in whole windows to calibrate with \(90% to 100% .* and 128 are needed"):
        make_recipe(Request(str(workshop / "base"), tmp_path / "data", 1.0, (PLANS, "calibration")))
    done = anee_fit(workshop / "base", "--data", tmp_path / "data", "--output", tmp_path / "run", "--stages", PLANS)
    assert done.exit_code == 0, done.output
    artifact = AneeForCausalLM.from_pretrained(tmp_path / "run" / "artifact")
    assert artifact.config.plans and not list(artifact.bridges.parameters())
    assert not list((tmp_path / "run").glob("windows-train*"))


@pytest.mark.parametrize("template", [True, False])
def test_corrections_and_plans_need_no_data(tmp_path, workshop, template):
    base = workshop / "base"
    if not template:
        base = tmp_path / "base"
        tiny_base().save_pretrained(base)
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = None
        tokenizer.save_pretrained(base)
    done = anee_fit(base, "--output", tmp_path / "run", "--minutes", 1)
    assert done.exit_code == 0, done.output
    recipe = read_recipe(tmp_path / "run" / "recipe.yaml")
    (source,) = recipe.text.choose
    assert recipe.planned == [*WITHOUT_DATA] and source.generated == ("chat" if template else "bos")
    assert recipe.text.train[0].generated == source.generated
    assert source.tokens == recipe.stages.plans.windows * recipe.length
    assert "The base samples it." in (tmp_path / "run" / "recipe.yaml").read_text()
    artifact = tmp_path / "run" / "artifact"
    assert (artifact / "model.safetensors").stat().st_size < 10_000
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype="float32")
    shape = Shape.of(model)
    costs = [float(model.costs.of_plans(torch.tensor(model.config.table.plan(p, 4)))) for p in model.config.plans]
    assert costs == sorted(costs, reverse=True) and model.controller.floor <= shape.in_4_bits
    spent = []
    for budget in sorted({1.0, 0.5, shape.in_8_bits, shape.in_4_bits}, reverse=True):  # corrections are dear on a tiny base
        output = model.generate(
            torch.tensor([[3, 4, 5]]), energy_budget=budget, max_new_tokens=20, do_sample=False, return_dict_in_generate=True
        )
        spent.append(output.execution.mean_cost)
    assert spent == sorted(spent, reverse=True) and spent[0] == pytest.approx(1.0) and spent[-1] < 0.6
    again = anee_fit(base, "--output", tmp_path / "run", "--minutes", 1)
    assert again.exit_code == 0 and "going on with" in again.stderr


def test_a_kind_of_controller_has_its_own_stages(tmp_path, workshop, quick):
    assert chosen_stages(["flips", "closed_form"], "gated") == ["closed_form", "flips"]
    with pytest.raises(ValueError, match="'routers', which is not allowed without flips: add it"):
        chosen_stages(["routers"], "gated")
    with pytest.raises(
        ValueError, match="'plans', which is not allowed: the stages of the default recipe are closed_form, flips"
    ):
        chosen_stages([PLANS], "gated")
    with pytest.raises(ValueError, match="--controller learned is not allowed: it must be one of routed, gated"):
        Request(str(workshop / "base"), tmp_path, 1.0, None, "learned")
    with pytest.raises(ValueError, match="--data is missing: .* for closed_form, flips, routers, gates"):
        Request(str(workshop / "base"), None, 1.0, None, "gated")
    request = Request(str(workshop / "base"), workshop / "data", 1.0, None, "gated")
    assert "--controller gated --minutes 1" in request.command
    made = make_recipe(request)
    assert [*made.recipe["stages"]] == [*STAGES_OF["gated"]] and sum(one.seconds for one in made.estimates) <= 60.0
    assert made.recipe["stages"]["calibration"]["capacities"] == [*CAPACITIES]
    assert made.recipe["anee"] == anee_fields(["flips"], 4, 32) and made.recipe["anee"]["controller"] == "gated"
    assert sum(source["tokens"] for source in made.recipe["text"]["choose"]) <= 4 * made.recipe["length"]


def test_gates_are_fitted_by_one_command(tmp_path, workshop):
    options = ("--controller", "gated", "--minutes", 0.7)
    done = anee_fit(workshop / "base", "--data", workshop / "data", "--output", tmp_path / "run", *options)
    assert done.exit_code == 0, done.output
    artifact = AneeForCausalLM.from_pretrained(tmp_path / "run" / "artifact")
    assert artifact.config.controller == "gated" and artifact.controller.routers.weight.any()
    assert len(artifact.config.calibration["budgets"]) > 2 and artifact.controller.floor < artifact.controller.top
    assert "ranks are 1/9 of that" in (tmp_path / "run" / "recipe.yaml").read_text()


# Text


def test_too_little_text_is_an_error_that_counts(tmp_path, workshop, quick):
    (tmp_path / "text.txt").write_text(words(300))
    with pytest.raises(DoesNotFit, match=r"192 tokens in whole windows to train with \(0% to 80% of each file\), and 512 are"):
        make_recipe(Request(str(workshop / "base"), tmp_path, 1.0))


@pytest.mark.parametrize("base, start", [("base", []), ("bos", [1])])
def test_every_window_begins_with_what_the_tokenizer_puts_before_a_text(tmp_path, workshop, quick, base, start):
    request = request_of(workshop, base=base)
    made = make_recipe(request)
    assert made.start == ("<s>" if start else "")
    tmp_path.joinpath("run").mkdir()
    text = write_recipe(request, made, tmp_path / "run").read_text()
    assert ("A window begins with '<s>'" if start else "A window begins with nothing") in text
    room = made.recipe["length"] - len(start)
    assert all(source["tokens"] % room == 0 for part in made.recipe["text"].values() for source in part)
    fitting.fit(read_recipe(tmp_path / "run" / "recipe.yaml"), tmp_path / "run", workshop / "data")
    for part in PARTS:
        windows = read_tensors(tmp_path / "run" / f"windows-{part}.safetensors")[0]["windows"]
        assert windows.shape[1] == made.recipe["length"]
        assert windows[:, : len(start)].unique().tolist() == start
        assert (windows[:, len(start) :] != 1).all()


# The command


def test_a_base_is_fitted_by_one_command_which_goes_on_where_it_was(tmp_path, workshop, monkeypatch):
    run, call = (
        tmp_path / "run",
        (workshop / "base", "--data", workshop / "data", "--output", tmp_path / "run", "--minutes", 1),
    )

    def stopped(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(fitting.STAGES, "bridges", stopped)
        patch.setattr(default_recipe, "measure_speed", speed_of)
        done = anee_fit(*call)
    assert done.exit_code == 130 and "interrupted" in done.stderr
    assert all(name in done.stderr for name in ("stage", *STAGES_OF["routed"], "to go")), "a table, and what is left"
    recipe = (run / "recipe.yaml").read_bytes()
    monkeypatch.setattr(default_recipe, "measure_speed", None)  # not again
    for options in ([*call[:-1], 2], [*call, "--stages", PLANS], [workshop / "bos", *call[1:]]):
        refused = anee_fit(*options)
        assert refused.exit_code == 1 and f"{run} holds a run of another command (anee fit" in refused.stderr
    done = anee_fit(*call)
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == ["artifact:", str(run / "artifact")] and f"going on with {run / 'recipe.yaml'}" in done.stderr
    assert (run / "recipe.yaml").read_bytes() == recipe
    artifact = AneeForCausalLM.from_pretrained(run / "artifact")
    assert artifact.config.controller == "routed" and artifact.config.calibration
    assert any("SKIP" in plan for plan in artifact.config.plans), "bridges are of use"
    assert len(artifact.config.calibration["budgets"]) == len(artifact.config.calibration["perplexity_ratio"])


@pytest.mark.slow
def test_of_several_processes_the_first_makes_the_recipe(tmp_path, workshop):
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "modeling_anee.cli.main",
    ]
    call = ["fit", workshop / "base", "--data", workshop / "data", "--output", tmp_path / "run", "--minutes", "0.5"]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    done = children.run([*launch, *map(str, call)], tmp_path, env=variables)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("recipe: ") == 1 and (tmp_path / "run" / "artifact" / "config.json").is_file()


def test_the_recipe_is_one_to_copy(tmp_path, workshop, quick):
    request = request_of(workshop)
    made = make_recipe(request)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        assert not is_there(request, tmp_path / name)
        file = write_recipe(request, made, tmp_path / name)
        assert is_there(request, tmp_path / name)
    assert (tmp_path / "one" / "recipe.yaml").read_bytes() == file.read_bytes(), "the same of the same"
    lines = file.read_text().splitlines()
    assert lines[0] == f"# {request.command}" and max(map(len, lines[1:])) < 200
    assert yaml.safe_load(file.read_text()) == made.recipe
    recipe = read_recipe(file)
    assert recipe.planned == [*made.recipe["stages"]]
    assert recipe.stages.bridges.batch_windows == BATCH_WINDOWS
    assert any(line.startswith("  bridges: {steps: ") and "minutes for" in line for line in lines)


def test_a_folder_with_something_else_is_left_alone(tmp_path, workshop):
    call = (workshop / "base", "--data", workshop / "data", "--output", tmp_path)
    (tmp_path / "diary.txt").write_text("mine")
    done = anee_fit(*call)
    assert done.exit_code == 1 and f"{tmp_path} is not empty and holds no run of anee fit" in done.stderr
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    done = anee_fit(*call)
    assert done.exit_code == 1 and f"{tmp_path} holds a run of another command (seed: 0)" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diary.txt", "recipe.yaml"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["recipe.txt", "--data", "."],
            "BASE_OR_RECIPE recipe.txt is not allowed: it must be a recipe (a file that ends in .yaml",
        ),
        (["./gone", "--data", "."], "BASE_OR_RECIPE ./gone is not allowed"),
        (["gone.yaml"], "gone.yaml"),
        (["gone.yml", "--minutes", "3"], "--minutes 3.0 is not allowed with the recipe gone.yml: it is for a base"),
        (["gone.yaml", "--stages", "bridges"], "--stages bridges is not allowed with the recipe gone.yaml: it is for a base"),
        (
            ["gpt2", "--data", ".", "--stage", "bridges"],
            "--stage bridges is not allowed with the base gpt2: it is for a recipe",
        ),
        (["gpt2", "--stages", "closed_form,plans"], "--data is missing: it must be a folder with text files for closed_form,"),
        (["gpt2", "--data", "gone"], "--data gone is not allowed: it must be a folder"),
        (["gpt2", "--data", ".", "--minutes", "0"], "--minutes 0 is not allowed"),
        (["gpt2", "--data", ".", "--stages", "bridges"], f"without {PLANS}"),
        (["gpt2", "--stages", "routing"], "'routing', which is not allowed"),
    ],
)
def test_errors_of_the_command_come_before_any_work(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.txt").write_text("base: {name: gpt2}\n")
    done = anee_fit(*arguments, "--output", "run")
    assert done.exit_code == 1 and message in done.stderr and done.stderr.count("\n") == 1, done.output
    assert not (tmp_path / "run" / "recipe.yaml").exists()
