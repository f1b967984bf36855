"""The two forms of an artifact: self-contained, which loads without the package, and that of a checkout, which says why not."""

import json
import os

import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

from modeling_anee import AneeForCausalLM
from modeling_anee.cli import making
from modeling_anee.cli.main import app
from modeling_anee.publishing.export import AUTO_MAP_WITHOUT_CODE, auto_map, classes_of, composed

from .test_base_loading import lay_out
from .tiny import BRIDGES, tiny_base, token_ids, wrap
from .workshop import tiny_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An artifact as `save_pretrained` writes it, with a card."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_base().save_pretrained(folder / "base")
    model = wrap(tiny_base(), "plan", base_model_name_or_path=str(folder / "base"), energy_budget=0.6, **BRIDGES)
    model.save_pretrained(folder / "artifact", tokenizer=tiny_tokenizer())
    (folder / "artifact" / "README.md").write_text("# Card\n")
    return folder / "artifact"


def anee_export(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def exported(*arguments):
    done = anee_export(*arguments)
    assert done.exit_code == 0, done.output
    return done


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def checkout(saved, tmp_path):
    """The artifact as a checkout has it."""
    exported(saved, tmp_path / "checkout", "--without-code")
    return tmp_path / "checkout"


def test_what_is_composed_is_what_save_pretrained_writes(saved, checkout, tmp_path):
    exported(checkout, tmp_path / "out")
    assert content(tmp_path / "out") == content(saved)
    before, after = content(checkout), content(saved)
    assert set(after) - set(before) == {name for name in after if name.endswith(".py")} and len(after) > len(before)
    changed = [name for name in before if before[name] != after[name]]
    assert changed == ["config.json"]
    assert json.loads(before["config.json"]) | {"auto_map": auto_map(classes_of({}))} == json.loads(after["config.json"])


def test_a_checkout_s_artifact_loads_with_the_package_and_saves_itself_whole(saved, checkout, tmp_path):
    loaded, expected = (AneeForCausalLM.from_pretrained(folder) for folder in (checkout, saved))
    assert (loaded(token_ids()).logits == expected(token_ids()).logits).all()
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == auto_map(classes_of({}))
    again, first = content(tmp_path / "again"), content(saved)
    assert {name for name in again if again[name] != first[name]} <= {"config.json"}


LOAD = """
import builtins, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

def asked(*words):
    raise SystemExit(f"asked: {words}")

builtins.input = asked
name = sys.argv[1]
for flag in (True, False):
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=flag)
    assert tokenizer("w5 w6").input_ids == [5, 6]
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
print(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False).tolist())
"""


def test_a_composed_folder_loads_without_the_package_and_without_a_question(checkout, forks):
    with composed(checkout) as folder:
        done = forks.run(LOAD, folder)
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([[5, 6, 7]])
    expected = AneeForCausalLM.from_pretrained(checkout).generate(ids, max_new_tokens=6, do_sample=False)
    assert json.loads(done.stdout) == expected.tolist()


def test_a_checkout_s_artifact_says_what_to_do_without_the_package(checkout, forks):
    done = forks.run(LOAD, checkout)
    assert done.returncode == 1 and "asked" not in done.stderr
    (advice,) = AUTO_MAP_WITHOUT_CODE.values()
    assert advice.startswith("import_modeling_anee_first_or_run_anee_export.")
    assert advice.split(".")[0] in done.stderr.splitlines()[-1], done.stderr


def test_code_of_another_version_is_replaced_and_nothing_else(saved, tmp_path):
    with composed(saved) as old:
        (old / "bridges.py").write_text("from .gone_since import Something\n")
        (old / "gone_since.py").write_text("Something = None\n")
        (old / "tokenization_own.py").write_text("from . import nothing\n")
        (old / ".cache").mkdir()
        exported(old, tmp_path / "new")
        found = content(tmp_path / "new")
        assert found == content(saved) | {"tokenization_own.py": b"from . import nothing\n"}


def test_the_model_can_be_named_in_every_way(saved, tmp_path, monkeypatch):
    exported(tmp_path / "a", "--model", saved)
    (tmp_path / "b").mkdir()
    exported(saved, tmp_path / "b")
    monkeypatch.setattr(making, "shipped_artifact", lambda: saved)
    exported(tmp_path / "deeper" / "c")
    assert content(tmp_path / "a") == content(tmp_path / "b") == content(tmp_path / "deeper" / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "deeper"]


def test_an_artifact_of_the_hub_gets_new_code(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    lay_out(tmp_path / "hub", "user/artifact", saved)
    exported("user/artifact", tmp_path / "out")
    assert content(tmp_path / "out") == content(saved)
    done = anee_export("user/nothing", tmp_path / "other")
    assert done.exit_code == 1 and done.stderr.startswith("error: the artifact 'user/nothing' is not a folder")
    done = anee_export("../nothing", tmp_path / "other")
    assert done.exit_code == 1 and "'../nothing' is not a folder" in done.stderr


def test_a_base_inside_goes_with_it_and_one_beside_it_is_refused(tmp_path):
    model = wrap(tiny_base(), "plan", base_model_name_or_path="./base")
    model.save_pretrained(tmp_path / "artifact")
    tiny_base().save_pretrained(tmp_path / "artifact" / "base")
    exported(tmp_path / "artifact", tmp_path / "out")
    assert (AneeForCausalLM.from_pretrained(tmp_path / "out")(token_ids()).logits == model(token_ids()).logits).all()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"base_model_name_or_path": "../artifact/base"}))
    done = anee_export(tmp_path / "out", tmp_path / "other")
    assert done.exit_code == 1 and "'../artifact/base'" in done.stderr


def no_artifact(folder):
    tiny_base().config.save_pretrained(folder)


def broken(folder):
    (folder / "config.json").write_text("{")


def dangling(folder):
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("nowhere")


def pipe(folder):
    os.mkfifo(folder / "pipe")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (no_artifact, "model_type='llama'"),
        (broken, "config.json is not JSON"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (dangling, "README.md is a link to nowhere"),
        (pipe, "pipe is not a regular file"),
    ],
)
def test_what_can_t_be_exported_is_one_line_and_leaves_nothing(saved, tmp_path, spoil, expected):
    with composed(saved) as folder:
        spoil(folder)
        done = anee_export(folder, tmp_path / "out")
    assert done.exit_code == 1 and expected in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(saved, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "notes.txt"):
        done = anee_export(saved, target)
        assert done.exit_code == 1 and "must be new or empty" in done.stderr
    for wrong in (["a", "b", "c"], ["a", "b", "--model", "c"]):
        assert anee_export(*wrong).exit_code == 1
    assert content(tmp_path) == {"notes.txt": b"mine"}
