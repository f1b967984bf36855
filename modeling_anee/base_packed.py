"""Linear maps whose weights can't be read as numbers: quantised ones, of whatever library. They are called as they are.

Known of them is their shape, and how many bytes they keep.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_ordinary(weight: Any) -> bool:
    """Whether `weight` is a floating-point parameter that is what it seems: no packed or distributed tensor in disguise."""
    return type(weight) is nn.Parameter and weight.is_floating_point() and weight.layout == torch.strided


def is_packed(module: nn.Module) -> bool:
    """Whether `module` is a linear map by what it says of itself, and keeps its weights in a form of its own."""
    if not _is_linear(module) or is_ordinary(module._parameters.get("weight")):
        return False
    return not any(_is_linear(part) for part in module.modules() if part is not module)  # an adapter around a linear map


def shape(module: Any) -> tuple[int, int]:
    """Outputs and inputs of a packed linear map."""
    return module.out_features, module.in_features


def stored_bytes(module: nn.Module) -> int:
    """Bytes of what a packed linear map keeps: weights, scales, zero points, bias.

    Raises:
        ValueError: it keeps nothing that can be counted.
    """
    size = _bytes_of(dict(module.state_dict()))
    if size == 0:
        kind = type(module).__name__
        raise ValueError(f"the bytes of a {kind} can't be counted, since its state is empty: use cost_unit='flops'")
    return size


def _is_linear(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def _bytes_of(value: Any) -> int:
    """Bytes of all tensors in an entry of a state: a tensor, one that is made of others, or a collection."""
    if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
        return sum(_bytes_of(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return sum(map(_bytes_of, value))
