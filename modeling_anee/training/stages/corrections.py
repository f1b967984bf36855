"""Corrections: the directions in which the inputs of every linear map mostly lie, in the base as it is.

They are the leading eigenvectors of the inputs' second moments (with the mean in them: it is the largest part). Maps of which
4 bits lose next to nothing, as in a base whose weights were made for 4 bits, get none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ...base_linear import JointLinear
from ...corrections import HEAD, Corrections
from ..run import Run


NAME = "corrections"
VARIANT = "int4"
TOKENS = 1024  # whose inputs are kept, for all maps at once
LOOKED_AT = 64  # of these, to see whether a map needs any
NEGLIGIBLE = 1e-4  # share of the outputs' mean square that is lost


def run_stage(run: Run) -> dict:
    """Run the base over some windows, and keep the directions of every map that needs them.

    Raises:
        ValueError: the model has no variant in 4 bits.
    """
    settings, model = run.settings(NAME), run.model
    if VARIANT not in (model.config.precisions or ()):
        raise ValueError(f"stages.corrections needs {VARIANT!r} in anee.precisions, which are {model.config.precisions}")
    maps = linear_maps(model.stack)
    windows = run.windows("train")[: settings.windows].to(run.device)
    inputs = inputs_of(run, maps, windows)
    found: dict[str, Tensor] = {}
    names = sorted(maps)
    for number in run.track(len(names), "directions of inputs"):
        name = names[number]
        own, rows = maps[name], inputs.pop(name)
        if median(lost_share(one, x) for one, x in zip(own, rows, strict=True)) > NEGLIGIBLE:
            rank = settings.head_rank if name == HEAD else settings.rank
            directions = [leading(x, min(rank, *x.shape)) for x in rows]
            found[name] = directions[0] if name == HEAD else torch.stack(directions)
    model.corrections = Corrections.of(found)
    return {"corrections": model.corrections.shapes or None}


def linear_maps(stack: Any) -> dict[str, list[JointLinear]]:
    """The maps that run in 4 bits, by name: one a layer, and the head."""
    blocks = [block.linear for block in stack.blocks_of(VARIANT)]
    maps = {name: [block[name] for block in blocks] for name in blocks[0]}
    return maps | {HEAD: [stack.head_map(VARIANT)]}


@torch.no_grad()
def inputs_of(run: Run, maps: dict[str, list[JointLinear]], windows: Tensor, first: int = 0) -> dict[str, list[Tensor]]:
    """Inputs [N, in] of every map for evenly spread tokens of windows int64 [W, T] from the first on, as the base has them."""
    each = -(-TOKENS // len(windows))
    kept: dict[str, list[list[Tensor]]] = {name: [[] for _ in own] for name, own in maps.items()}

    def keep(name: str, layer: int) -> Any:
        def hook(module: Any, given: tuple[Tensor, ...]) -> None:
            x = given[0].flatten(0, -2)[first:]
            kept[name][layer].append(x[torch.linspace(0, len(x) - 1, min(each, len(x))).long()].clone())

        return hook

    with hooked({one.modules[0]: keep(name, layer) for name, own in maps.items() for layer, one in enumerate(own)}):
        for window in run.track(len(windows), "inputs of linear maps"):
            run.model.base(windows[window : window + 1])
    return {name: [torch.cat(parts) for parts in layers] for name, layers in kept.items()}


@contextmanager
def hooked(hooks: dict[Any, Any]) -> Iterator[None]:
    """Modules with hooks that see their inputs."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def lost_share(one: JointLinear, x: Tensor) -> float:
    """Mean square of what 4 bits lose of the outputs for inputs [N, in], over that of the outputs."""
    x = x[:: max(len(x) // LOOKED_AT, 1)]
    full = torch.cat([module(x) for module in one.modules], dim=-1).float()
    return float((one(x).float() - full).square().mean() / full.square().mean().clamp(min=torch.finfo().tiny))


def leading(x: Tensor, rank: int) -> Tensor:
    """The leading directions of rows [N, in], orthonormal, float32 [rank, in]."""
    x = x.double()
    if x.shape[0] < x.shape[1]:  # the same from the smaller of the two products
        values, vectors = torch.linalg.eigh(x @ x.T)
        found = (x.T @ vectors[:, -rank:]) * values[-rank:].clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
    else:
        found = torch.linalg.eigh(x.T @ x).eigenvectors[:, -rank:]
    return found.flip(1).T.float().contiguous()
