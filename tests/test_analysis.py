"""Figures of an analysis, compared with loops over tokens; `anee analyze`, its files and its errors."""

import json
import math

import pytest
import torch
from matplotlib import image
from typer.testing import CliRunner

from modeling_anee.actions import DEFAULT_TABLE, EXIT, NONE, PROCESS, SKIP, SKIP_FFN
from modeling_anee.cli.analysis import as_text
from modeling_anee.cli.main import app
from modeling_anee.data.windows import full_windows
from modeling_anee.evaluation.analysis import analyse, describe
from modeling_anee.evaluation.decisions import Decisions
from modeling_anee.evaluation.token_classes import CLASSES

from .tiny import BRIDGES, CONTROLLERS, token_ids, wrap
from .workshop import make_workshop, tiny_tokenizer, words


LAYERS, TOKENS = 5, 40


def made_up(seed=0, table=DEFAULT_TABLE, entropies=None):
    """Random ways of N tokens, some of which leave; and the classes of the tokens, not all of which occur."""
    generator = torch.Generator().manual_seed(seed)
    actions = torch.randint(len(table), (TOKENS, LAYERS), generator=generator, dtype=torch.uint8)
    gone = table.leaving[actions.long()].cumsum(dim=1) > 0
    actions[gone] = EXIT
    cost = torch.rand(TOKENS, generator=generator)
    heads = torch.zeros(TOKENS, dtype=torch.uint8)
    return Decisions(actions, heads, cost, table, entropies or {}), torch.randint(4, (TOKENS,), generator=generator)


def test_every_layer_is_told_as_a_loop_over_its_tokens_would():
    decisions, classes = made_up(entropies={2: 1.5})
    rows = describe(decisions, classes)["layers"]
    assert [row["layer"] for row in rows] == list(range(LAYERS))
    for layer, row in enumerate(rows):
        taken = decisions.actions[:, layer].tolist()
        for sublayer in ("attention", "feed_forward"):
            assert sum(row[sublayer].values()) == pytest.approx(1.0)
            for variant, share in row[sublayer].items():
                assert share == pytest.approx(sum(getattr(DEFAULT_TABLE[a], sublayer) == variant for a in taken) / TOKENS)
        before = decisions.actions[:, layer - 1].tolist() if layer else [PROCESS] * TOKENS
        leave = sum(now == EXIT != then for then, now in zip(before, taken, strict=True))
        assert row["leaves"] == pytest.approx(leave / TOKENS)
        shares = [taken.count(action) / TOKENS for action in set(taken)]
        assert row["entropy"] == pytest.approx(-sum(share * math.log2(share) for share in shares))
        assert row["actions"] == pytest.approx({DEFAULT_TABLE.names[a]: taken.count(a) / TOKENS for a in set(taken)})
        assert row["router_entropy"] == (1.5 if layer == 2 else None)


def test_the_classes_share_tokens_and_work():
    decisions, classes = made_up()
    told = describe(decisions, classes)
    assert [row["class"] for row in told["classes"]] == [CLASSES[place] for place in sorted(set(classes.tolist()))]
    assert sum(row["tokens"] for row in told["classes"]) == told["tokens"] == TOKENS
    for total in ("share", "work"):
        assert sum(row[total] for row in told["classes"]) == pytest.approx(1.0)
    for mean in ("mean_cost", "mean_depth"):
        assert sum(row["share"] * row[mean] for row in told["classes"]) == pytest.approx(told[mean])
    for row in told["classes"]:
        ways = decisions.actions[classes == CLASSES.index(row["class"])].tolist()
        left = [way.index(EXIT) if EXIT in way else LAYERS for way in ways]
        assert row["exit_depth"] == pytest.approx(sum(left) / len(ways))
        assert row["leaves"] == pytest.approx(sum(layer < LAYERS for layer in left) / len(ways))
        attends = sum(DEFAULT_TABLE[action].attention != NONE for way in ways for action in way)
        assert row["attention"] == pytest.approx(attends / len(ways) / LAYERS)
        assert [sum(shares) for shares in zip(*row["actions"].values(), strict=True)] == pytest.approx([1.0] * LAYERS)


@pytest.mark.parametrize("follows_class", [True, False])
def test_a_class_explains_what_follows_from_it(follows_class):
    classes = torch.arange(4000) % 2
    actions = torch.where(classes == 1, SKIP, PROCESS) if follows_class else torch.arange(4000) // 2 % 2 * SKIP
    table, ways = DEFAULT_TABLE, actions.to(torch.uint8).unsqueeze(1).repeat(1, 3)
    told = describe(Decisions(ways, torch.zeros(4000, dtype=torch.uint8), torch.ones(4000), table, {}), classes)
    assert told["explained_by_class"] == pytest.approx(float(follows_class), abs=1e-3)
    assert told["ways"]["distinct"] == 2 and told["ways"]["entropy"] == pytest.approx(1.0)
    assert {way["plan"]: way["share"] for way in told["ways"]["commonest"]} == {"3*PROCESS": 0.5, "3*SKIP": 0.5}
    assert [layer["entropy"] for layer in told["layers"]] == pytest.approx([1.0] * 3)


def test_where_all_tokens_go_the_same_way_nothing_is_left_to_explain():
    ways = torch.full((30, 2), SKIP_FFN, dtype=torch.uint8)
    told = describe(
        Decisions(ways, torch.zeros(30, dtype=torch.uint8), torch.ones(30), DEFAULT_TABLE, {}), torch.arange(30) % 3
    )
    assert told["explained_by_class"] == told["ways"]["entropy"] == 0.0
    assert all(layer["entropy"] == layer["information"] == 0.0 for layer in told["layers"])


@pytest.mark.parametrize("kind", CONTROLLERS)
def test_any_kind_of_controller_is_analysed(kind):
    model = wrap(controller=kind, **BRIDGES)
    windows = full_windows(token_ids(1, 90)[0], 30)
    report = analyse(model, tiny_tokenizer(), windows, [0.8, 0.5])
    assert report["controller"] == kind and [row["budget"] for row in report["rows"]] == [0.8, 0.5]
    for row in report["rows"]:
        trace = model(torch.stack([window.ids for window in windows]), energy_budget=row["budget"]).execution
        first = max(model.controller.keep_first, 1)
        assert row["mean_cost"] == pytest.approx(float(trace.cost[:, first:].mean()), abs=1e-6)
        assert row["mean_depth"] == pytest.approx(float(trace.depth[:, first:].float().mean()))
        assert row["classes"][0]["class"] == "number"  # of the tokenizer's words, w3, w4, ...
    assert f"{kind} controller" in as_text(report)


def test_columns_of_what_never_happens_are_left_out():
    decisions, classes = made_up(entropies={0: 0.5})
    report = {"controller": "x", "dtype": "float32", "cost_unit": "bytes", "windows": 1, "length": TOKENS}
    shown = as_text(report | {"rows": [{"budget": 0.5, **describe(decisions, classes)}]})
    assert all(column in shown for column in ("attention full", "FFN none", "leave", "exit depth", "router"))
    stays = Decisions(torch.zeros_like(decisions.actions), decisions.heads, decisions.cost, DEFAULT_TABLE, {})
    shown = as_text(report | {"rows": [{"budget": 0.5, **describe(stays, classes)}]})
    assert not any(column in shown for column in ("none", "leave", "exit depth", "router"))


# The verb


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workshop")
    make_workshop(folder)
    for name, seed in (("one", 0), ("two", 1)):
        (folder / f"{name}.txt").write_text(words(200, seed))
    return folder


def anee(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_verb_prints_and_writes_figures_and_picture_of_several_texts(workshop, tmp_path):
    call = ("analyze", workshop / "base", "--controller", "learned", "--length", 32)
    files = ("--output", tmp_path / "life.json", "--plot", tmp_path / "life.png")
    texts = ("--text", workshop / "one.txt", "--text", workshop / "two.txt")
    done = anee(*call, *texts, "--budgets", "0.6,0.9", "--limit", 2, *files)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "life.json").read_text())
    assert report["texts"] == ["one.txt", "two.txt"] and report["windows"] == 4 and report["length"] == 32
    assert [row["budget"] for row in report["rows"]] == [0.9, 0.6]
    assert "budget 0.9: " in done.stdout and f"plot: {tmp_path / 'life.png'}" in done.stdout
    assert image.imread(tmp_path / "life.png").ndim == 3


def test_without_budgets_those_that_fit_the_model_are_taken(workshop, tmp_path):
    call = ("analyze", workshop / "base", "--text", workshop / "one.txt", "--length", 32, "--limit", 1)
    done = anee(*call, "--precisions", "int8,int4", "--output", tmp_path / "x.json")
    assert done.exit_code == 0, done.output
    assert [row["budget"] for row in json.loads((tmp_path / "x.json").read_text())["rows"]] == [0.5, 0.26, 0.18, 0.12]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budgets", "1.0"), "--budgets 1.0: none is below 1"),
        (("--budgets", "much"), "'much' is not a number between 0 and 1"),
        (("--plot", "life.doc"), "life.doc is not the name of a picture"),
        (("--output", "no/such/folder/x.json"), "--output no/such/folder"),
        (("--text", "no_such_text"), "no_such_text"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_looked_for(tmp_path, options, message):
    done = anee("analyze", tmp_path / "no model", "--text", __file__, *options)
    assert done.exit_code == 1 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_text_without_a_whole_window_is_refused(workshop):
    done = anee("analyze", workshop / "base", "--text", workshop / "one.txt", "--length", 100000)
    assert done.exit_code == 1 and "too few for one window of --length 100000" in done.stderr
