"""Finding and loading the frozen base that an artifact names."""

import os
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from .configuration_anee import AneeConfig
from .fingerprint import fingerprint, same_base


logger = logging.get_logger("transformers.anee")  # follows the verbosity of transformers

SEARCH_PATH_VARIABLE = "ANEE_BASE_PATH"
CACHE_VARIABLE = "ANEE_CACHE"
# Keyword arguments of `from_pretrained` that are about the base's weights, not about ours.
BASE_KWARGS = (
    "dtype",
    "torch_dtype",
    "device_map",
    "max_memory",
    "quantization_config",
    "attn_implementation",
    "tp_plan",
    "tp_size",
    "device_mesh",
    "distributed_config",
    "offload_folder",
    "offload_buffers",
    "gguf_file",
)
# Keyword arguments that both need to reach the Hub; a revision or subfolder of the artifact is not the base's.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "proxies")


def cache_folder() -> Path:
    """Where bases that `anee` converted are kept: `ANEE_CACHE`, by default `anee` in the user's cache folder.

    Raises:
        OSError: neither `ANEE_CACHE` nor `XDG_CACHE_HOME` is set, and the user has no home folder.
    """
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "anee"
    home = os.path.expanduser("~")
    if home == "~":  # it stays as it is for a user without one
        raise OSError(f"you have no home folder to keep a cache in: set {CACHE_VARIABLE} to a folder")
    return Path(home) / ".cache" / "anee"


def _folders_of_copies() -> list[str]:
    """Folders that may hold copies of bases; a user without a home folder may have no cache."""
    folders = [folder for folder in os.environ.get(SEARCH_PATH_VARIABLE, "").split(os.pathsep) if folder]
    try:
        return [*folders, str(cache_folder())]
    except OSError:
        return folders


def find_base(name: str, artifact: str | os.PathLike | None = None) -> tuple[str, str | None]:
    """Where the base `name` is: (folder or Hub name, subfolder on the Hub or None).

    A name that begins with "." is relative to the artifact, which is a folder or a Hub repository. Any other is
    looked up in the folders of the environment variable `ANEE_BASE_PATH` and in `cache_folder()` (as `org/name`,
    `org--name` or `name`), then taken as it is.

    Raises:
        ValueError: a relative name without an artifact, or no name at all.
    """
    if not name:
        raise ValueError(
            "the configuration names no base model: pass base_model_name_or_path=... (a folder or a Hub name) when loading"
        )
    if name.startswith("."):
        if artifact is None:
            raise ValueError(f"base_model_name_or_path={name!r} is relative, but there is no artifact it could be relative to")
        if os.path.isdir(artifact):
            return str((Path(artifact) / name).resolve()), None
        return str(artifact), name.removeprefix("./")
    for folder in _folders_of_copies():
        for spelling in (name, name.replace("/", "--"), name.rsplit("/", 1)[-1]):
            candidate = Path(folder) / spelling
            if (candidate / "config.json").is_file():
                return str(candidate), None
    return name, None


def load_base(config: AneeConfig, artifact: str | os.PathLike | None, revision: str | None, **kwargs: Any) -> PreTrainedModel:
    """Load the base that `config` names.

    Args:
        config: names the base, its revision and its GGUF file.
        artifact: folder or Hub name of the artifact, for a relative base.
        revision: revision of the artifact, for a base in a subfolder of it.
        kwargs: passed on to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        OSError: the base can't be found; the message says what was tried and how to point to a copy.
    """
    name = config.base_model_name_or_path
    where, subfolder = find_base(name, artifact)
    if subfolder is not None:
        kwargs |= {"subfolder": subfolder, "revision": revision}
    elif not os.path.isdir(where):
        kwargs["revision"] = config.base_model_revision or "main"
    gguf_file = kwargs.pop("gguf_file", None) or config.base_gguf_file
    # A converted copy of a GGUF base has no such file.
    if gguf_file and (not os.path.isdir(where) or (Path(where) / gguf_file).is_file()):
        kwargs["gguf_file"] = gguf_file
    try:
        return AutoModelForCausalLM.from_pretrained(where, **kwargs)
    except OSError as error:
        raise OSError(
            f"the base model {name!r} can't be loaded (looked at {where!r}): {error}\n"
            f"Pass base_model_name_or_path=FOLDER to use a local copy, or list folders with copies in {SEARCH_PATH_VARIABLE}."
        ) from error


def check_device_map(base: PreTrainedModel) -> None:
    """One device runs all layers, wherever their weights are kept.

    Raises:
        ValueError: layers are spread over several accelerators.
    """
    devices = {str(device).removeprefix("cuda:") for device in getattr(base, "hf_device_map", {}).values()}
    devices -= {"cpu", "disk", "meta"}
    if len(devices) > 1:
        raise ValueError(
            f"device_map spreads the base over the devices {', '.join(sorted(devices))}, which is not supported: put all of it "
            "on one (device_map={'': 0}), and what does not fit on 'cpu' or 'disk' (device_map='auto' with max_memory)"
        )


def check_fingerprint(config: AneeConfig, base: PreTrainedModel) -> None:
    """Compare the base with the one that the controllers were made for; note it if there is none to compare with.

    Raises:
        ValueError: another base, with `strict_base=True`; otherwise that is a warning.
    """
    found = fingerprint(base)
    if not config.base_fingerprint:
        config.base_fingerprint = found
    elif not same_base(config.base_fingerprint, found):
        message = (
            f"the weights of the base model differ from those that the controllers were made for (expected "
            f"{config.base_model_name_or_path!r} with fingerprint {config.base_fingerprint[:24]}..., got {found[:24]}...): "
            "quality and cost at budgets below 1 can differ from what the artifact reports"
        )
        if config.strict_base:
            raise ValueError(f"{message}. strict_base=True makes this an error")
        logger.warning(message)
