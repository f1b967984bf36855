"""The boundary of the command: any error is one line and an exit code; files come before text, whatever standard output is."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from safetensors import SafetensorError
from transformers import AutoTokenizer
from typer.testing import CliRunner

from modeling_anee.cli.console import Output, deliver
from modeling_anee.cli.guard import guarded
from modeling_anee.cli.main import app
from modeling_anee.data import smollm2

from .tiny import BRIDGES, tiny_base, wrap
from .workshop import make_workshop, recipe_fields, words


def verb_that(action):
    """A command whose verb does something."""

    def verb(number: int = 3) -> None:
        action()

    command = typer.Typer()
    command.command()(guarded(verb))
    return command


def raising(error):
    def action():
        raise error

    return verb_that(action)


class Odd(Exception):
    """What no list of expected errors would have."""


ERRORS = {
    "x.json: No space left on device": OSError(errno.ENOSPC, "No space left on device", "x.json"),
    "copy.json: No space left on device": OSError(errno.ENOSPC, "No space left on device", "x.json", None, "copy.json"),
    "budget=2 is not allowed": ValueError("budget=2 is not allowed"),
    "r.yaml is not a recipe: a=1 is wrong; b=2 too": ValueError("r.yaml is not a recipe:\n  a=1 is wrong\n  b=2  too\n"),
    "KeyError: 'name' (--debug": KeyError("name"),
    "Odd (--debug": Odd(),
    "AssertionError (--debug": AssertionError(),
    "SafetensorError: header too large (--debug": SafetensorError("header too large"),
    "RecursionError: too deep": RecursionError("too deep"),
    "out of memory (MemoryError)": MemoryError(),
    "out of memory (DefaultCPUAllocator: can't allocate memory: you": RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
    ),
    "out of memory (unable to mmap": RuntimeError("unable to mmap 538 bytes from file <x>: Cannot allocate memory (12)"),
    "FIFO: Broken pipe": BrokenPipeError(errno.EPIPE, "Broken pipe", "FIFO"),
}


@pytest.mark.parametrize("line", ERRORS)
def test_any_error_is_one_line_and_a_traceback_is_for_those_who_ask(line):
    done = CliRunner().invoke(raising(ERRORS[line]), [])
    assert done.exit_code == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {line}") and done.stderr.count("\n") == 1
    for call in ({"args": ["--debug"]}, {"args": [], "env": {"ANEE_DEBUG": "1"}}):
        done = CliRunner().invoke(raising(ERRORS[line]), **call)
        assert done.exit_code == 1 and "Traceback" in done.stderr and f"\nerror: {line}" in done.stderr


def test_an_interrupt_is_one_line():
    done = CliRunner().invoke(raising(KeyboardInterrupt()), [])
    assert done.exit_code == 130 and done.stderr == "interrupted\n"


def test_a_verb_keeps_its_options_and_its_own_exit_code():
    assert CliRunner().invoke(verb_that(lambda: None), ["--number", "4"]).exit_code == 0
    assert CliRunner().invoke(verb_that(lambda: None), ["--number", "four"]).exit_code == 2
    assert CliRunner().invoke(raising(typer.Exit(7)), []).exit_code == 7
    assert "--debug" in CliRunner().invoke(verb_that(lambda: None), ["--help"]).output


def test_versions_and_short_help():
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0 and done.stdout.startswith("anee ") and "transformers" in done.stdout
    assert CliRunner().invoke(app, ["-h"]).exit_code == 0
    assert "--text" in CliRunner().invoke(app, ["perplexity", "-h"]).output


# Standard output that is closed, full, or not read to its end


@pytest.fixture
def run_with(monkeypatch, capsys):
    """Run a command with a stream as its standard output: its exit code, and what it said on stderr."""

    def run(stream, command, *arguments):
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as ended:
            command([str(argument) for argument in arguments])
        if stream is not None:
            stream.close()  # which writes what is still held back
        return ended.value.code, capsys.readouterr().err

    return run


def unread_pipe():
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")


STREAMS = {
    "full": (lambda: open("/dev/full", "w"), 1, "error: standard output: No space left on device\n"),
    "unread": (unread_pipe, 141, ""),
    "closed": (lambda: None, 0, ""),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_what_standard_output_is_takes_no_file(tmp_path, run_with, stream):
    output = Output("figures", tmp_path / "file", lambda file: file.write_text("x"))
    opened, code, message = STREAMS[stream]
    assert run_with(opened(), verb_that(lambda: deliver("text", output))) == (code, message)
    assert (tmp_path / "file").read_text() == "x"
    assert run_with(opened(), verb_that(lambda: print("not flushed"))) == (code, message)


def test_a_file_that_cannot_be_written_takes_no_text():
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    outputs = Output("figures", Path("a.json"), full), Output("plot", None, full)
    done = CliRunner().invoke(verb_that(lambda: deliver("text", *outputs)), [])
    assert done.exit_code == 1 and done.stdout == "text\n" and done.stderr == "error: a.json: No space left on device\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base, an artifact over it, text and a recipe; the two stand in for those of the demo."""
    folder = tmp_path_factory.mktemp("place")
    make_workshop(folder)
    (folder / "text.txt").write_text(words(100))
    (folder / "base").rename(folder / smollm2.REPOSITORY.rsplit("/", 1)[-1])
    (folder / "base").symlink_to(smollm2.REPOSITORY.rsplit("/", 1)[-1])
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    wrap(tiny_base(), "plan", **smollm2.BASE_FIELDS, **BRIDGES).save_pretrained(folder / "artifact", tokenizer=tokenizer)
    recipe = recipe_fields(folder, anee={"controller": "plan"}, stages={})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    report = {"text": "t", "length": 8, "windows": 1, "windows_sha256": "0", "cost_unit": "bytes", "controller": "plan"}
    row = {"budget": 0.6, "mean_cost": 0.6, "perplexity": 2.0, "ratio": 1.5, "standard_error": 0.1}
    row |= {"ratio_standard_error": 0.1, "tokens": 8}
    (folder / "scores.json").write_text(json.dumps(report | {"dtype": "float32", "stride": 8, "rows": [row]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ANEE_BASE_PATH", str(folder))
        patch.setattr(smollm2, "SHIPPED_ARTIFACT", folder / "artifact")
        yield folder


SMALL = ("--text", "text.txt", "--length", "16", "--limit", "2", "--budgets", "0.6")
VERBS = {
    "generate": ("--prompt", "w5", "--max-new-tokens", "2", "--page", "FILE.html"),
    "demo": ("--max-new-tokens", "2", "--output", "FILE"),
    "drafts": ("--text", "text.txt", "--length", "8", "--prompts", "2", "--new-tokens", "4", "--output", "FILE"),
    "perplexity": (*SMALL, "--output", "FILE"),
    "compare": (*SMALL, "--output", "FILE"),
    "samples": ("--max-new-tokens", "1", "--budgets", "0.6", "--output", "FILE"),
    "depth": ("--text", "text.txt", "--output", "FILE.png"),
    "curve": ("--figures", "scores.json", "--output", "FILE.png"),
    "fit": ("recipe.yaml", "--output", "FILE"),
    "card": ("artifact", "--recipe", "recipe.yaml"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_writes_its_files_though_standard_output_is_full(place, run_with, verb):
    arguments = [word.replace("FILE", f"out-{verb}") for word in VERBS[verb]]
    code, message = run_with(open("/dev/full", "w"), app, verb, *arguments)
    assert code == 1 and message.endswith("error: standard output: No space left on device\n"), message
    written = [word for word in arguments if word.startswith("out-")] or ["artifact/README.md"]
    assert (place / written[0]).exists()
    if verb in ("demo", "fit"):
        assert list((place / written[0]).iterdir())


def test_a_process_whose_reader_is_gone_ends_quietly(place):
    call = [sys.executable, "-m", "modeling_anee.cli.main", "curve", "--figures", "scores.json", "--output", "process.png"]
    with unread_pipe() as stdout:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(call, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, cwd=place)
    assert (done.returncode, done.stderr) == (141, "") and (place / "process.png").is_file()
