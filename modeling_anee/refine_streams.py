"""Two streams of the same tokens through layers: what runs first, and what runs again; each token is seen by later ones once.

Shapes: B rows, T tokens, Q of them that run now (of either stream), P cached tokens, S = P + T, L layers.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .cache import AneeCacheLayer
from .step import Step


READABLE = ("DynamicLayer", "DynamicSlidingWindowLayer")  # of transformers: their keys and values are those of the last tokens


class StreamCache:
    """Keys and values of T tokens in both streams, after those that are in a cache, which stays as it is.

    Args:
        step: the tokens; its cache is read.
        start: the first of the layers.
        layers: how many there are.

    Raises:
        ValueError: a cache whose keys and values can't be read.
    """

    def __init__(self, step: Step, start: int, layers: int) -> None:
        self._tokens = step.valid.shape[1]
        self._past = {layer: _past_of(step, layer) for layer in range(start, layers)}
        self._seen: dict[int, Tensor] = {}  # by layer [B, 2 G, P + 2 T, E]: what is cached, the first stream, the second
        self.slots: Tensor | None = None  # where what runs now belongs, int64 [Q]: its column, or T more for what runs again

    def past(self, layer: int) -> int:
        """P of a layer: a sliding window has fewer."""
        past = self._past[layer]
        return 0 if past is None else past.shape[2]

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Take keys and values [B, G, Q, E]; those of P + 2 T tokens, of which a mask says who sees them."""
        new, past = torch.cat((keys, values), dim=1), self.past(layer)
        seen = self._seen.get(layer)
        if seen is None:
            seen = new.new_zeros((*new.shape[:2], past + 2 * self._tokens, new.shape[3]))
            if (cached := self._past[layer]) is not None:
                seen[:, :, :past] = cached
        assert self.slots is not None
        self._seen[layer] = seen = seen.index_copy(2, self.slots.to(new.device) + past, new)
        groups = keys.shape[1]
        return seen[:, :groups], seen[:, groups:]

    def chosen(self, layer: int, refined: Tensor) -> Tensor:
        """Keys and values [B, 2 G, T, E] of a layer: the dearer ones of the tokens that ran again, bool [B, T]."""
        _, first, again = self._seen[layer].split((self.past(layer), self._tokens, self._tokens), dim=2)
        return torch.where(refined.to(first.device)[:, None, :, None], again, first)


def _past_of(step: Step, layer: int) -> Tensor | None:
    """Keys, then values that a layer's cache holds, [B, 2 G, P, E]; None for none.

    Raises:
        ValueError: they can't be read.
    """
    if step.cache is None or layer >= len(step.cache.layers):
        return None
    own: Any = step.cache.layers[layer]
    kind = type(own).__name__
    if kind == "StaticLayer":
        return torch.cat((own.keys, own.values), dim=1)[:, :, : step.past] if step.past else None
    if not isinstance(own, AneeCacheLayer) and kind not in READABLE:
        raise ValueError(
            f"controller='refine' can't run with a {type(step.cache).__name__} of {kind}: it replaces keys and values, so they "
            "must be readable; give a DynamicCache, or none"
        )
    return torch.cat((own.keys, own.values), dim=1) if own.is_initialized and own.keys.numel() else None


@dataclass(frozen=True)
class Queries:
    """Tokens that run now: Q columns of a step, each in one stream.

    Args:
        columns: int64 [Q], on the CPU.
        again: whether each is of the second stream, bool [Q], on the CPU.
    """

    columns: Tensor
    again: Tensor

    @classmethod
    def of(cls, first: Tensor, again: Tensor) -> "Queries":
        """Columns int64 of the first and of the second stream."""
        streams = torch.arange(len(first) + len(again), device="cpu") >= len(first)
        return cls(torch.cat((first, again)), streams)

    def slots(self, tokens: int) -> Tensor:
        """Their places among 2 T, int64 [Q]."""
        return self.columns + tokens * self.again

    def step(self, step: Step, refined: Tensor, cache: StreamCache, start: int) -> Step:
        """The step to run them in, from that of all T tokens.

        Args:
            step: of all tokens.
            refined: who has run again, as later tokens see it, bool [B, T].
            cache: of the layers from `start` on.
            start: the first layer.
        """
        columns, places = self.columns, step.places
        valid = places.valid[:, columns] & (refined[:, columns] | ~self.again)
        made: dict[Any, Tensor] = {}  # layers share their masks and rotations

        def mask(layer: int) -> Tensor:
            own, past = step.masks[layer], cache.past(layer)
            if (key := (id(own), past)) not in made:
                made[key] = self._mask(own, past, refined)
            return made[key]

        def turned(x: Tensor) -> Tensor:
            return made.setdefault(id(x), x[:, columns.to(x.device)])

        return replace(
            step,
            budget=step.budget[:, columns],
            places=replace(places, index=places.index[:, columns], valid=valid, first=None),
            rotations=[pair and (turned(pair[0]), turned(pair[1])) for pair in step.rotations],
            masks=[None if layer < start else mask(layer) for layer in range(len(step.masks))],
            cache=cache,  # type: ignore[arg-type]
        )

    def _mask(self, own: Tensor | None, past: int, refined: Tensor) -> Tensor:
        """Who sees what of P + 2 T, [B, 1, Q, P + 2 T]: of each earlier token what it is, of itself its own stream.

        Args:
            own: mask of all tokens [B or 1, 1, T, S], bool or added to scores; None: causal.
            past: P.
            refined: bool [B, T].
        """
        tokens = refined.shape[1]
        device = refined.device if own is None else own.device
        columns, again, refined = (x.to(device) for x in (self.columns, self.again, refined))
        place = torch.arange(tokens, device=device)
        before, itself = place < columns.unsqueeze(1), place == columns.unsqueeze(1)  # [Q, T]
        who = refined[:, None, None]  # [B, 1, 1, T]
        first, second = before & ~who | itself & ~again.unsqueeze(1), before & who | itself & again.unsqueeze(1)
        if own is None:
            own = (before | itself)[None, None]
            own = torch.cat((own.new_ones(1, 1, len(columns), past), own), dim=-1)
        else:
            own = own[:, :, columns, : past + tokens]
        if own.dtype == torch.bool:  # padding must see something
            own = own | torch.cat((own.new_zeros(len(columns), past), itself), dim=-1)
        cached, new = own.split((past, tokens), dim=-1)
        allowed = torch.cat((first.new_ones((*first.shape[:3], past)), first, second), dim=-1)
        both = torch.cat((cached, new, new), dim=-1)
        if own.dtype == torch.bool:
            return both & allowed
        return both.masked_fill(~allowed, torch.finfo(own.dtype).min)


def put(x: Tensor | None, slots: Tensor, part: Tensor, tokens: int) -> Tensor:
    """Hidden states [B, 2 T, D] with those of `part` [B, Q, D] at slots int64 [Q]; None: nothing was there before."""
    if x is None:
        x = part.new_zeros((len(part), 2 * tokens, part.shape[2]))
    return x.index_copy(1, slots.to(part.device), part)


def taken(x: Tensor, refined: Tensor) -> Tensor:
    """Hidden states [B, T, D] of both streams [B, 2 T, D]: the second's where a token ran again, bool [B, T]."""
    first, again = x.chunk(2, dim=1)
    return torch.where(refined.to(x.device).unsqueeze(-1), again, first)


def columns_of(tokens: Tensor, first: int = 0) -> Tensor:
    """Columns from one on in which any row has a token, bool [B, T] -> int64 [n]."""
    return first + tokens[:, first:].any(dim=0).nonzero().squeeze(1)


def first_difference(one: Tensor, other: Tensor) -> int:
    """The first column in which bool [B, T] and [B, T] differ; T where they don't."""
    apart = (one != other).any(dim=0)
    return int(apart.int().argmax()) if apart.any() else len(apart)
