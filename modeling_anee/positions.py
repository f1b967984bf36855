"""Where each new token stands in its own sequence, and which tokens are real: the one place that reads masks for it.

Everything here is kept on the CPU, where decisions are made. Shapes: B rows, T new tokens, S cached and new tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.masking_utils import find_packed_sequence_indices


Mask = Tensor | dict[str, Tensor] | None


@dataclass(frozen=True)
class Places:
    """The places of the tokens of one forward.

    Args:
        index: number of tokens of its own sequence before each token, padding left out, int64 [B, T].
        valid: False for padding, bool [B, T].
        first: column of the first token of each token's own sequence, for rows that are several packed sequences, int64
            [B, T]; None where every row is one sequence.
    """

    index: Tensor
    valid: Tensor
    first: Tensor | None = None

    @property
    def sequence(self) -> Tensor:
        """A number for the sequence that each token belongs to, ascending, int64 [B, T]."""
        rows, tokens = self.index.shape
        row = torch.arange(rows, device="cpu").unsqueeze(1).expand(rows, tokens)
        return row if self.first is None else row * tokens + self.first

    def running_sum(self, values: Tensor) -> Tensor:
        """Sums of values [B, T, ...] over each token's own sequence, up to and with the token."""
        sums = values.cumsum(dim=1)
        if self.first is None:
            return sums
        first = self.first.view(*self.first.shape, *[1] * (values.dim() - 2)).expand_as(values)
        return sums - (sums - values).gather(1, first)


def token_places(mask: Mask, position_ids: Tensor | None, past: int, rows: int, tokens: int, has_cache: bool) -> Places:
    """Read the places of new tokens off what a forward was given.

    Args:
        mask: [B, S] with 0 for padding; ready masks [B or 1, 1, T, S], bool or added to scores, or a dict of them by layer
            type; None where nothing is padded.
        position_ids: int64 [B or 1, T] if they were given. Without a mask and a cache, positions that do not go up by one
            begin another sequence in the same row, as transformers' own masks have it.
        past: number of tokens in the cache before.
        rows: B.
        tokens: T.
        has_cache: whether there is a cache, even an empty one.

    Raises:
        ValueError: a dict of masks without one over the whole sequence.
    """
    if isinstance(mask, dict):
        if "full_attention" not in mask:
            raise ValueError(
                f"attention_mask with the keys {sorted(mask)} is not allowed: it needs 'full_attention', since a sliding "
                "window does not tell where a token stands in its sequence"
            )
        mask = mask["full_attention"]
    if mask is None:
        packed = None if position_ids is None or has_cache else find_packed_sequence_indices(position_ids.cpu())
        return _unpadded(past, rows, tokens) if packed is None else _packed(packed.expand(rows, -1))
    if mask.dim() == 2:
        real = mask.cpu().bool()
        return Places((real.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -tokens:], real[:, -tokens:])
    return _seen(mask, past, rows, tokens)


def _unpadded(past: int, rows: int, tokens: int) -> Places:
    index = torch.arange(past, past + tokens, device="cpu").expand(rows, tokens)
    return Places(index, torch.ones(rows, tokens, dtype=torch.bool, device="cpu"))


def _packed(sequence: Tensor) -> Places:
    """Places in rows of several sequences, told apart by their numbers [B, T]."""
    column = torch.arange(sequence.shape[1], device="cpu").expand_as(sequence)
    begins = torch.diff(sequence, prepend=sequence[:, :1] - 1, dim=1) != 0
    first = torch.where(begins, column, 0).cummax(dim=1).values
    return Places(column - first, torch.ones_like(begins), first)


def _seen(mask: Tensor, past: int, rows: int, tokens: int) -> Places:
    """Places read off a ready mask: before a token are the others that it sees; padding sees later ones, or not itself."""
    mask = mask[:, 0].cpu()
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2  # [B or 1, T, S]
    own = torch.arange(past, past + tokens, device="cpu")
    later = torch.arange(seen.shape[-1], device="cpu") > own.unsqueeze(1)
    valid = seen[:, own - past, own] & ~(seen & later).any(dim=-1)
    index = (seen.sum(dim=-1) - 1).clamp(min=0)
    return Places(index.expand(rows, tokens), valid.expand(rows, tokens))
