"""An artifact in its two forms: with the code, as it is published and needs no package; and without, as a checkout keeps it."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.dynamic_module_utils import custom_object_save

from ..configuration_anee import AneeConfig
from ..data.files import write_file
from ..modeling_anee import AneeForCausalLM
from ..sequence_classification import AneeForSequenceClassification
from .plan import left_out, unreadable


CONFIG = "config.json"
# Where the package is not imported, transformers says that there is no file of this name.
AUTO_MAP_WITHOUT_CODE = {"AutoConfig": "import_modeling_anee_first_or_run_anee_export.AneeConfig"}
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)  # what transformers looks for in remote code


def classes_of(config: dict[str, Any]) -> tuple[Any, ...]:
    """The classes whose code an artifact needs, by the fields of its configuration."""
    return AneeConfig, AneeForCausalLM if config.get("classifier") is None else AneeForSequenceClassification


def auto_map(classes: tuple[Any, ...]) -> dict[str, str]:
    """What tells transformers where they are."""
    return {kind._auto_class: f"{kind.__module__.rsplit('.', 1)[-1]}.{kind.__name__}" for kind in classes}


def find_artifact(name: str) -> Path:
    """The folder of an artifact: a folder as it is, or what the Hub has, downloaded.

    Raises:
        OSError: there is no such folder or repository, or the Hub can't be asked.
    """
    if os.path.isdir(name):
        return Path(name)
    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:
        raise OSError(f"the artifact {name!r} is not a folder, and can't be had from the Hub: {error}") from error


def export(artifact: Path, folder: Path, code: bool = True) -> None:
    """Write an artifact as a self-contained folder, whole or not at all.

    Args:
        artifact: its folder, with code or without; code that it has is replaced by that of this package.
        folder: where to; new or empty.
        code: leave the code out if False, for a checkout: then it loads only where the package is imported.

    Raises:
        OSError: a file can't be read or written.
        ValueError: it is not an artifact, its base would not be found from there, or the folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: the folder to write must be new or empty")
    folder = folder.absolute()  # "." has no name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        part = Path(scratch) / folder.name
        compose(artifact, part, code)
        if folder.exists():
            folder.rmdir()
        os.replace(part, folder)


@contextlib.contextmanager
def composed(artifact: Path) -> Iterator[Path]:
    """An artifact with its code in a folder that is there for a while.

    Raises:
        OSError, ValueError: as `export`.
    """
    with tempfile.TemporaryDirectory(prefix="anee_") as scratch:
        folder = Path(scratch) / (artifact.resolve().name or "artifact")
        compose(artifact, folder)
        yield folder


def compose(artifact: Path, folder: Path, code: bool = True) -> None:
    """Copy an artifact to a new folder, with the code of this package or without; see `export`."""
    config = read_config(artifact)
    old_code = code_files(artifact, config.get("auto_map") or {})
    for file in files_of(artifact):
        if file not in old_code:
            target = folder / file.relative_to(artifact)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)  # without its mode: a file of the Hub's cache may not be written to
    classes = classes_of(config)
    config["auto_map"] = auto_map(classes) if code else AUTO_MAP_WITHOUT_CODE
    write_file(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")  # as transformers writes it
    if code:
        for kind in classes:
            custom_object_save(kind, folder)


def read_config(artifact: Path) -> dict[str, Any]:
    """The fields of an artifact's configuration, as its file has them.

    Raises:
        OSError: there is none.
        ValueError: it is not an artifact's, or its base lies beside the folder.
    """
    file = artifact / CONFIG
    if not file.is_file():
        raise OSError(f"{artifact} is not an artifact: it has no {CONFIG}")
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != AneeConfig.model_type:
        raise ValueError(f"{artifact} is not an artifact: its {CONFIG} has model_type={kind!r}, not {AneeConfig.model_type!r}")
    base = config.get("base_model_name_or_path") or ""
    if base.startswith(".") and not (artifact / base).resolve().is_relative_to(artifact.resolve()):
        raise ValueError(f"{artifact} has base_model_name_or_path={base!r}, a folder beside it, which a copy would not find")
    return config


def files_of(artifact: Path) -> list[Path]:
    """All files of an artifact but hidden ones; those in folders too, where its base may be.

    Raises:
        ValueError: one can't be read.
    """
    found = []
    for where, folders, names in os.walk(artifact, followlinks=True):
        folders[:] = [name for name in folders if not left_out(name)]
        found += [Path(where, name) for name in names if not left_out(name)]
    if reason := next((reason for file in found if (reason := unreadable(file)) is not None), None):
        raise ValueError(f"{artifact} can't be copied: {reason}")
    return found


def code_files(artifact: Path, auto_map: dict[str, str]) -> set[Path]:
    """The files of an artifact that `trust_remote_code=True` would run."""
    waiting, found = [entry.split("--")[-1].split(".")[0] for entry in auto_map.values()], set()
    while waiting:
        path = artifact / f"{waiting.pop()}.py"
        if path not in found and path.is_file():
            found.add(path)
            waiting += RELATIVE_IMPORT.findall(path.read_text(encoding="utf-8", errors="replace"))
    return found
