"""Finding and loading the frozen base that an artifact names."""

import contextlib
import os
import posixpath
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .configuration_anee import BASE_DTYPES, AneeConfig
from .fingerprint import difference, fingerprint, same_base, short
from .folders import cache_folder
from .loading_arguments import HUB_KWARGS, LOADING_KWARGS, refuse_loading, refuse_unknown_kwargs
from .weight_files import readable_weights
from .wrapping import check_base


logger = logging.get_logger("transformers.anee")  # follows the verbosity of transformers

SEARCH_PATH_VARIABLE = "ANEE_BASE_PATH"


def _folders_of_copies() -> list[str]:
    """Folders that may hold copies of bases; a user without a home folder may have no cache."""
    folders = [folder for folder in os.environ.get(SEARCH_PATH_VARIABLE, "").split(os.pathsep) if folder]
    try:
        return [*folders, str(cache_folder())]
    except OSError:
        return folders


def find_base(name: str, artifact: str | os.PathLike | None = None, subfolder: str = "") -> tuple[str, str | None]:
    """Where the base `name` is: (folder or Hub name, subfolder on the Hub or None).

    A name that begins with "." is relative to the artifact, which is a folder or a Hub repository, or a `subfolder` of one.
    Any other is looked up in the folders of the environment variable `ANEE_BASE_PATH` and in `cache_folder()` (as `org/name`,
    `org--name` or `name`), then taken as it is.

    Raises:
        ValueError: a relative name without an artifact or out of its repository, or no name at all.
    """
    if not name:
        raise ValueError(
            "the configuration names no base model: pass base_model_name_or_path=... (a folder or a Hub name) when loading"
        )
    if name.startswith("."):
        if artifact is None:
            raise ValueError(f"base_model_name_or_path={name!r} is relative, but there is no artifact it could be relative to")
        if os.path.isdir(artifact):
            return str((Path(artifact) / subfolder / name).resolve()), None
        inside = posixpath.normpath(posixpath.join(subfolder, name))
        if inside.split("/")[0] == "..":
            raise ValueError(f"base_model_name_or_path={name!r} is not allowed: it leaves the repository {str(artifact)!r}")
        return str(artifact), "" if inside == "." else inside
    for folder in _folders_of_copies():
        for spelling in (name, name.replace("/", "--"), name.rsplit("/", 1)[-1]):
            candidate = Path(folder) / spelling
            if (candidate / "config.json").is_file():
                return str(candidate), None
    return name, None


def load_base(config: AneeConfig, artifact: str | os.PathLike | None, files: dict[str, Any], **kwargs: Any) -> PreTrainedModel:
    """Load the base that `config` names.

    Args:
        config: names the base, its revision and its GGUF file.
        artifact: folder or Hub name of the artifact, for a relative base.
        files: `revision` and `subfolder` of the artifact, where they are given, for the same.
        kwargs: passed on to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        OSError: the base can't be found; the message says what was tried and how to point to a copy.
    """
    name = config.base_model_name_or_path
    where, subfolder = find_base(name, artifact, files.get("subfolder") or "")
    if subfolder is not None:
        kwargs |= {"subfolder": subfolder, "revision": files.get("revision")}
    elif not os.path.isdir(where):
        kwargs["revision"] = config.base_model_revision or "main"
    named = config.base_gguf_file
    # A converted copy of a GGUF base has no such file; but who asks for one wants it.
    if kwargs.get("gguf_file") is None and named and (not os.path.isdir(where) or (Path(where) / named).is_file()):
        kwargs["gguf_file"] = named
    try:
        return _load(where, **kwargs)
    except OSError as error:
        raise OSError(
            f"the base model {name!r} can't be loaded (looked at {where!r}): {error}\n"
            f"Pass base_model_name_or_path=FOLDER to use a local copy, or list folders with copies in {SEARCH_PATH_VARIABLE}."
        ) from error


def absolute_name(base: str | os.PathLike) -> str:
    """A Hub name as it is, a folder by its absolute path: in an artifact, "./name" means relative to the artifact."""
    return os.path.abspath(base) if os.path.isdir(base) else str(base)


def gguf_file_of(base: PreTrainedModel) -> str | None:
    """The GGUF file that a model was loaded from, if it was."""
    return getattr(getattr(base.config, "quantization_config", None), "gguf_file", None)


def base_to_wrap(base: str | os.PathLike | PreTrainedModel, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A base that is to be wrapped, loaded if it is a name, and the fields that say which it is.

    Args:
        base: folder or Hub name, or the base itself.
        kwargs: how to load it; none where there is nothing to load.

    Raises:
        ValueError: what can't be wrapped, with what to do; a keyword that nobody knows or that does not apply.
        OSError: it can't be found.
    """
    if isinstance(base, str | os.PathLike):
        names = {"base_model_revision": kwargs.get("revision"), "base_gguf_file": kwargs.get("gguf_file")}
        loaded = _load_to_wrap(base, **kwargs)
        return loaded, names | {"base_model_name_or_path": absolute_name(base), "base_dtype": dtype_name(loaded)}
    check_base(base, takes_encoders=True)
    refuse_loading(kwargs)
    names = {"base_gguf_file": gguf_file_of(base), "base_model_name_or_path": absolute_name(base.name_or_path or "")}
    return base, names | {"base_dtype": dtype_name(base)}


def dtype_name(base: PreTrainedModel) -> str | None:
    """The dtype that a base is in, as an artifact stores it, whatever its config says; None for others."""
    name = str(base.dtype).removeprefix("torch.")
    return name if name in BASE_DTYPES else None


def _load_to_wrap(base: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """Load a base that is to be wrapped, from a folder or the Hub.

    Args:
        base: folder or Hub name.
        kwargs: arguments of `AutoModelForCausalLM.from_pretrained`, and fields of the base's config.

    Raises:
        ValueError: an artifact instead of a base, a keyword that nobody knows, or a checkpoint without weights of the base.
        OSError: it can't be found.
    """
    files = {name: kwargs[name] for name in (*HUB_KWARGS, "revision", "subfolder") if name in kwargs}
    if _model_type(base, files) == AneeConfig.model_type:
        raise ValueError(f"{str(base)!r} is an artifact: load it with AneeForCausalLM.from_pretrained({str(base)!r})")
    fields = {name: kwargs.pop(name) for name in list(kwargs) if name not in LOADING_KWARGS and name != "config"}
    unknown = set(fields)
    if fields and "config" not in kwargs:
        code = {name: kwargs[name] for name in ("trust_remote_code", "code_revision", "gguf_file") if name in kwargs}
        kwargs["config"], unused = AutoConfig.from_pretrained(base, return_unused_kwargs=True, **files, **code, **fields)
        unknown &= set(unused)
    refuse_unknown_kwargs(unknown, " or of the base's config")
    model = _load(base, **kwargs)
    check_base(model, takes_encoders=True)
    return model


def _load(where: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    with readable_weights(os.path.join(where, kwargs.get("subfolder") or "")):
        loaded: Any = AutoModelForCausalLM.from_pretrained(where, output_loading_info=True, **kwargs)
    model, info = loaded
    if missing := sorted(map(str, info["missing_keys"])):
        raise ValueError(
            f"the checkpoint in {str(where)!r} is not one of a whole {type(model).__name__}: it lacks {', '.join(missing[:4])}"
        )
    return model


def _model_type(name: str | os.PathLike, files: dict[str, Any]) -> str | None:
    """Model type in a folder or repository; None where there is no config, which the load that follows may do without."""
    try:
        return PreTrainedConfig.get_config_dict(name, **files)[0].get("model_type")
    except OSError:
        return None


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


def check_fingerprint(
    config: AneeConfig, base: PreTrainedModel, artifact: str | os.PathLike | None = None, **kwargs: Any
) -> None:
    """Compare the base with the one that the controllers were made for; note it if there is none to compare with.

    Args:
        config: has the fingerprint to expect, if any.
        base: as it was loaded.
        artifact: folder or Hub name of the artifact, which knows what it was made for.
        kwargs: where its configuration is, as for `from_pretrained`.

    Raises:
        ValueError: another base, with `strict_base=True`; otherwise that is a warning.
    """
    found, expected = fingerprint(base), config.base_fingerprint
    if not expected:
        config.base_fingerprint = found
    elif not same_base(expected, found):
        message = (
            f"the weights of the base model differ from those that the controllers were made for: expected "
            f"{_recorded_base(config, artifact, kwargs)!r} with fingerprint {short(expected)}, found "
            f"{base.name_or_path or 'a model without a name'!r} with {short(found)} ({difference(expected, found)}). Quality "
            "and cost at budgets below 1 can differ from what the artifact reports"
        )
        if config.strict_base:
            raise ValueError(f"{message}. strict_base=True makes this an error")
        logger.warning(message)


def _recorded_base(config: AneeConfig, artifact: str | os.PathLike | None, kwargs: dict[str, Any]) -> str:
    """The base's name in the artifact's own file: in `config` an argument may have replaced it."""
    if artifact is not None:
        with contextlib.suppress(OSError):  # loaded with a configuration from elsewhere
            return AneeConfig.get_config_dict(artifact, **kwargs)[0].get("base_model_name_or_path", "")
    return config.base_model_name_or_path
