"""`--text` in every verb that has it: read and tokenised in the same way, and what can't be is named before the work."""

import gzip
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from modeling_anee.cli.main import app
from modeling_anee.cli.texts import check_text_option
from modeling_anee.data.encoding import encode_text
from modeling_anee.data.text import STDIN
from modeling_anee.data.windows import digest_of, full_windows, windows
from modeling_anee.evaluation.processes import Processes
from modeling_anee.pictures import depth

from .tiny import tiny_base
from .workshop import tiny_tokenizer, words


TEXT = words(300)
VERBS = {
    "perplexity": ("--length", 32, "--budgets", "1.0,0.6"),
    "compare": ("--length", 32, "--budgets", "0.8"),
    "depth": ("--tokens", 30, "--energy-budget", 0.6),
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A base whose tokenizer puts a BOS token before every text, and a text."""
    folder = tmp_path_factory.mktemp("workshop")
    tiny_base().save_pretrained(folder / "base")
    tiny_tokenizer(begins_with_bos=True).save_pretrained(folder / "base")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The tokens of the texts whose depth is drawn."""
    found = []
    monkeypatch.setattr(depth, "draw_depth", lambda trace, path, tokens: found.append(tokens))
    return found


def anee(verb, text, base, *arguments, **kwargs):
    call = [verb, "--model", base, "--text", text, *VERBS[verb], *arguments]
    return CliRunner().invoke(app, [str(argument) for argument in call], **kwargs)


def report_of(verb, text, base, folder, *arguments, **kwargs):
    done = anee(verb, text, base, "--output", folder / "report.json", *arguments, **kwargs)
    assert done.exit_code == 0, done.output
    return json.loads((folder / "report.json").read_text())


def test_every_window_begins_as_the_tokenizer_begins_every_text(workshop, tmp_path, drawn):
    ids = encode_text(tiny_tokenizer(), TEXT)
    report = report_of("perplexity", workshop / "text.txt", workshop / "base", tmp_path)
    assert report["windows_sha256"] == digest_of(windows(ids, 32, start=[1])) and report["stride"] == 31
    assert [row["tokens"] for row in report["rows"]] == [300, 300], "every token of the text is scored"
    report = report_of("perplexity", workshop / "text.txt", workshop / "base", tmp_path, "--stride", 10, "--limit", 2)
    assert report["windows_sha256"] == digest_of(windows(ids, 32, 10, [1], 2))
    report = report_of("compare", workshop / "text.txt", workshop / "base", tmp_path)
    assert report["windows_sha256"] == digest_of(full_windows(ids, 32, [1])) and report["length"] == 32
    assert anee("depth", workshop / "text.txt", workshop / "base").exit_code == 0
    assert [token.strip() for token in drawn[0]] == ["<s>", *TEXT.split()[:29]]


def test_a_text_may_come_from_the_standard_input_and_be_written_as_other_systems_do(workshop, tmp_path, drawn):
    other = gzip.compress(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    for verb in ("perplexity", "compare"):
        file = report_of(verb, workshop / "text.txt", workshop / "base", tmp_path)
        piped = report_of(verb, "-", workshop / "base", tmp_path, input=other)
        assert file.pop("text") == "text.txt" and piped.pop("text") == "standard input" and piped == file
    assert anee("depth", "-", workshop / "base", input=other).exit_code == 0
    assert anee("depth", workshop / "text.txt", workshop / "base").exit_code == 0
    assert drawn[0] == drawn[1] and len(drawn[0]) == 30


@pytest.mark.parametrize("verb", VERBS)
def test_a_text_that_cannot_be_read_is_named_before_the_model_is_looked_for(tmp_path, verb):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "latin").write_bytes(b"caf\xe9 bar")
    for name, message in {
        "gone": "gone does not exist",
        ".": "is a folder: a text must be a file",
        "empty": "empty is empty: there is no text in it",
        "latin": "latin is not text in UTF-8: invalid continuation byte at byte 3, in line 1",
    }.items():
        done = anee(verb, tmp_path / name, tmp_path / "no model")
        assert done.exit_code == 1 and message in done.stderr and "no model" not in done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_an_empty_standard_input_is_an_error(workshop, verb):
    done = anee(verb, "-", workshop / "base", input=b"")
    assert done.exit_code == 1 and "--text - is empty" in done.stderr


def test_several_processes_cannot_share_the_standard_input(workshop):
    check_text_option(workshop / "text.txt", Processes(0, 2))
    with pytest.raises(ValueError, match="--text - is not allowed with several processes"):
        check_text_option(STDIN, Processes(0, 2))


@pytest.mark.parametrize("verb", [*VERBS, "samples"])
def test_a_model_that_computes_no_numbers_gives_no_figures(workshop, tmp_path, verb):
    tiny_base().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], math.nan)
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    output = tmp_path / ("depth.png" if verb == "depth" else "report.json")
    if verb == "samples":
        call = ["samples", "--model", tmp_path / "base", "--max-new-tokens", 2, "--output", output]
        done = CliRunner().invoke(app, list(map(str, call)))
        message = "at budget 1 is none: the model's logits are not finite"
    else:
        done = anee(verb, workshop / "text.txt", tmp_path / "base", "--output", output)
        message = {"depth": "the text at budget 0.6: the logits are not finite"}.get(verb, "at budget 1 has no score: the loss")
    assert done.exit_code == 1 and message in done.stderr and not output.exists(), done.output
