"""What encoders have that decoders have not: masks that hide padding alone, embeddings of token types, a norm of embeddings.

Shapes: B rows, T tokens, D hidden size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .base_families import Family


def encoder_mask(hidden: Tensor, attention_mask: Any) -> Tensor:
    """What is added to the scores of hidden states [B, T, D], [B, 1, T, T]: every token sees all that are real.

    Args:
        hidden: for its shape, dtype and device.
        attention_mask: [B, T], 0 for padding; None for none.

    Raises:
        ValueError: a ready mask.
    """
    rows, tokens = hidden.shape[:2]
    seen = hidden.new_zeros(rows, 1, tokens, tokens)
    if attention_mask is None:
        return seen
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        raise ValueError("attention_mask of an encoder must be [rows, tokens], 0 for padding: ready masks are not allowed")
    padding = attention_mask.to(hidden.device) == 0
    return seen.masked_fill(padding[:, None, None, :], torch.finfo(hidden.dtype).min)


def embedding_function(decoder: nn.Module, family: Family) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """What follows the sum of embeddings of tokens and positions [B, T, D], given token types int64 [B, T]; None: nothing."""
    if family.token_types is None or family.embedding_norm is None:
        return None
    types: Any = decoder.get_submodule(family.token_types)
    norm = decoder.get_submodule(family.embedding_norm)

    def finished(embeddings: Tensor, token_type_ids: Tensor | None) -> Tensor:
        return norm(embeddings + (types.weight[0] if token_type_ids is None else types(token_type_ids)))

    return finished
