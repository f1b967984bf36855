"""`anee pool`, run as a user would on tiny models: files, output, reasons, errors of one line."""

import json

import pytest
from matplotlib import image
from typer.testing import CliRunner

from modeling_anee.cli.main import app
from modeling_anee.pool.config import FILE_NAME, read_config

from .pools import make_models
from .workshop import words


pytest.importorskip("simpful"), pytest.importorskip("sklearn")


def anee(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with models, a text, and a pool that the command made."""
    folder = make_models(tmp_path_factory.mktemp("verbs"))
    lines = words(4000).split("\n")
    (folder / "text.txt").write_text("\n".join(lines))
    records = [{"question": line, "answer": line[::-1]} for line in lines[:12]]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    done = make(folder, folder / "pool")
    assert done.exit_code == 0, done.output
    return folder


def make(folder, output, *more):
    rungs = (f"words={folder / 'first'}", f"letters={folder / 'second'}")
    options = [part for rung in rungs for part in ("--rung", rung)]
    return anee(
        "pool", "make", output, *options, "--text", folder / "text.txt", "--text", folder / "pairs.jsonl", "--limit", 6, *more
    )


def test_make_writes_a_file_that_has_all(made):
    config = read_config(made / "pool" / FILE_NAME)
    assert set(config.measured) == {"words", "letters"} and len(config.learned) == len(config.mixture) == 3
    assert set(config.measured["words"].losses) == {"text.txt", "pairs.jsonl"}
    assert config.fuzzy is not None and config.cascade is not None


def test_measure_prints_the_table_and_writes_figures_and_a_picture(made, tmp_path):
    figures, plot = tmp_path / "figures.json", tmp_path / "points.png"
    done = anee(
        "pool", "measure", made / "pool", "--text", made / "text.txt", "--limit", 4, "--output", figures, "--plot", plot
    )
    assert done.exit_code == 0, done.output
    assert "| policy | setting | MB a byte | text.txt |" in done.stdout and "| always | letters |" in done.stdout
    report = json.loads(figures.read_text())
    assert len(report["samples"]) == 4 and "text" not in report["samples"][0]
    assert all(row["over"] in (None, 0) for row in report["rows"]) and image.imread(plot).ndim == 3


def test_generate_says_which_rung_served_and_why(made):
    done = anee(
        "pool",
        "generate",
        made / "pool",
        "--prompt",
        "w3 w4 w5",
        "--max-new-tokens",
        3,
        "--policy",
        "complexity",
        "--explain",
        "--energy-of",
        "made-up-accelerator",
    )
    assert done.exit_code == 0, done.output
    assert (
        "by complexity: complexity" in done.stderr
        and "Loading" not in done.stderr
        and "IF (" in done.stderr
        and "perplexity" in done.stderr
    )
    assert "J per new token" in done.stderr and done.stdout.strip()


def test_rules_are_drawn_and_printed(made, tmp_path):
    done = anee("pool", "rules", made / "pool", "--output", tmp_path / "rules.png")
    assert done.exit_code == 0 and "THEN (complexity IS HIGH)" in done.stdout
    assert image.imread(tmp_path / "rules.png").ndim == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "POOL", "--prompt", "w3", "--energy-budget", "0.01"), "error: energy_budget=0.01 affords no rung"),
        (("generate", "POOL", "--prompt", "w3", "--policy", "best"), "error: policy='best' is not allowed"),
        (("generate", "nowhere/./x", "--prompt", "w3"), "error: "),
        (("measure", "POOL", "--text", "nowhere.txt"), "error: nowhere.txt does not exist"),
        (("rules", "POOL", "--output", "rules.xyz"), "error: rules.xyz is not the name of a picture"),
    ],
)
def test_errors_are_one_line(made, arguments, message):
    done = anee("pool", *(made / "pool" if word == "POOL" else word for word in arguments))
    assert done.exit_code == 1 and done.stderr.splitlines()[-1].startswith(message)


def test_make_refuses_before_any_work_and_writes_nothing(made, tmp_path):
    for more, message in (
        (("--glance", "huge"), "--glance huge is not allowed: the rungs are words, letters"),
        (("--prices", "cheap"), "--prices cheap is not allowed"),
        (("--rung", "words=again"), "two rungs have one name"),
        (("--rung", "nothing"), "must be NAME=MODEL"),
    ):
        done = make(made, tmp_path / "pool", *more)
        assert done.exit_code == 1 and message in done.stderr
    assert not (tmp_path / "pool").exists()
