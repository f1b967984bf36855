"""The wheel and the source distribution, what they ask for, and what works without any extra."""

import email
import json
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import modeling_anee

from . import children
from .tiny import tiny_base, wrap
from .workshop import tiny_tokenizer


ROOT = Path(__file__).parents[1]
# What a checkout has besides what is in git.
NOT_SOURCE = (".git", ".venv*", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "build", "dist")
NOT_SOURCE += ("anee_demo", "anee_bench.json")  # what `make demo` and `make bench` leave
EXTRAS = "tested plots demo train train-data tensorboard evaluate lm-eval pool energy resources serve dev".split()
# What only extras bring; pydantic and yaml also come with other libraries.
LIBRARIES = "accelerate datasets evaluate gguf lm_eval matplotlib peft psutil pynvml simpful tensorboard".split()
# Run with the unpacked wheel and none of these libraries.
SCRIPT = """
import json, sys
sys.modules |= dict.fromkeys(json.loads(sys.argv[1]))
import modeling_anee, torch
from typer.testing import CliRunner
from modeling_anee.cli.main import app

def anee(*arguments):
    done = CliRunner().invoke(app, arguments)
    return {"code": done.exit_code, "output": done.output, "error": repr(done.exception)}

model = modeling_anee.AneeForCausalLM.from_pretrained("artifact")
ids = model.generate(torch.tensor([[5, 6, 7]]), energy_budget=0.6, max_new_tokens=4, do_sample=False)
verbs = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]
print(json.dumps({
    "file": modeling_anee.__file__,
    "ids": ids.tolist(),
    "help": {verb: anee(verb, "--help") for verb in verbs},
    "run": {call: anee(*call.split()) for call in sys.argv[2:]},
}))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the source, and the folder with what is built from it: first the sdist, from that the wheel."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source"]
    done = children.run(command, folder / "printed")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (file,) = (built / "dist").glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(built / "site")
    return file


@pytest.fixture(scope="module")
def metadata(wheel, built):
    (file,) = (built / "site").glob("*.dist-info/METADATA")
    return email.message_from_string(file.read_text(encoding="utf-8"))


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_has_the_package_and_nothing_else(wheel, built):
    assert wheel.name == f"modeling_anee-{modeling_anee.__version__}-py3-none-any.whl"
    names = files_of(built / "site")
    package = {name for name in names if ".dist-info/" not in name}
    assert package == {f"modeling_anee/{name}" for name in files_of(built / "source" / "modeling_anee")}
    needed = "py.typed", "training/fit.py", "cli/main.py", "machines/descriptions/h100.json"
    assert {f"modeling_anee/{name}" for name in needed} <= package
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_source_distribution_is_the_checkout(built):
    (file,) = (built / "dist").glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    hidden = {name for name in files_of(built / "source") if name.startswith(".")}
    made = {"PKG-INFO", "setup.cfg"}
    found = {name for name in names - made if ".egg-info/" not in name}
    assert found == {name for name in files_of(built / "source") - hidden if ".egg-info/" not in name}


def test_the_metadata_names_dependencies_extras_and_the_command(metadata, built):
    assert metadata["Version"] == modeling_anee.__version__ and metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("Provides-Extra") == EXTRAS
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.split(r"[<>=]", line)[0] for line in needed} == {"rich", "safetensors", "torch", "transformers", "typer"}
    (entry,) = (built / "site").glob("*.dist-info/entry_points.txt")
    assert entry.read_text().split() == ["[console_scripts]", "anee", "=", "modeling_anee.cli.main:app"]


def test_every_extra_that_a_message_names_exists():
    named = set()
    for file in (ROOT / "modeling_anee").rglob("*.py"):
        for group in re.findall(r"modeling-anee\[([\w,-]+)\]", file.read_text(encoding="utf-8")):
            named |= set(group.split(","))
    assert "train" in named and named <= set(EXTRAS)


def test_the_wheel_works_without_extras_and_says_which_one_a_verb_needs(wheel, built, tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    model = wrap(tiny_base(), "plan", base_model_name_or_path=str(tmp_path / "base"))
    model.save_pretrained(tmp_path / "artifact", tokenizer=tiny_tokenizer())
    calls = {
        "fit recipe.yaml --output run": "[train]",
        f"compare --text {__file__}": "[demo]",
        "generate --prompt w5": "[demo]",
        "demo": "[plots]",
    }
    environment = {"PYTHONPATH": str(built / "site"), "ANEE_CACHE": str(tmp_path / "cache"), "PATH": ""}
    command = [sys.executable, "-c", SCRIPT, json.dumps(LIBRARIES), *calls]
    done = children.run(command, tmp_path / "printed", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert Path(report["file"]).parent == built / "site" / "modeling_anee"
    ids = model.generate(torch.tensor([[5, 6, 7]]), energy_budget=0.6, max_new_tokens=4, do_sample=False)
    assert report["ids"] == ids.tolist()
    assert len(report["help"]) >= 8 and all(said["code"] == 0 for said in report["help"].values()), report["help"]
    for call, extra in calls.items():
        said = report["run"][call]
        assert said["code"] == 1 and f"pip install 'modeling-anee{extra}'" in said["output"], (call, said)
    assert not (tmp_path / "cache").exists()  # said before anything is fetched


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment_and_works_there(wheel, tmp_path):
    """Needs a package index: torch (the version of the Makefile) and all the rest are installed."""
    pinned = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    python = tmp_path / "venv" / "bin" / "python"
    for command in (
        [sys.executable, "-m", "venv", tmp_path / "venv"],
        [python, "-m", "pip", "install", "--quiet", pinned],
        [python, "-m", "pip", "install", "--quiet", wheel],
        [python, "-m", "pip", "check"],
    ):
        done = children.run(command, tmp_path / "printed", limit=900)
        assert done.returncode == 0, done.stdout + done.stderr
    tiny_base().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    command = [
        python.with_name("anee"),
        "generate",
        "--model",
        tmp_path / "base",
        "--prompt",
        "w5 w6",
        "--energy-budget",
        "0.6",
    ]
    done = children.run([*command, "--stats"], tmp_path / "printed", cwd=tmp_path, env={})
    assert done.returncode == 0 and "mean cost 0.6" in done.stderr, done.stderr
    everything = f"{wheel}[{','.join(EXTRAS)}]"
    command = [python, "-m", "pip", "install", "--quiet", "--dry-run", everything]
    resolved = children.run(command, tmp_path / "printed", limit=900)
    assert resolved.returncode == 0, resolved.stderr
