"""Publishing with the real client over HTTP, against a small Hub on loopback."""

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
import yaml
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import hub as transformers_hub
from typer.testing import CliRunner

from modeling_anee.cli.guard import guarded
from modeling_anee.publishing import stranger as verifying
from modeling_anee.publishing.export import export
from modeling_anee.publishing.plan import PlannedFile
from modeling_anee.publishing.push import PublishError, Target, check, differences

from .hub_server import Hub
from .tiny import tiny_base, token_ids, wrap
from .workshop import make_workshop, recipe_fields, tiny_tokenizer


# The client itself uploads in a way that its HTTP library would rather see otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SCRIPTS = Path(__file__).parent.parent / "hub_scripts"
PLANS = ["PPSP", "PSSF"]
BUDGETS = (1.0, 0.7, 0.5)
PNG = b"\x89PNG\r\n\x1a\n\0 not much of a picture"


@contextlib.contextmanager
def running_hub(home):
    """A Hub that this process and those that it starts take for the real one, logged in as `user`."""
    with Hub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(transformers_hub, "_hf_api", None)
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_TOKEN": "hf_user"}
        for name, value in (environment | {"NO_PROXY": "127.0.0.1,localhost"}).items():
            patch.setenv(name, value)
        for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "ANEE_BASE_PATH"):
            patch.delenv(name, raising=False)
        yield hub


@pytest.fixture
def hub(tmp_path):
    with running_hub(tmp_path / "hf") as hub:
        yield hub


def script(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        return importlib.import_module(name)


def call(name, *arguments):
    """Run a script in this process."""
    app = typer.Typer()
    module = script(name)
    app.command()(guarded(module.card if name == "make_model_card" else module.main))
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def push(artifact, name="user/artifact", *options):
    return call("push_artifact", artifact, name, "--no-dry-run", *options)


def on_hub(hub, name="user/artifact", revision="main", kind="model"):
    """Content of the files of a repository, by name."""
    files = hub.repository(name, kind).files(revision)
    return {path: blob.data for path, blob in files.items() if path != ".gitattributes"}


def in_folder(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def save_artifact(folder, scale=1.0):
    """An artifact with a card and pictures, whose base is `user/base` on the Hub."""
    model = wrap(tiny_base(), "plan", plans=PLANS, bridge_rank=4, ffn_bridge_rank=4, base_model_name_or_path="user/base")
    with torch.no_grad():
        for parameter in model.bridges.parameters():
            parameter.mul_(scale)
    model.save_pretrained(folder, tokenizer=tiny_tokenizer())
    anee = {"controller": "plan", "bridge_rank": 4, "ffn_bridge_rank": 4}
    recipe, curve, heatmap = (folder.with_name(name) for name in ("recipe.yaml", "curve.png", "map.png"))
    recipe.write_text(yaml.safe_dump(recipe_fields(folder.parent, anee=anee)))
    curve.write_bytes(PNG)
    heatmap.write_bytes(PNG + b"another")
    done = call("make_model_card", folder, "--recipe", recipe, "--curve", curve, "--heatmap", heatmap)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The artifact that all tests start from."""
    return save_artifact(tmp_path_factory.mktemp("made") / "artifact")


@pytest.fixture
def artifact(made, tmp_path):
    """A copy that a test may spoil."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    for name, content in in_folder(made).items():
        (folder / name).write_bytes(content)
    return folder


def test_a_dry_run_lists_every_file_and_asks_nothing(hub, artifact):
    (artifact / ".cache").mkdir()
    done = call("push_artifact", artifact, "user/artifact", "--revision-tag", "v1")
    assert done.exit_code == 0 and hub.requests == [], done.output
    for path in artifact.glob("[!.]*"):
        assert re.search(rf"^{re.escape(path.name)} +{path.stat().st_size:,} ", done.stdout, re.MULTILINE), path
    assert re.search(r"model.safetensors .* LFS +[0-9a-f]{64}$", done.stdout, re.MULTILINE)
    assert re.search(r"config.json .* regular +[0-9a-f]{64}$", done.stdout, re.MULTILINE)
    assert "left out: .cache" in done.stdout and "nothing was sent" in done.stdout


def test_a_push_is_one_commit_with_a_tag(hub, artifact):
    done = push(artifact, "user/artifact", "--revision-tag", "v1")
    assert done.exit_code == 0, done.output
    assert on_hub(hub) == on_hub(hub, revision="v1") == in_folder(artifact)
    assert sum("/commit/" in request for request in hub.requests) == 1
    files = hub.repository("user/artifact").files("main")
    assert {path for path, blob in files.items() if blob.lfs} == {"model.safetensors", "budget_curve.png", "heatmap.png"}
    assert "revision='v1', trust_remote_code=True)" in done.stdout


def test_a_second_push_adds_a_commit_and_the_same_content_none(hub, artifact):
    push(artifact)
    first = hub.repository("user/artifact").branches["main"]
    done = push(artifact, "user/artifact", "--revision-tag", "v1")
    assert done.exit_code == 0 and "which was there already" in done.stdout, done.output
    assert hub.repository("user/artifact").branches["main"] == hub.repository("user/artifact").tags["v1"] == first
    (artifact / "LICENSE").write_text("new")
    assert push(artifact).exit_code == 0 and on_hub(hub) == in_folder(artifact)
    assert "LICENSE" not in on_hub(hub, revision=first)


@pytest.mark.parametrize(
    ("request_", "status"), [("PUT /lfs/", 403), ("/objects/batch", 403), ("/commit/", 500)], ids=["put", "batch", "commit"]
)
def test_a_broken_upload_leaves_nothing(hub, artifact, request_, status):
    hub.fail[request_] = (status, "before")
    done = push(artifact, "user/artifact", "--revision-tag", "v1")
    assert done.exit_code == 1 and "Nothing was published" in done.stderr and "deleted again" in done.stderr, done.output
    assert hub.repositories == {}
    hub.fail.clear()
    push(artifact)
    before = on_hub(hub)
    (artifact / "README.md").write_text((artifact / "README.md").read_text() + "more\n")
    (artifact / "heatmap.png").write_bytes(PNG + b"\1")  # a large file that is new
    hub.fail[request_] = (status, "before")
    done = push(artifact, "user/artifact", "--revision-tag", "v1")
    assert done.exit_code == 1 and "is still at" in done.stderr, done.output
    assert on_hub(hub) == before and hub.repository("user/artifact").tags == {}


def test_a_commit_whose_answer_is_lost_is_noticed(hub, artifact):
    hub.fail["/commit/"] = (500, "after")
    done = push(artifact, "user/artifact", "--revision-tag", "v1")
    assert done.exit_code == 0 and "the commit arrived" in done.stdout, done.output
    assert on_hub(hub, revision="v1") == in_folder(artifact)


def test_a_tag_that_fails_is_said(hub, artifact):
    hub.fail["/tag/"] = (403, "before")
    done = push(artifact, "user/artifact", "--revision-tag", "v1")
    assert done.exit_code == 1 and "all files are at" in done.stderr and on_hub(hub) == in_folder(artifact)


def test_content_that_differs_on_the_hub_is_noticed(hub, artifact):
    push(artifact)
    (artifact / "config.json").write_text("{}")
    (artifact / "heatmap.png").write_bytes(PNG + b"\1")
    (artifact / "new.py").write_text("")
    files = [PlannedFile.read(path) for path in sorted(artifact.iterdir())]
    target = Target(HfApi(), "user/artifact")
    assert differences(target, files, "main") == ["new.py is missing", "config.json differs", "heatmap.png differs"]
    with pytest.raises(PublishError, match="new.py is missing"):
        check(target, files, "main")


def test_what_must_not_happen_is_refused_before_anything_is_sent(hub, artifact):
    push(artifact, "user/artifact", "--revision-tag", "v1")
    hub.requests.clear()
    for options, expected in (
        (["user/artifact", "--private"], "is public, but --private"),
        (["user/artifact", "--revision-tag", "v1"], "has a tag 'v1' already"),
    ):
        done = push(artifact, *options)
        assert done.exit_code == 1 and expected in done.stderr and hub.writes == [], done.output
    for options in (["user/new", "--token", "hf_other"], ["user/new", "--token", "hf_unknown"]):
        done = push(artifact, *options)
        assert done.exit_code == 1 and "was sent" in done.stderr and ("model", "user/new") not in hub.repositories, done.output


def test_a_hub_that_does_not_answer_is_an_error(hub, artifact, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    done = push(artifact)
    assert done.exit_code == 1 and "can't be looked at" in done.stderr and "Nothing was sent" in done.stderr, done.output


def spoil_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"base.model.norm.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def write(folder, name, content):
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (spoil_weights, "1 tensors that are not ours, such as 'base.model.norm.weight'"),
        (lambda folder: write(folder, "model.safetensors", b"x"), "model.safetensors can't be read"),
        (lambda folder: spoil_config(folder, model_type="llama"), "model_type='llama', not 'anee'"),
        (lambda folder: spoil_config(folder, base_model_name_or_path="/models/base"), "base_model_name_or_path='/models/base'"),
        (lambda folder: write(folder, "config.json", b"[]"), "config.json can't be read"),
        (lambda folder: write(folder, "training_args.bin", b"x"), "training_args.bin may be a pickle"),
        (lambda folder: write(folder, "notes.md", b"\x80\x04."), "notes.md may be a pickle"),
        (lambda folder: write(folder, "trace.json", b"1" * 1_000_001), "trace.json is not a file of an artifact"),
        (lambda folder: (folder / "sub").mkdir(), "sub is a folder"),
        (lambda folder: (folder / "README.md").unlink(), "there is no card"),
        (lambda folder: write(folder, "README.md", b"# Only text\n"), "has no base_model, library_name"),
        (lambda folder: (folder / "heatmap.png").unlink(), "the card shows heatmap.png, which is missing"),
        (lambda folder: (folder / "notes.md").symlink_to("nowhere"), "notes.md is a link to nowhere, which does not exist"),
        (lambda folder: os.mkfifo(folder / "pipe.json"), "pipe.json is not a regular file"),
        (lambda folder: write(folder, "README.md", b"---\nlicense: \xff\n---\n"), "README.md is not UTF-8 text (byte 13)"),
        (lambda folder: write(folder, "config.json", b'{"a": "\xff"}'), "config.json is not UTF-8 text"),
        (lambda folder: write(folder, "notes.txt", b"hf_" + b"aB3" * 12), "notes.txt holds what looks like a token of the Hub"),
        (lambda folder: write(folder, "id_rsa", b""), "id_rsa looks like a secret by its name (if it is meant to be public"),
    ],
)
def test_a_folder_that_is_no_whole_artifact_is_refused(hub, artifact, spoil, expected):
    spoil(artifact)
    done = push(artifact)
    assert done.exit_code == 1 and expected in done.stderr and hub.requests == [], done.output
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


def test_all_problems_are_told_at_once(hub, artifact):
    write(artifact, "id_rsa", b"")
    write(artifact, "notes.md", b"hf_" + b"aB3" * 12)
    done = push(artifact)
    assert done.exit_code == 1 and "id_rsa looks like" in done.stderr and "; notes.md holds what" in done.stderr
    done = call("push_artifact", artifact, "user/artifact", "--allow", "id_rsa", "--allow", "notes.md")
    assert done.exit_code == 0 and "id_rsa" in done.stdout, done.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["push_artifact", "ARTIFACT", "https://huggingface.co/user/artifact"], "can't be on the Hub"),
        (["push_artifact", "ARTIFACT", "./artifact"], "can't be on the Hub"),
        (["push_artifact", "ARTIFACT", "artifact"], "no user or organisation"),
        (["push_artifact", "ARTIFACT", "user/artifact", "--revision-tag", "v 1"], "--revision-tag 'v 1' is not allowed"),
        (["push_artifact", "nowhere", "user/artifact"], "nowhere can't be published: it is not a folder"),
        (["push_metric", "user/my metric"], "can't be on the Hub"),
        (["push_metric", "user/anee_perplexity", "--revision-tag", ""], "--revision-tag '' is not allowed"),
        (["push_metric", "user/anee_perplexity", "nowhere"], "nowhere can't be published: it is not a folder"),
        (["verify_remote_load", "/models/artifact"], "can't be on the Hub"),
        (["verify_remote_load", "user/artifact", "--revision", "v 1"], "--revision 'v 1' is not allowed"),
        (["verify_remote_load", "user/artifact", "--budgets", "1,much"], "'much' is not a number"),
        (["verify_remote_load", "user/artifact", "--against", "nowhere"], "nowhere is not an artifact"),
    ],
)
def test_arguments_that_can_t_be_are_one_line_and_nothing_is_asked(hub, artifact, arguments, expected):
    done = call(*[artifact if word == "ARTIFACT" else word for word in arguments])
    assert done.exit_code == 1 and expected in done.stderr and hub.requests == [], done.output
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


def test_a_checkout_s_artifact_is_published_with_its_code(hub, artifact, tmp_path):
    export(artifact, tmp_path / "checkout", code=False)
    done = push(tmp_path / "checkout")
    assert done.exit_code == 0 and on_hub(hub) == in_folder(artifact), done.output


def test_push_to_hub_sends_the_code_too(hub, artifact):
    model = wrap(tiny_base(), "plan", plans=PLANS, bridge_rank=4, ffn_bridge_rank=4, base_model_name_or_path="user/base")
    model.push_to_hub("user/pushed")
    tiny_tokenizer().push_to_hub("user/pushed")
    pushed, expected = on_hub(hub, "user/pushed"), in_folder(artifact)
    assert {name for name in expected if name.endswith((".py", ".json", ".jinja", ".safetensors"))} <= set(pushed)
    same = [name for name in expected if name in pushed and pushed[name] == expected[name]]
    assert {"modeling_anee.py", "config.json", "model.safetensors", "tokenizer.json"} <= set(same)
    assert len(pushed["model.safetensors"]) < 20_000


def make_metric(folder):
    """A metric's folder, as small as one can be."""
    folder.mkdir()
    for name, content in {
        "README.md": "---\ntitle: Example\nsdk: gradio\n---\n",
        "requirements.txt": "evaluate\n",
        "app.py": "import evaluate\n",
        "example.py": "import evaluate\n",
    }.items():
        (folder / name).write_text(content)
    return folder


def test_a_metric_becomes_a_space(hub, tmp_path):
    metric = make_metric(tmp_path / "example")
    done = call("push_metric", "user/example", metric)
    assert done.exit_code == 0 and hub.requests == [] and "app.py" in done.stdout, done.output
    done = call("push_metric", "user/example", metric, "--no-dry-run", "--revision-tag", "v1", "--private")
    assert done.exit_code == 0, done.output
    assert on_hub(hub, "user/example", "v1", "space") == in_folder(metric)
    space = hub.repository("user/example", "space")
    assert space.sdk == "gradio" and space.private


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("app.py", None, "app.py is missing"),
        ("README.md", "# Example\n", "sdk: gradio"),
        ("example.py", "import (", "not Python"),
        ("example.py", "from ..perplexity import score\n", "from outside of its folder"),
        ("weights.bin", "", "weights.bin is not a file of a metric"),
    ],
)
def test_a_folder_that_is_no_metric_is_refused(hub, tmp_path, name, content, expected):
    metric = make_metric(tmp_path / "example")
    if content is None:
        (metric / name).unlink()
    else:
        (metric / name).write_text(content)
    done = call("push_metric", "user/example", metric, "--no-dry-run")
    assert done.exit_code == 1 and expected in done.stderr and hub.requests == [], done.output
    assert call("push_metric", "user/other", metric).exit_code == 1  # the module has another name


# Loading in fresh processes


STRANGER = """
import json, os, sys
sys.modules["modeling_anee"] = None  # not installed
import torch
from transformers import AutoModelForCausalLM

ids, budgets = torch.tensor(json.loads(sys.argv[1])), json.loads(sys.argv[2])
seen = {}
for name, revision, token in json.loads(sys.argv[3]):
    key = f"{name} {revision} {token}"
    try:
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, token=token, trust_remote_code=True)
    except Exception as error:
        seen[key] = f"{type(error).__name__}: {error}"
        continue
    file = sys.modules[type(model).__module__].__file__
    assert file.startswith(os.path.join(os.environ["HF_HOME"], "modules")), file
    logits = [model(ids, energy_budget=budget).logits.tolist() for budget in budgets]
    tokens = model.generate(ids, energy_budget=budgets[-1], max_new_tokens=4, do_sample=False).tolist()
    seen[key] = {"logits": logits, "tokens": tokens, "module": type(model).__module__}
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def world(made, tmp_path_factory):
    """A Hub with a base and an artifact in two versions, public and private; the folders of the versions and of the base."""
    home = tmp_path_factory.mktemp("world")
    with running_hub(home / "hf") as hub:
        make_workshop(home)
        base = AutoModelForCausalLM.from_pretrained(home / "base")
        base.push_to_hub("user/base")
        folders = {"v1": made, "v2": save_artifact(home / "second", scale=0.5)}
        for tag, folder in folders.items():
            assert push(folder, "user/artifact", "--revision-tag", tag).exit_code == 0
        assert push(made, "user/secret", "--private").exit_code == 0
        yield hub, folders, home / "base"


def stranger(folder, ids, wanted):
    """What a fresh process sees that has neither our package nor a token."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "PYTHONPATH")}
    arguments = [json.dumps(ids.tolist()), json.dumps(BUDGETS), json.dumps(wanted)]
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *arguments],
        cwd=folder,
        env=environment | {"HF_HOME": str(folder / "fresh")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_stranger_loads_it_with_the_same_logits_at_every_revision(world, tmp_path):
    hub, folders, base = world
    sha = hub.repository("user/artifact").tags["v1"]
    wanted = [("user/artifact", revision, None) for revision in (None, "v1", "v2", sha)]
    wanted += [("user/secret", None, token) for token in (None, "hf_other", "hf_user")]
    ids = token_ids()
    seen = stranger(tmp_path, ids, wanted)
    local = {
        tag: AutoModelForCausalLM.from_pretrained(folder, base_model_name_or_path=str(base)) for tag, folder in folders.items()
    }
    expected = {tag: [model(ids, energy_budget=budget).logits for budget in BUDGETS] for tag, model in local.items()}
    same = {"None": "v2", "v1": "v1", "v2": "v2", sha: "v1"}
    for revision, tag in same.items():
        found = seen[f"user/artifact {revision} None"]
        torch.testing.assert_close(torch.tensor(found["logits"]), torch.stack(expected[tag]), rtol=1e-4, atol=1e-4)
        tokens = local[tag].generate(ids, energy_budget=BUDGETS[-1], max_new_tokens=4, do_sample=False)
        assert found["tokens"] == tokens.tolist() and hub.repository("user/artifact").tags[tag] in found["module"]
    assert not torch.allclose(expected["v1"][-1], expected["v2"][-1], atol=1e-2)
    torch.testing.assert_close(
        torch.tensor(seen["user/secret None hf_user"]["logits"]), torch.stack(expected["v1"]), rtol=1e-4, atol=1e-4
    )
    for token in (None, "hf_other"):
        assert "token" in seen[f"user/secret None {token}"] and "user/secret" in seen[f"user/secret None {token}"]
    assert hub.leaks == []  # no token goes to the CDN


def test_verify_remote_load_loads_as_a_stranger_and_compares(world, capfd):
    hub, folders, _ = world
    options = ("--against", folders["v1"], "--budgets", "1.0,0.5", "--prompt", "w7 w8 w9", "--new-tokens", "4")
    done, seen = call("verify_remote_load", "user/artifact", "--revision", "v1", *options), capfd.readouterr()
    assert done.exit_code == 0, seen
    assert "can't be imported here" in seen.out and "the same as the local artifact" in seen.out
    assert hub.repository("user/artifact").tags["v1"] in seen.out and "transformers_modules" in seen.out


def test_what_differs_from_the_local_artifact_is_found(world):
    """What the process of `verify_remote_load` does once both are loaded."""
    _, folders, base = world
    remote, local = (
        AutoModelForCausalLM.from_pretrained(folders[tag], base_model_name_or_path=str(base)) for tag in ("v2", "v1")
    )
    wanted = {"new_tokens": 4, "tolerance": 1e-4}
    assert verifying.run(remote, local, tiny_tokenizer(), token_ids(rows=1), 1.0, wanted) == []
    found = verifying.run(remote, local, tiny_tokenizer(), token_ids(rows=1), 0.5, wanted)
    assert found[0].startswith("at budget 0.5 logits differ by")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("user/artifact", "--revision", "v3"), ("user/nothing",)])
def test_verify_remote_load_says_what_is_missing(world, capfd, arguments):
    done, seen = call("verify_remote_load", *arguments), capfd.readouterr()
    assert done.exit_code == 1 and arguments[-1] in seen.err and "Traceback" not in seen.err
