"""The base that a recipe names, with its tokenizer."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..base_loading import find_base
from ..weight_files import readable_weights
from .section import Section
from .smollm2 import BASE_FIELDS, smollm2_folder


DEMO_BASE = "smollm2-135m-instruct"


class Base(Section):
    """The base model."""

    name: str = Field(min_length=1, description=f"Hub name or folder; {DEMO_BASE!r} is the demo's base.")
    revision: str | None = Field(None, description="Revision on the Hub.")
    gguf_file: str | None = Field(None, description="GGUF file in the base's repository or folder.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Dtype of the base.")


def load_base_of(base: Base) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer, and what an artifact over the base says of it (fields of `AneeConfig`).

    As for artifacts, a copy in the folders of `ANEE_BASE_PATH` or in the cache stands in for a base of the Hub.

    Raises:
        OSError: the base can't be found or read.
        ValueError: the demo's base with a revision or a GGUF file of another.
    """
    where, fields = _find(base)
    kwargs = _arguments(base, where)
    with readable_weights(where):
        tokenizer = AutoTokenizer.from_pretrained(where, **kwargs)
        return AutoModelForCausalLM.from_pretrained(where, dtype=base.dtype, **kwargs), tokenizer, fields


def config_of(base: Base) -> Any:
    """The configuration of a base, whose weights are not read. Raises as `load_base_of`."""
    where, _ = _find(base)
    return AutoConfig.from_pretrained(where, **_arguments(base, where))


def _arguments(base: Base, where: str) -> dict[str, Any]:
    local = os.path.isdir(where)
    kwargs: dict[str, Any] = {} if local or base.revision is None else {"revision": base.revision}
    # A converted copy of a GGUF base has no such file.
    if base.gguf_file and (not local or (Path(where) / base.gguf_file).is_file()):
        kwargs["gguf_file"] = base.gguf_file
    return kwargs


def _find(base: Base) -> tuple[str, dict[str, Any]]:
    if base.name == DEMO_BASE:
        if base.revision or base.gguf_file:
            raise ValueError(f"base.name={DEMO_BASE!r} has its own revision and gguf_file: leave both out")
        return str(smollm2_folder()), dict(BASE_FIELDS)
    folder = os.path.isdir(base.name)
    # A name that begins with "." would mean: relative to the artifact.
    name = os.path.abspath(base.name) if folder else base.name
    fields = {"base_model_name_or_path": name, "base_model_revision": base.revision, "base_gguf_file": base.gguf_file}
    return name if folder else find_base(name)[0], fields


def locate(field: str, name: str, folder: Path) -> str:
    """The absolute path of what a recipe in `folder` names, or the name of something on the Hub as it is.

    Args:
        field: of the recipe, for errors.
        name: path of a folder, relative to the recipe's own or absolute, or a name on the Hub.
        folder: the recipe's.

    Raises:
        OSError: it begins as a relative path, and there is no such folder.
        ValueError: it is a path only relative to the current folder.
    """
    place = os.path.abspath(folder / name)
    if os.path.isdir(place):
        return place
    if name.split("/")[0] in (".", ".."):
        raise FileNotFoundError(f"{field}={name!r} is not allowed: there is no folder {place}")
    if not os.path.isabs(name) and os.path.isdir(name):  # which transformers would take
        raise ValueError(f"{field}={name!r} is not allowed: a path is relative to the recipe, and there is no folder {place}")
    return name
