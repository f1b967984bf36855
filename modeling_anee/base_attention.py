"""Attention kernels of a base's implementation, in the one form that blocks call: queries, keys, values, mask.

Shapes: B rows, T queries, S keys, H query heads, G key/value heads, E head size.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")
HALF = (torch.bfloat16, torch.float16)


def attention_function(
    attention: nn.Module, config: PreTrainedConfig, scaling: float, softcap: float | None, folds: bool = True
) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """The attention kernel of the base's implementation: q, k, v, mask -> [B, T, H, E].

    Args:
        attention: the base's module.
        config: the base's configuration.
        scaling: factor of the scores.
        softcap: what bounds the scores, or None.
        folds: see `scaled_dot_product`.

    Raises:
        ValueError: an implementation that cannot attend with a subset of the queries, or not as the base does.
    """
    implementation = config._attn_implementation
    if implementation not in ATTENTION_IMPLEMENTATIONS:
        allowed = ", ".join(map(repr, ATTENTION_IMPLEMENTATIONS))
        raise ValueError(f"attn_implementation={implementation!r} is not supported; allowed: {allowed}")
    if implementation == "sdpa":
        if softcap is not None:
            raise ValueError("attn_implementation='sdpa' can't cap attention scores, as this base does; allowed: 'eager'")
        return partial(scaled_dot_product, scaling=scaling, folds=folds)
    if getattr(config, "reorder_and_upcast_attn", False):
        raise ValueError("reorder_and_upcast_attn=True is not supported with attn_implementation='eager'; use 'sdpa'")
    # falcon has no such function: its layers compute the plain formula themselves.
    plain = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", eager_attention)
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, plain)
    extra = {} if softcap is None else {"softcap": softcap}
    return partial(_first_result, kernel, attention, scaling=scaling, dropout=0.0, **extra)


def scaled_dot_product(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, folds: bool = True
) -> Tensor:
    """Grouped-query attention, [B, H, T, E] on [B, G, S, E] -> [B, T, H, E].

    With `folds`, a single token's heads of one group become the queries of one head, so no key or value is repeated. In half
    precision, and where rounded activations follow, that would round otherwise than the base does, which shows where two tokens
    are nearly equally likely; so there it is not done.
    """
    rows, heads, tokens, size = queries.shape
    groups = keys.shape[1]
    causal = mask is None and tokens > 1
    if folds and tokens == 1 and heads != groups and queries.dtype not in HALF:
        queries = queries.reshape(rows, groups, heads // groups, size)
    out = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, scale=scaling, is_causal=causal, enable_gqa=queries.shape[1] != groups
    )
    return out.reshape(rows, heads, tokens, size).transpose(1, 2)


def eager_attention(
    attention: nn.Module,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The plain formula, [B, H, T, E] on [B, G, S, E] -> [B, T, H, E] and the weights, for a base that has no function."""
    groups = keys.shape[1]
    queries = queries.unflatten(1, (groups, -1))  # [B, G, H / G, T, E]
    scores = queries @ keys.unsqueeze(2).mT * scaling
    if mask is not None:
        scores = scores + mask.unsqueeze(2)
    weights = scores.softmax(dim=-1)
    return (weights @ values.unsqueeze(2)).flatten(1, 2).transpose(1, 2), weights


def _first_result(kernel: Callable[..., tuple], *args: Tensor | nn.Module | None, **kwargs: float) -> Tensor:
    return kernel(*args, **kwargs)[0]
