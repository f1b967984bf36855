"""The keyword arguments of loading: which are for the base, which for what is ours, and none that nobody knows."""

from collections.abc import Iterable
from typing import Any

from .checks import refuse_unknown
from .configuration_anee import AneeConfig


# The keyword arguments that `from_pretrained` of transformers takes (5.23 and 5.24), by whose they are.
# About the base's weights, not about ours:
BASE_KWARGS = (
    "dtype",
    "torch_dtype",
    "device_map",
    "max_memory",
    "quantization_config",
    "attn_implementation",
    "experts_implementation",
    "tp_plan",
    "tp_size",
    "device_mesh",
    "distributed_config",
    "offload_folder",
    "offload_buffers",
    "offload_state_dict",
    "low_cpu_mem_usage",
    "gguf_file",
    "use_safetensors",
    "weights_only",
    "ignore_mismatched_sizes",
    "key_mapping",
    "fusion_config",
    "use_kernels",
    "kernel_config",
    "allow_all_kernels",
)
# What both need to reach the Hub; a revision or subfolder of the artifact is not the base's.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "proxies", "disable_mmap", "tqdm_class")
# About the files that are asked for: those of an artifact in `from_pretrained`, of the base in `from_base`.
OWN_KWARGS = (
    "revision",
    "code_revision",
    "subfolder",
    "variant",
    "trust_remote_code",
    "state_dict",
    "generation_config",
    "adapter_kwargs",
    "adapter_name",
    "_from_auto",
    "_from_pipeline",
    "_commit_hash",
    "_fast_init",
    "drop_full",
    "mirror",
    "from_tf",
    "from_flax",
)
LOADING_KWARGS = frozenset((*BASE_KWARGS, *HUB_KWARGS, *OWN_KWARGS))


def refuse_unknown_kwargs(names: Iterable[str], or_what: str = "") -> None:
    """Refuse keyword arguments that `from_pretrained` of transformers does not take, with the nearest that it or we take."""
    known = AneeConfig.known_fields() | LOADING_KWARGS
    unknown = sorted(set(names) - LOADING_KWARGS)
    refuse_unknown(unknown, known, f"a field of AneeConfig{or_what} or an argument of from_pretrained")


def refuse_loading(kwargs: dict[str, Any]) -> None:
    """Refuse arguments about loading where there is nothing to load."""
    refuse_unknown_kwargs(kwargs)
    if kwargs:
        raise ValueError(
            "the base is a model already: gguf_file, revision, dtype, device_map and other loading arguments "
            f"({', '.join(kwargs)}) do not apply"
        )
