"""What must be right about an artifact's folder before it is published. Its code is not looked at: `export.py` puts it in."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from ..configuration_anee import AneeConfig
from .plan import entries, not_text, unreadable
from .secret_files import secrets


OWN_WEIGHTS = ("bridges", "controller", "corrections", "heads", "orders")
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


def problems(folder: Path, allowed: Sequence[str] = ()) -> list[str]:
    """Why a folder should not be published as an artifact; empty if it should.

    Args:
        folder: of the artifact, with or without its code.
        allowed: names of files that look like secrets and are none.

    Raises:
        ValueError: a name among `allowed` that no file has.
    """
    if not folder.is_dir():
        return ["it is not a folder"]
    files = entries(folder)
    found = [reason for path in files if (reason := check_file(path)) is not None]
    if found:  # what can't be read can't be looked at any further
        return found
    return check_config(folder) + check_weights(folder / "model.safetensors") + check_card(folder) + secrets(files, allowed)


def check_file(path: Path) -> str | None:
    """What is wrong with a file that is there, if anything."""
    if path.is_dir():
        return f"{path.name} is a folder; an artifact is flat"
    if reason := unreadable(path):
        return reason
    with path.open("rb") as file:
        start = file.read(4)
    if path.suffix in PICKLES or start.startswith(PICKLE_STARTS):
        return f"{path.name} may be a pickle: artifacts hold safetensors and JSON only"
    known = path.name in LISTED or path.suffix in (".py", *PICTURES)
    if not known and path.stat().st_size > SMALL:
        return f"{path.name} is not a file of an artifact, and larger than {SMALL:,} bytes"
    return not_text(path)


def check_config(folder: Path) -> list[str]:
    """The configuration is an artifact's, and others can load the base that it names."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        return [f"config.json can't be read: {error}"]
    if kind != AneeConfig.model_type:
        return [f"config.json has model_type={kind!r}, not {AneeConfig.model_type!r}: this is not an artifact"]
    base = config.get("base_model_name_or_path") or ""
    if not base or base.startswith(".") or os.path.isabs(base):
        return [f"config.json has base_model_name_or_path={base!r}, which others can't load: it must be a name on the Hub"]
    return []


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
        return [f"there is no card in README.md (anee card writes one): {error}"]
    missing = [name for name in CARD_FIELDS if not isinstance(fields, dict) or name not in fields]
    found = [f"the card in README.md has no {', '.join(missing)}: make it with anee card"] if missing else []
    pictures = [name for name in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text) if "://" not in name]
    return found + [f"the card shows {name}, which is missing" for name in pictures if not (folder / name).is_file()]
