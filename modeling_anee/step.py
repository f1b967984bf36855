"""The tokens of one forward, and subsets of them that are gathered to be run alone.

Shapes: B rows, T new tokens, D hidden size, S cached tokens; a subset has N tokens in R of the rows, at most n in each.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import Cache

from .base_rotary import Rotation
from .cache import AneeCache
from .positions import Places


@dataclass(frozen=True)
class Step:
    """The tokens of one forward.

    Args:
        budget: float64 [B, T] on the CPU.
        places: where each token stands in its sequence, and whether it is real.
        rotations: rotary cos and sin of the positions, or None, for each layer.
        masks: attention mask of the base, or None, for each layer.
        cache: where keys and values go, or None.
        past: number of tokens in the cache before.
        account: what each row's tokens before have spent above their budgets, float64 [B, 1] on the CPU, or what each layer
            has run for them above its share, [B, 1, L], for controllers that keep an account.
        answers: takes the logits [B, 1, V] of one token a row, where deciding about it took them.
    """

    budget: Tensor
    places: Places
    rotations: list[Rotation | None]
    masks: list[Tensor | None]
    cache: Cache | None
    past: int
    account: Tensor | float = 0.0
    answers: list[Tensor] = field(default_factory=list)

    def store(self, keys_values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Put a layer's new keys and values [B, 2 G, T, E] into the cache; the keys and values of all tokens so far."""
        if isinstance(self.cache, AneeCache):
            return self.cache.layers[layer].append(keys_values)
        keys, values = keys_values.chunk(2, dim=1)
        return (keys, values) if self.cache is None else self.cache.update(keys, values, layer)

    def part(self, rows: Tensor, columns: Tensor) -> "Step":
        """The same for some rows int64 [R] and tokens int64 [n] alone, on the CPU; nothing may be cached.

        Raises:
            ValueError: there is a cache, which would still have all rows.
        """
        if self.cache is not None:
            raise ValueError("a part of a step with a cache is not possible: the cache has all rows")
        places = replace(
            self.places,
            index=self.places.index[rows][:, columns],
            valid=self.places.valid[rows][:, columns],
            first=None if self.places.first is None else self.places.first[rows][:, columns],
        )
        made: dict[int, Tensor] = {}  # layers share their masks and rotations

        def taken(x: Tensor, is_mask: bool) -> Tensor:
            if id(x) not in made:
                own, kept = rows.to(x.device), columns.to(x.device)
                x_rows = x[own] if x.shape[0] > 1 else x
                made[id(x)] = x_rows[:, :, kept][..., kept] if is_mask else x_rows[:, kept]
            return made[id(x)]

        return replace(
            self,
            budget=self.budget[rows][:, columns],
            places=places,
            rotations=[r if r is None else (taken(r[0], False), taken(r[1], False)) for r in self.rotations],
            masks=[mask if mask is None else taken(mask, True) for mask in self.masks],
        )

    @property
    def valid(self) -> Tensor:
        """False for padding, bool [B, T] on the CPU."""
        return self.places.valid

    @cached_property
    def real_tokens(self) -> int:
        """Number of tokens that are not padding."""
        return int(self.valid.sum())


@dataclass(frozen=True)
class Subset:
    """Some of the tokens of a step, gathered into a rectangle of R rows and at most n tokens each.

    Args:
        rows: rows with any token, int64 [R].
        columns: their tokens, int64 [R, n]; short rows are filled up with token 0.
        places: where in the rectangle the N tokens are, fillers left out, flat, int64 [N].
        tokens: where in the step they are, flat, int64 [N].
    """

    rows: Tensor
    columns: Tensor
    places: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, chosen: Tensor, device: torch.device) -> "Subset":
        """The tokens marked in a mask [B, T] that lies on the CPU."""
        rows = chosen.any(dim=1).nonzero().squeeze(1)
        counts = chosen[rows].sum(dim=1)
        columns = (~chosen[rows]).long().argsort(dim=1, stable=True)[:, : int(counts.max())]
        real = torch.arange(columns.shape[1], device="cpu") < counts.unsqueeze(1)
        parts = rows, columns.masked_fill(~real, 0), flat_indices(real), flat_indices(chosen)
        return cls(*(part.to(device) for part in parts))

    def gather(self, x: Tensor) -> Tensor:
        """[B or 1, T, ...] -> [R, n, ...]."""
        rows = self.rows if x.shape[0] > 1 else torch.zeros_like(self.rows)
        return x[rows.unsqueeze(1), self.columns]

    def flat(self, part: Tensor) -> Tensor:
        """[R, n, D] -> [N, D], without the fillers."""
        part = part.flatten(0, 1)
        return part if len(part) == len(self.places) else part[self.places]

    def scatter(self, x: Tensor, part: Tensor) -> Tensor:
        """A copy of x [B, T, D] with the tokens of the subset taken from `part` [N, D]."""
        return x.flatten(0, 1).index_copy(0, self.tokens, part).view_as(x)

    def take_rows(self, x: Tensor) -> Tensor:
        """The rows of x [B, ...] that have any token."""
        return x if len(self.rows) == x.shape[0] else x.index_select(0, self.rows)

    def mask(self, mask: Tensor | None, step: Step, keys: int) -> Tensor | None:
        """Rows and queries of an attention mask [B or 1, 1, T, S]; one is made where the base relies on causality."""
        if mask is None and step.valid.shape[1] == 1:
            return None
        if mask is None:
            last_key = self.columns + step.past
            return (torch.arange(keys, device=last_key.device) <= last_key.unsqueeze(-1)).unsqueeze(1)
        return self.gather(mask.transpose(1, 2)).transpose(1, 2)


def flat_indices(mask: Tensor) -> Tensor:
    """Flat indices of what a mask marks, int64 [N]."""
    return mask.flatten().nonzero().squeeze(1)
