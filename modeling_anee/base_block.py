"""One decoder layer of a frozen base, in the pieces that the executor puts together.

A block knows its family's anatomy and nothing of actions, budgets or caches.
Shapes: B rows, T tokens, D hidden size, H query heads, G key/value heads, E head size, S cached tokens.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .actions import FULL
from .base_attention import attention_function
from .base_families import Family
from .base_linear import GroupedLinear, JointLinear, is_plain, out_features, readable_weight
from .base_packed import is_packed
from .base_rotary import Rotation, rotate_function, rotate_in_place
from .base_variants import VARIANTS, Variant
from .base_watch import is_untouched
from .corrections import PART
from .narrow import HEADS, NEURONS, Orders, places_of, projected_places


# Norms that are torch's `rms_norm`, in float32, with `variance_epsilon`.
RMS_NORMS = tuple(f"{name}RMSNorm" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Phi3", "Olmo2", "Granite"))


_ZERO = torch.zeros(1, device="cpu")
QKV, OUTPUT = "qkv", "output"  # names of linear maps


def mlp_map(number: int) -> str:
    """Name of a linear map of the feed-forward, in the order in which they run."""
    return f"mlp_{number}"


@dataclass(frozen=True)
class PlainParts:
    """What a layer is made of that has nothing but norm, attention, residual, norm, gated feed-forward, residual.

    `plan_runner.py` runs such layers as straight lists of kernels.
    """

    attention_norm: Any
    mlp_norm: Any
    scaling: float
    activation: nn.Module


class Block:
    """Queries, keys, values, attention and feed-forward of one decoder layer, in one variant.

    In a narrow one `heads` are those whose queries are computed; keys and values are those of all groups in every variant.

    Raises:
        ValueError: the layer can't be run in the variant.
    """

    def __init__(
        self,
        layer: nn.Module,
        family: Family,
        config: PreTrainedConfig,
        index: int,
        variant: Variant = VARIANTS[FULL],
        directions: Mapping[str, Tensor] | None = None,
        orders: Orders | None = None,
    ) -> None:
        along = (directions or {}).get
        important = partial((orders or Orders()).most_important, layer=index, parts=variant.parts)
        self.siblings: dict[str, Block] = {variant.name: self}  # this layer in every variant that has been made
        attention = layer.get_submodule(family.attention)
        layer_types = getattr(config, "layer_types", None)
        self.layer_type = layer_types[index] if layer_types else None
        self.rotates = family.rotary is not None and (
            family.rotary_switch is None or bool(getattr(attention, family.rotary_switch))
        )
        self.parallel = family.parallel
        after = self._norms_after_residual = family.norm_after_residual

        self.heads = config.num_attention_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        projections = [attention.get_submodule(name) for name in family.qkv]
        self.kv_heads = (sum(map(out_features, projections)) // self.head_size - self.heads) // 2
        self.grouped = family.qkv_layout == "grouped"
        attention_norm = _find(layer, family.attention_norm)
        query_norm, key_norm = _find(attention, family.query_norm), _find(attention, family.key_norm)
        output, output_norm = attention.get_submodule(family.output), _find(layer, family.attention_output_norm)
        self.groups: Tensor | None = None  # that attend, int64, ascending; None: all
        self._attending: Tensor | None = None  # heads among those whose queries are computed; None: all
        if variant.parts > 1:
            weight = readable_weight(output, variant)
            self.groups = important(HEADS, output=weight.unflatten(1, (self.kv_heads, -1)))
            attending = places_of(self.groups, self.heads // self.kv_heads)
            outputs = None
            if query_norm is None or (family.head_norm_input == "heads" and _is_shared(query_norm, self.head_size)):
                outputs = projected_places(attending, self.heads, self.kv_heads, self.head_size, self.grouped)
                self.heads, self.grouped = len(attending), False
            else:
                self._attending = attending
            inputs = places_of(attending, self.head_size)
        else:
            outputs = inputs = None
        if self.grouped:
            self.qkv: JointLinear = GroupedLinear(projections[0], self.kv_heads, variant, along(QKV))
        else:
            self.qkv = JointLinear(projections, variant, along(QKV), outputs)
        # Outputs of `qkv` (of each group of them, when grouped) that are queries.
        self._end_of_queries = self.heads * self.head_size // (self.kv_heads if self.grouped else 1)
        self._interleaved, self._rotate = family.rotary_interleaved, rotate_function(family.rotary_interleaved)
        mlp = feed_forward_module(layer, family)
        mlp_norm, mlp_output_norm = _find(layer, family.feed_forward_norm), _find(layer, family.feed_forward_output_norm)
        # What costs, beside `qkv`: output and feed-forward; norms of attention, of keys and values alone, of the feed-forward.
        part = PART if variant.parts > 1 else ""  # of the inputs of the output maps
        self.output, self.mlp = JointLinear([output], variant, along(part + OUTPUT), inputs=inputs), mlp
        self.attention_norms = _present(attention_norm, query_norm, key_norm, output_norm)
        self.key_norms = _present(None if after else attention_norm, key_norm)
        self.mlp_norms = _present(mlp_norm, mlp_output_norm)
        gated_parts = _gated_parts(mlp, family)
        # Modules that are called or stood in for, and a feed-forward of which only the parts are.
        self.parts = [*projections, output, *self.attention_norms, *self.mlp_norms]
        self.parts += gated_parts or (mlp.children() if isinstance(family.feed_forward, tuple) else [mlp])
        self.bypassed = [mlp] if gated_parts else []

        multiplier = getattr(config, family.residual_multiplier_field) if family.residual_multiplier_field else None
        softcap = getattr(config, family.softcap_field) if family.softcap_field else None
        # What is packed may round what it is given, and makes much of the last bit: nothing else may round otherwise then.
        exact = any(is_packed(part) for module in projections for part in module.modules())
        run = partial(norm_function, exact=exact)
        self._before_attention = run(None if after else attention_norm)
        self._before_feed_forward = run(None if after else mlp_norm)
        self._after_attention = run(attention_norm if after else None)
        self._after_feed_forward = run(mlp_norm if after else None)
        self._normalise_queries = head_norm_function(query_norm and run(query_norm), family.head_norm_input)
        self._normalise_keys = head_norm_function(key_norm and run(key_norm), family.head_norm_input)
        self._attend = attention_function(attention, config, _scaling(attention, family), softcap, folds=not exact)
        self._output = branch_function(self.output, output_norm and run(output_norm), multiplier)
        feed_forward: Any = mlp
        self.mlp_maps: list[JointLinear] = []  # where they are not those that the module itself calls
        self.neurons: Tensor | None = None  # that run, int64, ascending; None: all
        if variant.parts > 1 and (plain := [one for one in (gated_parts or mlp.children()) if is_plain(one)]):
            self.neurons = important(NEURONS, output=readable_weight(plain[-1], variant).unsqueeze(2))
        neurons = self.neurons
        if gated_parts:
            both = None if neurons is None else torch.cat((neurons, neurons + out_features(gated_parts[0])))
            gate_up = JointLinear(gated_parts[:2], variant, along(mlp_map(0)), both)
            self.mlp_maps = [gate_up, JointLinear(gated_parts[2:3], variant, along(part + mlp_map(1)), inputs=neurons)]
            feed_forward = partial(gated, self.mlp_maps[0], self.mlp_maps[1], gated_parts[3])
        elif variant.name != FULL:
            feed_forward, self.mlp_maps = in_variant(mlp, variant, along, neurons)
        if variant.name != FULL and not self.mlp_maps:
            raise ValueError(
                f"variant {variant.name!r} is not possible for the feed-forward of a {config.model_type} base as it is here: "
                "it has no linear maps whose weights may be read"
            )
        self._feed_forward = branch_function(feed_forward, mlp_output_norm and run(mlp_output_norm), multiplier)

        extras = query_norm, key_norm, output_norm, mlp_output_norm, multiplier, softcap
        usual = gated_parts and not (after or exact or self.parallel or self.grouped or self._interleaved)
        known = all(_is_rms_norm(norm) for norm in (attention_norm, mlp_norm)) and config._attn_implementation == "sdpa"
        self.plain: PlainParts | None = None  # where the layer is of the plain kind
        if usual and known and extras == (None,) * len(extras):
            self.plain = PlainParts(attention_norm, mlp_norm, _scaling(attention, family), gated_parts[3])

    @property
    def linear(self) -> dict[str, JointLinear]:
        """All linear maps that are run here, not by a module of the base's, by name."""
        return {QKV: self.qkv, OUTPUT: self.output} | {mlp_map(n): one for n, one in enumerate(self.mlp_maps)}

    def in_variant(self, variant: str) -> "Block":
        """The same layer in another variant, which has been made."""
        return self.siblings[variant]

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of one token, in the dtype of the norms and projections."""
        weights = (weight for part in self.parts for weight in part.parameters() if weight.is_floating_point())
        return 2 * self.kv_heads * self.head_size * next((weight.element_size() for weight in weights), 4)

    @property
    def keys_values_share(self) -> float:
        """Share of the work of `qkv` that keys and values alone need."""
        return self.qkv.share(self._end_of_queries)

    def queries_keys_values(self, hidden: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """Queries [B, H, T, E], keys and values together [B, 2 G, T, E] of hidden states [B, T, D]."""
        heads = self._rotated(self._project(hidden, True, True), self.heads, rotation).transpose(1, 2)
        return self._of_groups(heads[:, : self.heads]), heads[:, self.heads :]

    def keys_values(self, hidden: Tensor, rotation: Rotation | None) -> Tensor:
        """Keys and values together [B, 2 G, T, E] of hidden states [B, T, D]; queries are not computed."""
        return self._rotated(self._project(hidden, False, True), 0, rotation).transpose(1, 2)

    def queries(self, hidden: Tensor, rotation: Rotation | None) -> Tensor:
        """Queries [B, H, T, E] of hidden states [B, T, D]."""
        queries = self._project(hidden, True, False)
        if self._normalise_queries is not None:
            queries = self._normalise_queries(queries)
        return self._of_groups(self._rotate(queries, rotation).transpose(1, 2))

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The attention branch [B, T, D], for keys and values [B, G, S, E] and a mask [B or 1, 1, T, S].

        Without a mask a single query sees every key, and several are the last of a causal sequence.
        """
        if self.groups is not None:
            keys, values = keys[:, self.groups], values[:, self.groups]
        return self._output(self._attend(queries, keys, values, mask).flatten(2))

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """The feed-forward branch, [B, T, D] -> [B, T, D]."""
        return self._feed_forward(self._before_feed_forward(hidden))

    def add_attention(self, hidden: Tensor, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The first half of the layer: hidden states [B, T, D] -> attended [B, T, D]."""
        return self._after_attention(hidden + self.attend(queries, keys, values, mask))

    def add_feed_forward(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The second half: hidden states that entered the layer, and attended, [..., D] -> [..., D]."""
        return self._after_feed_forward(attended + self.feed_forward(hidden if self.parallel else attended))

    def _of_groups(self, queries: Tensor) -> Tensor:
        """Those of the queries [B, H, T, E] that attend."""
        return queries if self._attending is None else queries[:, self._attending]

    def _rotated(self, heads: Tensor, queries: int, rotation: Rotation | None) -> Tensor:
        """Heads [B, T, heads, E] of so many queries, keys and values; queries and keys normalised and rotated."""
        keys, values = heads.shape[2] - 2 * self.kv_heads, heads.shape[2] - self.kv_heads
        if self._normalise_queries is not None and self._normalise_keys is not None:
            normalised = [self._normalise_queries(heads[:, :, :keys])] if queries else []
            heads = torch.cat((*normalised, self._normalise_keys(heads[:, :, keys:values]), heads[:, :, values:]), dim=2)
        if rotation is None:
            return heads
        turned = heads[:, :, :values]
        if self._interleaved or torch.is_grad_enabled() or rotation[0].dtype != heads.dtype:
            return torch.cat((self._rotate(turned, rotation), heads[:, :, values:]), dim=2)
        rotate_in_place(turned, rotation)
        return heads

    def _project(self, hidden: Tensor, queries: bool, keys_values: bool) -> Tensor:
        """Heads of queries, keys and values in this order, or only the former or the latter, [B, T, heads, E]."""
        start, stop = 0 if queries else self._end_of_queries, None if keys_values else self._end_of_queries
        heads = self.qkv(self._before_attention(hidden), start, stop).unflatten(-1, (-1, self.head_size))
        if not self.grouped:
            return heads
        # [B, T, G, heads of a group, E]; the last two are the keys and the values.
        parts = [heads[..., : self.heads // self.kv_heads, :].flatten(2, 3)] if queries else []
        if keys_values:
            parts += [heads[..., -2, :], heads[..., -1, :]]
        return torch.cat(parts, dim=2)


def _find(parent: nn.Module, name: str | None) -> nn.Module | None:
    return None if name is None else parent.get_submodule(name)


def _scaling(attention: nn.Module, family: Family) -> float:
    return attrgetter(family.scaling)(attention)


def _present(*modules: nn.Module | None) -> list[nn.Module]:
    return [module for module in modules if module is not None]


def _is_shared(norm: nn.Module, head_size: int) -> bool:
    """Whether a norm of heads has one weight for all of them."""
    return all(weight.shape == (head_size,) for weight in norm.parameters())


def norm_function(norm: nn.Module | None, exact: bool = False) -> Callable[[Tensor], Tensor]:
    """`norm` itself, or one fused kernel where torch has one with the same result but for rounding; nothing without a norm."""
    if norm is None:
        return nn.Identity()
    return partial(rms_norm, norm) if _is_rms_norm(norm) and not exact else norm


def _is_rms_norm(norm: nn.Module | None) -> bool:
    return norm is not None and type(norm).__name__ in RMS_NORMS and is_untouched(norm)


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """Root mean square norm of x [..., D], in one kernel."""
    weight = norm.weight
    # In half precision the base rounds before the weight is applied; torch's kernel after. An offloaded weight is only
    # there while the module itself runs.
    if x.dtype != torch.float32 or weight.is_meta:
        return norm(x)
    if x.numel() == x.shape[-1] and x.is_cpu and not (torch.is_grad_enabled() and x.requires_grad):
        return rms_norm_of_one(x, weight, norm.variance_epsilon)
    return F.rms_norm(x, x.shape[-1:], weight, norm.variance_epsilon)


def rms_norm_of_one(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The same of a single row [..., D] on a CPU, where torch's kernel is fourteen small ones: two."""
    row = x.flatten()
    scale = (torch.dot(row, row).item() / row.numel() + epsilon) ** -0.5
    return torch.addcmul(_ZERO, row, weight, value=scale).view_as(x)


def head_norm_function(norm: Callable[[Tensor], Tensor] | None, layout: str) -> Callable[[Tensor], Tensor] | None:
    """A norm of queries or keys, [B, T, heads, E] -> the same, whatever layout the base's module takes."""
    if norm is None:
        return None
    if layout == "heads":
        return norm
    return partial(_norm_flat if layout == "flat" else _norm_tokens, norm)


def _norm_flat(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return norm(x.flatten(2)).view_as(x)


def _norm_tokens(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return norm(x.transpose(1, 2)).transpose(1, 2)


def branch_function(
    function: Callable[[Tensor], Tensor], norm: Callable[[Tensor], Tensor] | None, multiplier: float | None
) -> Callable[[Tensor], Tensor]:
    """A branch with what follows before it is added to the residual stream: a norm, or a factor."""
    if norm is not None:
        return partial(_then, function, norm)
    return function if multiplier is None else partial(_times, function, multiplier)


def _then(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return second(first(x))


def _times(function: Callable[[Tensor], Tensor], multiplier: float, x: Tensor) -> Tensor:
    return function(x) * multiplier


def readable_maps(layer: nn.Module, family: Family) -> tuple[list[Any], list[Any]]:
    """The linear maps of a layer's attention and of its feed-forward whose weights may be used directly."""
    attention, mlp = layer.get_submodule(family.attention), feed_forward_module(layer, family)
    projections = [attention.get_submodule(name) for name in (*family.qkv, family.output)]
    in_mlp = _gated_parts(mlp, family)[:3] or mlp.children()
    return [one for one in projections if is_plain(one)], [one for one in in_mlp if is_plain(one)]


def feed_forward_module(layer: nn.Module, family: Family) -> nn.Module:
    """The feed-forward network of a layer, as one module."""
    if isinstance(family.feed_forward, str):
        return layer.get_submodule(family.feed_forward)
    return nn.Sequential(*(layer.get_submodule(name) for name in family.feed_forward))


class _InVariant(nn.Module):
    """Stands where a linear map of the base's would, in a copy of the module that calls it."""

    def __init__(self, linear: JointLinear) -> None:
        super().__init__()
        self.forward = linear.__call__


def in_variant(
    mlp: nn.Module, variant: Variant, along: Callable[[str], Tensor | None], neurons: Tensor | None = None
) -> tuple[nn.Module, list[JointLinear]]:
    """A feed-forward whose linear maps run in a variant, and these maps: a copy of the module that shares all else with it.

    `neurons`: places of those that are run, int64 [n]; None: all. The last map reads them, the others, or each half of one
    that is two in one, write them.
    """
    twin = copy.copy(mlp)
    maps: list[JointLinear] = []
    twin._modules = dict(mlp._modules)
    plain = {name: child for name, child in mlp.named_children() if is_plain(child)}
    for number, (name, child) in enumerate(plain.items(), start=1):
        outputs = inputs = None
        part = ""
        if neurons is not None and number == len(plain):
            inputs, part = neurons, PART
        elif neurons is not None:
            total = readable_weight([*plain.values()][-1], variant).shape[1]
            outputs = torch.cat([neurons + start for start in range(0, out_features(child), total)])
        maps.append(JointLinear([child], variant, along(part + mlp_map(len(maps))), outputs, inputs))
        twin._modules[name] = _InVariant(maps[-1])
    return twin, maps


def _gated_parts(mlp: nn.Module, family: Family) -> list[nn.Module]:
    """Gate, up and down projections and activation of a feed-forward that may be run by its parts; none of any other."""
    names = () if family.gated is None else (*family.gated, family.activation)
    children = dict(mlp.named_children())
    parts = [children[name] for name in names if name in children]
    return parts if len(parts) == 4 and is_untouched(mlp) and is_plain(parts[0]) and is_plain(parts[1]) else []


def gated(gate_up: JointLinear, down: JointLinear, activation: nn.Module, x: Tensor) -> Tensor:
    """A gated feed-forward network, [..., D] -> [..., D]."""
    gate, up = gate_up(x).chunk(2, dim=-1)
    return down(activation(gate) * up)
