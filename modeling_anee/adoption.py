"""A base becomes a part of ours: taken apart and frozen, and what transformers asks a whole model is answered by it."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .base_dropped import Drop
from .base_model import BaseStack
from .corrections import Corrections
from .narrow import Orders


def take_apart(base: PreTrainedModel, drop: Drop | None, corrections: Corrections, orders: Orders) -> BaseStack:
    """A base in its parts, frozen and in eval mode, its full weights dropped if asked for; one that is refused is as it was."""
    # By name, since what is held here could not be dropped.
    trained, path = [name for name, weight in base.named_parameters() if weight.requires_grad], base.config._name_or_path
    base.requires_grad_(False)
    base.config._name_or_path = ""  # a local path would be written into our config.json
    try:
        stack = BaseStack(base, drop, corrections, orders)
    except ValueError:
        base.config._name_or_path = path
        for name in trained:
            base.get_parameter(name).requires_grad_(True)
        raise
    base.eval()
    return stack


def adopt(model: Any, base: Any) -> None:
    """Take over from the base, which is `model.base`, what transformers wants to know of a whole model."""
    model.config._attn_implementation_internal = base.config._attn_implementation
    model.all_tied_weights_keys = {f"base.{key}": f"base.{tied}" for key, tied in base.all_tied_weights_keys.items()}
    model._no_split_modules = set(base._no_split_modules or ())
    model._skip_keys_device_placement = set(base._skip_keys_device_placement or ())
    model._keys_to_ignore_on_save = {f"base.{name}" for name in _saved_names(base)}
    for plan in ("_tp_plan", "_pp_plan", "_ep_plan", "_fsdp_plan"):
        entries = getattr(base, plan, None) or {}
        setattr(model, plan, {f"base.{key}": value for key, value in entries.items()})
    if hasattr(base, "hf_device_map"):
        model.hf_device_map = {f"base.{key}" if key else "": device for key, device in base.hf_device_map.items()}


def adopt_generation_config(model: Any, base: Any) -> None:
    """An artifact's generation config stays, the base's fills in what it leaves open; without one, all is the base's."""
    defaults = {name: value for name, value in base.generation_config.to_dict().items() if not name.startswith("_")}
    has_own = not model.generation_config._from_model_config
    model.generation_config.update(**defaults, defaults_only=has_own, allow_custom_entries=True)
    model.generation_config._from_model_config = None


def _saved_names(base: nn.Module) -> Iterator[str]:
    """Names of what a model's state has; the state itself is not made, since that may unpack weights."""
    for path, module in base.named_modules(remove_duplicate=False):
        buffers = {name: value for name, value in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, value in (module._parameters | buffers).items():
            if value is not None:
                yield f"{path}.{name}".removeprefix(".")
