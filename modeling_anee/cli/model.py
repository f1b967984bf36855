"""The model that a verb works with, and where."""

import sys
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.utils import CONFIG_NAME, cached_file, logging

from ..base_variants import precisions
from ..configuration_anee import AneeConfig
from ..data.progress import waiting
from ..data.smollm2 import BASE_FIELDS, shipped_artifact, smollm2_folder
from ..machines.energy import EnergyModel
from ..modeling_anee import AneeForCausalLM
from ..weight_files import readable_weights


DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(
    name: str | None,
    controller: str | None,
    dtype: str = "auto",
    device: str = "cpu",
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    precisions: str | None = None,
    drop_full: bool = False,
) -> tuple[Any, Any]:
    """An artifact, or a base with an untrained controller; and its tokenizer.

    Args:
        name: folder or Hub name; None for the shipped artifact, or its base where there is none.
        controller: for a base; None for `plan`.
        dtype: of the base.
        device: where the model goes.
        gguf_file: GGUF file in the base's folder or repository.
        trust_remote_code: allow code that comes with the base.
        precisions: for a base, variants like `int8,int4`.
        drop_full: let the base's full weights go.

    Raises:
        ValueError: a dtype, device or precision that is not there, a controller or precisions for an artifact, which has its
            own, or a GGUF file of nothing.
        OSError: there is no such model, or it can't be read.
    """
    check_dtype(dtype)
    check_device(device)
    if gguf_file is not None and name is None:
        raise ValueError(f"--gguf-file {gguf_file} is not allowed without --model: that names the folder it is in")
    logging.disable_progress_bar()
    options: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    variants = None if precisions is None else parse_precisions(precisions)
    for_a_base = {"--controller": controller, "--precisions": precisions}
    given = next((f"{option} {value}" for option, value in for_a_base.items() if value is not None), None)
    model: Any
    with waiting("loading the model"):
        folder, fields = (str(name), {}) if name is not None else default_model(untrained=given is not None)
        with readable_weights(folder):
            if is_artifact(folder, may_be_gguf=gguf_file is not None):
                if given is not None:
                    raise ValueError(f"{given}: {folder} is an artifact and has its own controller")
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
                model = AneeForCausalLM.from_pretrained(folder, dtype=dtype, drop_full=drop_full, **options).eval()
            else:
                options["trust_remote_code"] = trust_remote_code
                tokenizer = AutoTokenizer.from_pretrained(folder, **options)
                fields |= {"controller": controller or "plan", "precisions": variants}
                model = AneeForCausalLM.from_base(folder, dtype=dtype, drop_full=drop_full, **options, **fields)
        return model.to(device), tokenizer


def is_artifact(folder: str, may_be_gguf: bool) -> bool:
    """Whether a folder or a repository of the Hub holds an artifact; one with a GGUF file may have no configuration."""
    if may_be_gguf and cached_file(folder, CONFIG_NAME, _raise_exceptions_for_missing_entries=False) is None:
        return False
    return PreTrainedConfig.get_config_dict(folder)[0].get("model_type") == AneeConfig.model_type


def check_dtype(name: str) -> None:
    """Notice a dtype that a model can't be loaded in.

    Raises:
        ValueError: it is not one of `DTYPES`.
    """
    if name not in DTYPES:
        raise ValueError(f"--dtype {name} is not allowed: it must be one of {', '.join(DTYPES)}")


def check_device(name: str) -> None:
    """Notice a device that this machine, or this build of torch, does not have.

    Raises:
        ValueError: it is not there; the message has those that are.
    """
    known, accelerator = ["cpu"], torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        kind, count = accelerator.type, torch.accelerator.device_count()
        known += [kind, *(f"{kind}:{number}" for number in range(count))]
    if name not in known:
        raise ValueError(f"--device {name} is not allowed: torch {torch.__version__} has here {', '.join(known)}")


def named_model(argument: str | None, option: str | None) -> str | None:
    """The model that a verb was told of, as its argument MODEL or its option --model; None for neither.

    Raises:
        ValueError: both were given.
    """
    if argument is not None and option is not None:
        raise ValueError(f"MODEL {argument} and --model {option} are the same setting: give one of them")
    return option if argument is None else argument


def parse_precisions(text: str) -> list[str]:
    """Variants of a list like `int8,int4`, the dearest first.

    Raises:
        ValueError: one that nobody knows.
    """
    names, known = [part.strip() for part in text.split(",")], precisions()
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--precisions {text}: {unknown[0]!r} is not allowed: it must be one of {', '.join(known)}")
    return names


def default_model(untrained: bool) -> tuple[str, dict[str, Any]]:
    """What no `--model` means: a folder, and what a configuration says of it if it is a base, which `untrained` asks for."""
    base = str(smollm2_folder())  # the artifact needs it too
    artifact = shipped_artifact()
    if not untrained and artifact is not None:
        return str(artifact), {}
    if not untrained:
        print(
            "no trained artifact here: layers are skipped without a stand-in. One comes with the repository, in "
            "configuration/; anee generate --model takes its folder",
            file=sys.stderr,
        )
    return base, dict(BASE_FIELDS)


def energy_model(name: str | None) -> EnergyModel | None:
    """What models joules as those of a machine; None for none.

    Raises:
        ValueError: an unknown machine; the message has those that are known.
    """
    return None if name is None else EnergyModel.named(name)
