"""One decoder layer of a frozen base, in the pieces that the executor puts together.

A block knows its family's anatomy and nothing of actions, budgets or caches.
Shapes: B rows, T tokens, D hidden size, H query heads, G key/value heads, E head size, S cached tokens.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .families import Family
from .projections import JointLinear, is_plain


ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")
Rotation = tuple[Tensor, Tensor]  # cos and sin, each [B or 1, T, 1, R]; the first half of sin is negated


class Block:
    """Queries, keys, values, attention and feed-forward of one decoder layer."""

    def __init__(self, layer: nn.Module, family: Family, config: PreTrainedConfig, index: int) -> None:
        self.config = config
        self.attention = layer.get_submodule(family.attention)
        self.attention_norm = layer.get_submodule(family.attention_norm)
        self.qkv = JointLinear([self.attention.get_submodule(name) for name in family.qkv])
        self.output = self.attention.get_submodule(family.output)
        self.feed_forward_norm = layer.get_submodule(family.feed_forward_norm)
        self.mlp = layer.get_submodule(family.feed_forward)

        self.heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.per_head = family.qkv_layout == "per_head"
        self.parallel = family.parallel
        layer_types = getattr(config, "layer_types", None)
        self.layer_type = layer_types[index] if layer_types else None
        self._normalise_attention = norm_function(self.attention_norm)
        self._normalise_feed_forward = norm_function(self.feed_forward_norm)
        self._feed_forward = feed_forward_function(self.mlp, family)
        self._attend = attention_function(self.attention, config)

    def queries_keys_values(self, hidden: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, E], keys and values [B, G, T, E] of hidden states [B, T, D]."""
        heads = self._project(hidden, 0, None)
        rotated = rotate(heads[:, :, : self.heads + self.kv_heads], rotation).transpose(1, 2)
        values = heads[:, :, self.heads + self.kv_heads :].transpose(1, 2)
        return rotated[:, : self.heads], rotated[:, self.heads :], values

    def keys_values(self, hidden: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, T, E] of hidden states [B, T, D]; queries are not computed."""
        keys, values = self._project(hidden, self.heads, None).split(self.kv_heads, dim=2)
        return rotate(keys, rotation).transpose(1, 2), values.transpose(1, 2)

    def queries(self, hidden: Tensor, rotation: Rotation | None) -> Tensor:
        """Queries [B, H, T, E] of hidden states [B, T, D]."""
        return rotate(self._project(hidden, 0, self.heads), rotation).transpose(1, 2)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The attention branch [B, T, D], for keys and values [B, G, S, E] and a mask [B or 1, 1, T, S].

        Without a mask a single query sees every key, and several are the last of a causal sequence.
        """
        return self.output(self._attend(queries, keys, values, mask).flatten(2))

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """The feed-forward branch, [B, T, D] -> [B, T, D]."""
        return self._feed_forward(self._normalise_feed_forward(hidden))

    def process(self, hidden: Tensor, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The whole layer: hidden states [B, T, D] -> [B, T, D]."""
        attended = hidden + self.attend(queries, keys, values, mask)
        return attended + self.feed_forward(hidden if self.parallel else attended)

    def _project(self, hidden: Tensor, first: int, last: int | None) -> Tensor:
        """Heads `first:last` of queries, keys and values in this order, [B, T, heads, E]."""
        x = self._normalise_attention(hidden)
        if self.per_head:  # [B, T, H * 3 * E] -> [B, T, 3 * H, E]
            return self.qkv(x).unflatten(-1, (self.heads, 3, self.head_size)).transpose(2, 3).flatten(2, 3)[:, :, first:last]
        stop = None if last is None else last * self.head_size
        return self.qkv(x, first * self.head_size, stop).unflatten(-1, (-1, self.head_size))


def prepare_rotation(cos: Tensor, sin: Tensor) -> Rotation:
    """Bring cos and sin [B, T, R] of a base's rotary embedding into the form that `rotate` takes."""
    half = sin.shape[-1] // 2
    sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
    return cos.unsqueeze(2), sin.unsqueeze(2)


def rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Rotary position embedding of the first R of E channels of x [B, T, heads, E] (RoFormer, arXiv:2104.09864)."""
    if rotation is None:
        return x
    cos, sin = rotation
    size = cos.shape[-1]
    turned, kept = x[..., :size], x[..., size:]
    swapped = torch.cat((turned[..., size // 2 :], turned[..., : size // 2]), dim=-1)
    turned = turned * cos + swapped * sin
    return turned if size == x.shape[-1] else torch.cat((turned, kept), dim=-1)


def norm_function(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """`norm` itself, or one fused kernel where torch has one with the same result."""
    if type(norm).__name__ not in ("LlamaRMSNorm", "Qwen2RMSNorm") or hasattr(norm, "_hf_hook"):
        return norm
    eps = norm.variance_epsilon

    def rms_norm(x: Tensor) -> Tensor:
        # In half precision the base rounds before the weight is applied; torch's kernel after.
        if x.dtype != torch.float32:
            return norm(x)
        return F.rms_norm(x, x.shape[-1:], norm.weight, eps)

    return rms_norm


def feed_forward_function(mlp: nn.Module, family: Family) -> Callable[[Tensor], Tensor]:
    """`mlp` itself, or the same with gate and up projections in one kernel."""
    if family.gated is None:
        return mlp
    gate, up, down = (mlp.get_submodule(name) for name in family.gated)
    if not (is_plain(gate) and is_plain(up)):
        return mlp
    gate_up, activation = JointLinear([gate, up]), mlp.get_submodule(family.activation)

    def gated(x: Tensor) -> Tensor:
        gate, up = gate_up(x).chunk(2, dim=-1)
        return down(activation(gate) * up)

    return gated


def attention_function(attention: nn.Module, config: PreTrainedConfig) -> Callable[..., Tensor]:
    """The attention kernel of the base's implementation: q, k, v, mask -> [B, T, H, E].

    Raises:
        ValueError: an implementation that cannot attend with a subset of the queries.
    """
    implementation = config._attn_implementation
    if implementation not in ATTENTION_IMPLEMENTATIONS:
        allowed = ", ".join(map(repr, ATTENTION_IMPLEMENTATIONS))
        raise ValueError(f"attn_implementation={implementation!r} is not supported; allowed: {allowed}")
    scaling = attention.scaling
    if implementation == "sdpa":
        return lambda q, k, v, mask: scaled_dot_product(q, k, v, mask, scaling)
    if getattr(config, "reorder_and_upcast_attn", False):
        raise ValueError("reorder_and_upcast_attn=True is not supported with attn_implementation='eager'; use 'sdpa'")
    plain = sys.modules[type(attention).__module__].eager_attention_forward
    eager = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, plain)
    return lambda q, k, v, mask: eager(attention, q, k, v, mask, scaling=scaling, dropout=0.0)[0]


def scaled_dot_product(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Grouped-query attention, [B, H, T, E] on [B, G, S, E] -> [B, T, H, E]."""
    rows, heads, tokens, size = queries.shape
    groups = keys.shape[1]
    causal = mask is None and tokens > 1
    if tokens == 1 and heads != groups:
        # The heads of a group become the queries of one head: no key or value is repeated.
        queries = queries.reshape(rows, groups, heads // groups, size)
    out = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, scale=scaling, is_causal=causal, enable_gqa=queries.shape[1] != groups
    )
    return out.reshape(rows, heads, tokens, size).transpose(1, 2)
