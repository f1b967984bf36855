"""`anee perplexity`: the model as an argument, the plot, and files that are checked before anything is measured."""

import json
import os
import sys

import pytest
from matplotlib import image
from typer.testing import CliRunner

from modeling_anee.cli.main import app

from .workshop import make_workshop, words


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workshop")
    make_workshop(folder)
    (folder / "text.txt").write_text(words(200))
    return folder


def anee(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def scored(workshop, *arguments):
    return anee("perplexity", "--text", workshop / "text.txt", "--length", 32, "--budgets", "1.0,0.6", *arguments)


def test_the_model_may_be_an_argument_or_an_option(workshop):
    argument, option = scored(workshop, workshop / "base"), scored(workshop, "--model", workshop / "base")
    assert argument.exit_code == 0, argument.output
    assert argument.stdout == option.stdout


@pytest.mark.parametrize(
    "verb",
    [
        ("perplexity", "--text", __file__),
        ("compare", "--text", __file__),
        ("generate", "--prompt", "w3"),
        ("bench",),
        ("samples",),
    ],
)
def test_no_verb_takes_two_models(verb):
    done = anee(*verb, "one", "--model", "other")
    assert done.exit_code == 1 and "MODEL one and --model other are the same setting" in done.stderr


def test_the_plot_is_drawn_beside_the_figures(workshop, tmp_path):
    done = scored(workshop, workshop / "base", "--plot", tmp_path / "curve.png", "--output", tmp_path / "scores.json")
    assert done.exit_code == 0, done.output
    assert f"plot: {tmp_path / 'curve.png'}" in done.stdout and image.imread(tmp_path / "curve.png").ndim == 3
    assert [row["budget"] for row in json.loads((tmp_path / "scores.json").read_text())["rows"]] == [1.0, 0.6]


def test_a_token_of_every_row_is_timed(workshop, tmp_path):
    done = scored(workshop, workshop / "base", "--milliseconds", "--new-tokens", 2, "--output", tmp_path / "scores.json")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "scores.json").read_text())
    assert all(row["milliseconds"] > 0 for row in report["rows"]) and report["timing"]["tokens"] == 2
    assert "ms/token   speed" in done.stdout and any(line.endswith("  1.00") for line in done.stdout.splitlines())


def test_capacities_are_of_gated_controllers(workshop):
    refused = scored(workshop, workshop / "base", "--capacities", "0.9,0.5")
    assert refused.exit_code == 1 and "only 'gated' has capacities" in refused.stderr
    done = scored(workshop, workshop / "base", "--capacities", "0.9,0.5", "--controller", "gated")  # untrained
    assert done.exit_code == 0 and "gated controller" in done.stdout, done.output


@pytest.mark.parametrize("option", ["--plot", "--output"])
def test_files_that_cannot_be_written_are_named_before_the_model_is_looked_for(workshop, tmp_path, monkeypatch, option):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK or path != tmp_path / "folder.png")
    for file, message in {
        tmp_path / "gone" / "x.png": "does not exist",
        tmp_path / "folder.png": "is a folder",
        tmp_path / "folder.png" / "x.png": "can't be written to",
    }.items():
        done = scored(workshop, tmp_path / "no model", option, file)
        assert done.exit_code == 1 and f"{option} {file}" in done.stderr and message in done.stderr


def test_a_plot_that_is_no_picture_or_lacks_its_library_is_named_before_the_model_is_looked_for(
    workshop, tmp_path, monkeypatch
):
    done = scored(workshop, tmp_path / "no model", "--plot", tmp_path / "curve.doc")
    assert done.exit_code == 1 and "curve.doc is not the name of a picture" in done.stderr
    monkeypatch.delitem(sys.modules, "modeling_anee.pictures.drawing")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = scored(workshop, tmp_path / "no model", "--plot", tmp_path / "curve.png")
    assert done.exit_code == 1 and "--plot needs matplotlib: pip install 'modeling-anee[plots]'" in done.stderr
