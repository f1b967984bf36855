"""Narrow variants: a sublayer with its most important neurons, or groups of heads, alone.

An artifact has the orders of importance, integers; weights are sliced from the base's when a variant is made. Keys and values
are those of all groups of heads, so that the caches of tokens in different variants are alike.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


WIDTHS = {"half": 2, "quarter": 4}
NEURONS, HEADS = "neurons", "heads"


class Narrow(NamedTuple):
    """One of so many parts of a variant."""

    whole: str
    parts: int


NARROW = {f"{whole}_{width}": Narrow(whole, parts) for whole in ("full", "int8", "int4") for width, parts in WIDTHS.items()}


def whole_of(variant: str) -> str:
    """What a narrow variant is a part of; any other itself."""
    return NARROW[variant].whole if variant in NARROW else variant


def check_narrow(names: Any, precisions: Sequence[str]) -> None:
    """Check the narrow variants of a configuration.

    Raises:
        ValueError: one is not known, is there twice, or is a part of a variant that is not among the precisions.
    """
    allowed = [name for name, (whole, _) in NARROW.items() if whole in ("full", *precisions)]
    if not isinstance(names, list | tuple) or not all(name in allowed for name in names) or len(set(names)) != len(names):
        raise ValueError(f"narrow={names!r} is not allowed: it must be a list of different ones of {allowed}")


class Orders(nn.Module):
    """Neurons [L, neurons] and groups of heads [L, groups] of each layer, the most important first, int32.

    Without any, as before they are found, those whose weights in the output map are largest come first.

    Args:
        shapes: by name, as `config.orders` has them; None for none.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]] | None = None) -> None:
        super().__init__()
        for name, (layers, size) in (shapes or {}).items():
            self.register_buffer(name, torch.tensor([list(range(size))] * layers, dtype=torch.int32))

    @classmethod
    def of(cls, importance: Mapping[str, Tensor]) -> "Orders":
        """Those of importances [L, n], by name."""
        made = cls()
        for name, own in importance.items():
            made.register_buffer(name, by_size(own).to(torch.int32))
        return made

    @property
    def shapes(self) -> dict[str, list[int]]:
        """What `config.orders` has to be for them."""
        return {name: list(own.shape) for name, own in self.named_buffers()}

    def most_important(self, name: str, layer: int, parts: int, output: Tensor) -> Tensor:
        """Places of one of so many parts, rounded up, ascending int64 [n].

        Args:
            name: of what: `NEURONS` or `HEADS`.
            layer: which.
            parts: of which one is kept.
            output: weights of what comes from each, [out, total, inputs of each].

        Raises:
            ValueError: the order is one of another base.
        """
        total = output.shape[1]
        if name in self._buffers:
            order = self.get_buffer(name)[layer].long().to(output.device)
            if not torch.equal(order.sort().values, torch.arange(total, device=output.device)):
                raise ValueError(f"the order of {name} of layer {layer} is not one of all {total} that the base has")
        else:
            order = by_size(output.float().square().sum(dim=(0, 2)))
        return order[: -(-total // parts)].sort().values


def by_size(importance: Tensor) -> Tensor:
    """Places along the last dimension, those of the largest numbers first, int64."""
    return importance.argsort(dim=-1, descending=True, stable=True)


def places_of(parts: Tensor, size: int) -> Tensor:
    """Places of all that parts of one size consist of, int64 [n] -> [n * size]."""
    return (parts.unsqueeze(1) * size + torch.arange(size, device=parts.device)).flatten()


def projected_places(attending: Tensor, heads: int, groups: int, size: int, grouped: bool) -> Tensor:
    """Places of outputs of a joint projection: queries of some heads int64 [n], keys of all groups, values of all groups.

    Args:
        attending: the heads.
        heads: how many there are.
        groups: how many groups of them.
        size: of a head.
        grouped: whether the outputs are those of one group after the other, not all queries, all keys, all values.
    """
    each, all_groups = heads // groups, torch.arange(groups, device=attending.device)
    if grouped:
        queries, keys = attending // each * (each + 2) + attending % each, all_groups * (each + 2) + each
        return places_of(torch.cat((queries, keys, keys + 1)), size)
    return places_of(torch.cat((attending, heads + all_groups, heads + groups + all_groups)), size)
