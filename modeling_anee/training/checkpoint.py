"""What a checkpoint has in it: named tensors and values, and the state of an optimiser."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.optim import Optimizer

from ..data.files import write_file


OPTIMIZER = "optimizer/"  # begins the names of an optimiser's tensors


def write_tensors(path: Path, tensors: dict[str, Tensor], values: dict[str, Any] | None = None) -> None:
    """Write named tensors, and values that JSON can hold, as one safetensors file.

    Raises:
        ValueError: a value that JSON can't hold.
    """
    try:
        text = json.dumps(values or {})
    except TypeError as error:
        raise ValueError(f"values={values!r} is not allowed: {path.name} holds values as JSON ({error})") from error
    # Cloned, since safetensors refuses tensors that share a storage.
    copies = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    write_file(path, save(copies, metadata={"values": text}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and values of a file of `write_tensors`.

    Raises:
        OSError: the file can't be read, is truncated or is not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["values"])
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise OSError(f"{path} is truncated or not a file of a run ({error}); remove it to do that work again") from error


def in_half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floating tensors in float16, which loading turns back into float32; others, such as versions, as they are.

    Raises:
        ValueError: a value that is not finite in float16.
    """
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    wrong = [name for name, tensor in half.items() if not tensor.isfinite().all()]
    if wrong:
        raise ValueError(f"weights can't be exported in half precision: values of {', '.join(wrong[:4])} are not finite in it")
    return half


def optimizer_tensors(optimizer: Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """The state of an optimiser such as AdamW as flat tensors.

    Args:
        optimizer: its state has tensors only.
        names: a name for each of its parameters, in their order.
    """
    state = {name: optimizer.state.get(parameter, {}) for name, parameter in _named(optimizer, names).items()}
    return {f"{OPTIMIZER}{key}/{name}": value for name, values in state.items() for key, value in values.items()}


def load_optimizer(optimizer: Optimizer, names: Sequence[str], tensors: dict[str, Tensor]) -> None:
    """Put the state that `optimizer_tensors` gave back; other tensors are left alone. Learning rates are not part of it.

    Raises:
        ValueError: state of a parameter that is not among `names`, or of another shape.
    """
    places = {name: number for number, name in enumerate(_named(optimizer, names))}
    shapes = [parameter.shape for parameter in _named(optimizer, names).values()]
    state: dict[int, dict[str, Tensor]] = {}
    for label, tensor in tensors.items():
        if not label.startswith(OPTIMIZER):
            continue
        key, name = label.removeprefix(OPTIMIZER).split("/", 1)
        if name not in places:
            raise ValueError(f"the checkpoint has {key!r} of {name!r}, which is not a parameter of this optimiser")
        if tensor.dim() and tensor.shape != shapes[places[name]]:
            expected, found = list(shapes[places[name]]), list(tensor.shape)
            raise ValueError(f"the checkpoint has {key!r} of {name!r} in shape {found}, but the parameter has {expected}")
        state.setdefault(places[name], {})[key] = tensor.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _named(optimizer: Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(names) != len(parameters) or len(set(names)) != len(names):
        raise ValueError(f"names has {len(set(names))} different names, but the optimiser has {len(parameters)} parameters")
    return dict(zip(names, parameters, strict=True))
