"""Publish an artifact: check the folder, list what would go, and with `--no-dry-run` send it in one commit.

    python hub_scripts/push_artifact.py ARTIFACT USER/REPO                                      # lists, sends nothing
    python hub_scripts/push_artifact.py ARTIFACT USER/REPO --revision-tag v1.0 --no-dry-run     # publishes

Needs a token with write access: `hf auth login`, or HF_TOKEN. HF_ENDPOINT chooses another Hub; HF_HUB_DISABLE_XET=1 is for
one that does not speak Xet.
"""

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from huggingface_hub import HfApi
from publishing import PlannedFile, PublishError, Target, as_text, entries, fail, publish
from safetensors import SafetensorError, safe_open


OWN_WEIGHTS = ("bridges", "controller")
LISTED = (
    {"config.json", "generation_config.json", "model.safetensors", "README.md", "LICENSE", "chat_template.jinja"}
    | {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    | {"vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"}
)
PICTURES = (".png", ".svg", ".jpg")
SMALL = 1_000_000  # bytes; a file that we don't know may be as large
PICKLE_STARTS = (*(bytes([0x80, protocol]) for protocol in range(2, 6)), b"PK\x03\x04")  # pickles; torch's archives of them
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack")
CARD_FIELDS = ("base_model", "library_name", "pipeline_tag", "license")
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)  # what transformers looks for in remote code


def problems(folder: Path) -> list[str]:
    """Why a folder should not be published as an artifact; empty if it should."""
    files, _ = entries(folder)
    found = [f"{path.name} is a folder; an artifact is flat" for path in files if path.is_dir()]
    found += check_config(folder) + check_weights(folder / "model.safetensors") + check_card(folder)
    return found + [reason for path in files if path.is_file() and (reason := check_file(path))]


def check_config(folder: Path) -> list[str]:
    """The configuration is an artifact's, others can load the base that it names, and the code is whole."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        return [f"config.json can't be read: {error}"]
    if kind != "anee":
        return [f"config.json has model_type={kind!r}, not 'anee': this is not an artifact"]
    found, base = [], config.get("base_model_name_or_path") or ""
    if not base or base.startswith(".") or os.path.isabs(base):
        found.append(f"config.json has base_model_name_or_path={base!r}, which others can't load: it must be a name on the Hub")
    return found + check_code(folder, config.get("auto_map") or {})


def check_code(folder: Path, auto_map: dict[str, str]) -> list[str]:
    """Every file is there that `trust_remote_code=True` would run."""
    missing = [name for name in ("AutoConfig", "AutoModelForCausalLM") if name not in auto_map]
    found = [f"config.json has no auto_map for {name}: save the model with `save_pretrained`" for name in missing]
    waiting, seen = [entry.split(".")[0] for entry in auto_map.values()], set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        path = folder / f"{module}.py"
        if path.is_file():
            waiting += RELATIVE_IMPORT.findall(path.read_text(encoding="utf-8"))
        else:
            found.append(f"the code file {path.name} is missing")
    return found


def check_weights(path: Path) -> list[str]:
    """The weights are ours and only ours."""
    try:
        with safe_open(path, framework="np") as weights:
            foreign = [name for name in weights.keys() if name.split(".")[0] not in OWN_WEIGHTS]
    except (OSError, SafetensorError) as error:
        return [f"model.safetensors can't be read: {error}"]
    return [f"model.safetensors holds {len(foreign)} tensors that are not ours, such as {foreign[0]!r}"] if foreign else []


def check_card(folder: Path) -> list[str]:
    """There is a card, the Hub can read it, and its pictures are there."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        fields: Any = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
    except (OSError, IndexError, yaml.YAMLError) as error:
        return [f"there is no card in README.md (make_model_card.py writes one): {error}"]
    missing = [name for name in CARD_FIELDS if not isinstance(fields, dict) or name not in fields]
    found = [f"the card in README.md has no {', '.join(missing)}: make it with make_model_card.py"] if missing else []
    pictures = [name for name in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text) if "://" not in name]
    return found + [f"the card shows {name}, which is missing" for name in pictures if not (folder / name).is_file()]


def check_file(path: Path) -> str | None:
    """What is wrong with a file that is there, if anything."""
    with path.open("rb") as file:
        start = file.read(4)
    if path.suffix in PICKLES or start.startswith(PICKLE_STARTS):
        return f"{path.name} may be a pickle: artifacts hold safetensors and JSON only"
    known = path.name in LISTED or path.suffix in (".py", *PICTURES)
    if not known and path.stat().st_size > SMALL:
        return f"{path.name} is not a file of an artifact, and larger than {SMALL:,} bytes"
    return None


def main(
    artifact: Annotated[Path, typer.Argument(help="Folder of the artifact.")],
    repository: Annotated[str, typer.Argument(metavar="USER/REPO", help="Where to; made if it does not exist.")],
    revision_tag: Annotated[str | None, typer.Option(help="Tag for the commit, such as v1.0.")] = None,
    private: Annotated[bool, typer.Option("--private", help="The repository must be private.")] = False,
    dry_run: Annotated[bool, typer.Option(help="List what would go; no request is made.")] = True,
    token: Annotated[str | None, typer.Option(help="Token; better: HF_TOKEN or `hf auth login`.")] = None,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload artifact",
) -> None:
    """Publish an artifact on the Hub."""
    if not artifact.is_dir():
        raise typer.Exit(fail(f"{artifact} is not a folder"))
    if found := problems(artifact):
        raise typer.Exit(fail(*found))
    kept, left_out = entries(artifact)
    files = [PlannedFile.read(path) for path in kept]
    print(as_text(files, left_out))
    if dry_run:
        print(f"\nThis is a dry run: nothing was sent to {repository}. To publish: --no-dry-run")
        return
    target = Target(HfApi(token=token), repository, private=private or None)
    try:
        commit = publish(target, files, message, revision_tag)
    except PublishError as error:
        raise typer.Exit(fail(str(error))) from error
    print(f"published: {target.url}/tree/{revision_tag or commit}")
    print(f"AutoModelForCausalLM.from_pretrained({repository!r}, revision={revision_tag or commit!r}, trust_remote_code=True)")


if __name__ == "__main__":
    typer.run(main)
