"""Weights that can't be read: pointers of git-LFS, and truncated files, wherever weights are read."""

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from modeling_anee import AneeForCausalLM
from modeling_anee.cli.main import app
from modeling_anee.data.bases import Base, load_base_of
from modeling_anee.publishing.card import weight_shapes
from modeling_anee.training.start import Start
from modeling_anee.weight_files import lfs_pointers

from .tiny import tiny_base, wrap
from .workshop import make_workshop, recipe_of


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 538090408\n"


@pytest.fixture
def folder(tmp_path):
    """A folder with a base and an artifact over it."""
    make_workshop(tmp_path)
    model = wrap(tiny_base(), "plan", base_model_name_or_path=str(tmp_path / "base"), bridge_rank=2)
    model.save_pretrained(tmp_path / "artifact", tokenizer=AutoTokenizer.from_pretrained(tmp_path / "base"))
    return tmp_path


READERS = {
    "base": {
        "from_base": lambda folder: AneeForCausalLM.from_base(folder / "base"),
        "from_pretrained": lambda folder: AneeForCausalLM.from_pretrained(folder / "artifact"),
        "recipe": lambda folder: load_base_of(Base(name=str(folder / "base"))),
    },
    "artifact": {
        "from_pretrained": lambda folder: AneeForCausalLM.from_pretrained(folder / "artifact"),
        "start": lambda folder: Start.of(recipe_of(folder, start=str(folder / "artifact"))),
        "card": lambda folder: weight_shapes(folder / "artifact"),
    },
}


@pytest.mark.parametrize("whose, reader", [(whose, reader) for whose in READERS for reader in READERS[whose]])
def test_weights_that_cannot_be_read_are_named(folder, whose, reader):
    weights = folder / whose / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_text(POINTER)
    with pytest.raises(OSError, match=r"model\.safetensors in .* pointers of git-LFS instead of the files: get these with"):
        READERS[whose][reader](folder)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=f"the weights in '{folder / whose}.* are truncated or not safetensors"):
        READERS[whose][reader](folder)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_the_command_says_it_in_one_line(folder, file):
    (folder / "base" / file).write_text(POINTER)
    done = CliRunner().invoke(app, ["generate", "--model", str(folder / "base"), "--prompt", "w5"])
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    assert f"error: {file} in '{folder / 'base'}' are pointers of git-LFS" in done.stderr


def test_only_what_is_needed_counts(tmp_path):
    for name in ("map.png", "README.md", "model.safetensors"):
        (tmp_path / name).write_text(POINTER)
    (tmp_path / "config.json").write_text("{}")
    assert lfs_pointers(tmp_path) == lfs_pointers(tmp_path / "model.safetensors") == ["model.safetensors"]
    assert lfs_pointers(tmp_path / "gone") == []
