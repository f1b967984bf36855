"""A frozen base causal LM, taken apart: embeddings, blocks, final norm and head.

This is the only file that knows where a base keeps its parts; `base_families.py` has the names.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import logging

from .actions import DEFAULT_TABLE, FULL, ActionTable
from .base_block import Block, readable_maps
from .base_dropped import Drop, DroppedLinear, DroppedWeight, FilePages, check_whole, drop_weights, return_memory
from .base_encoder import embedding_function, encoder_mask
from .base_families import Family, family_of
from .base_linear import JointLinear, is_plain
from .base_rotary import Rotation, prepare_rotation
from .base_variants import LinearMap, Variant, variant_named
from .base_watch import Watch, check_bypassed
from .bridges import Bridges
from .cache import AneeCache
from .compatibility import cache_argument
from .corrections import Corrections
from .costs import CostTable, map_work
from .hardware import HARDWARE, Hardware
from .narrow import Orders, whole_of
from .positions import Mask
from .work import Work, work_of


MANY_WEIGHTS = 1 << 28  # to be made in another variant, which takes some seconds


class BaseStack:
    """The parts of a base causal LM, by reference; nothing is copied.

    What it gives holds for the base as it was when it was last prepared.

    Args:
        base: the causal LM.
        drop: what is made at once, whereupon the base's own weights are dropped; None: they stay.
        corrections: directions along which what variants lose is added again, if anything is.
        orders: what narrow variants keep.

    Raises:
        ValueError: an unknown family, a variant or attention implementation that is not supported, or dropped weights.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        drop: Drop | None = None,
        corrections: Corrections | None = None,
        orders: Orders | None = None,
    ) -> None:
        self.base, self.drop, self.corrections, self.orders = base, drop, corrections or Corrections(), orders or Orders()
        self.blocks: list[Block] = []
        self._variants: dict[str, list[Block]] = {}
        self._heads: dict[str, JointLinear] = {}
        self.prepare()

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self) -> None:
        """Take the base apart: find its parts, join weights and settle how everything is run, so that calls check nothing.

        Needed once, and again when `changed` says so.

        Raises:
            ValueError: what can't be run as the base would, or code of others on a module that never runs.
        """
        base, self._watch = self.base, None  # half taken apart is changed, too
        check_whole(base)
        self.config = base.config
        self.family = family = family_of(base)
        decoder = base.get_submodule(family.decoder)
        layers: Any = decoder.get_submodule(family.layers)
        bypassed = check_bypassed(base, called_modules(base, family))
        if self.blocks and len(layers) != len(self.blocks):
            raise ValueError(f"the base has {len(layers)} layers, and had {len(self.blocks)} when it was wrapped: wrap it anew")
        self._layers, self._variants, self._heads = list(layers), {}, {}
        self._found = self._versions()
        self.blocks = self.blocks_of(FULL) if self.drop is None else self._drop_layers(self.drop)
        self.embed_tokens, head = base.get_input_embeddings(), base.get_output_embeddings()
        self._head_modules = [decoder.get_submodule(name) for name in (family.final_norm, family.project_out) if name]
        self.final_norm = _in_turn(self._head_modules)
        self._head_modules.append(head)
        if self.drop is not None:
            self._drop_head(self.drop)
        self.head_of(FULL)  # made now, so that no call waits for it
        self._rotary: Any = decoder.get_submodule(family.rotary) if family.rotary else None
        self._rotary_kinds = [block.layer_type if family.rotary_by_layer_type else None for block in self.blocks]
        self._positions = position_function(decoder, family, base.config)
        self._finished = embedding_function(decoder, family)
        self._project_in = decoder.get_submodule(family.project_in) if family.project_in else None
        field = family.embedding_multiplier_field
        self._embedding_multiplier = getattr(base.config, field) if field else None
        types = {block.layer_type for block in self.blocks}
        slides = "sliding_attention" in types or (types == {None} and getattr(base.config, "sliding_window", None) is not None)
        self.window = base.config.sliding_window if slides else math.inf  # keys that every layer sees
        parts = [self.embed_tokens, *self._head_modules, *(part for block in self.blocks for part in block.parts)]
        self._watch = Watch(base, [*bypassed, *(module for block in self.blocks for module in block.bypassed)], parts)

    @property
    def changed(self) -> bool:
        """Whether the base is no longer what was taken apart; numbers count where others were made from them."""
        if self._watch is None or self._watch.changed():
            return True
        rounded = len(self._variants) > 1 or len(self._heads) > 1
        return rounded and (self._watch.written() or self._found != self._versions())

    def _versions(self) -> list[tuple[int, int]]:
        """What is other when numbers are that variants are made with: which tensors they are, how often they were written."""
        buffers = (*self.corrections.buffers(), *self.orders.buffers())
        return [(id(own), 0 if own.is_inference() else own._version) for own in buffers]

    def __reduce__(self) -> tuple:
        """Copies and pickles are taken apart anew from the copied base."""
        return type(self), (self.base, self.drop, self.corrections, self.orders)

    def blocks_of(self, variant: str) -> list[Block]:
        """The layers in a variant; made when they are first asked for, and anew when the base is prepared again.

        Raises:
            ValueError: nobody knows it, or the base can't be run in it.
        """
        if variant not in self._variants:
            row, config = variant_named(variant), self.base.config
            check_whole(self.base)
            layers = self._shown([variant])
            along, orders = self.corrections.of_layer, self.orders
            blocks = [Block(layer, self.family, config, n, row, along(n), orders) for n, layer in enumerate(layers)]
            self._variants[variant] = blocks
            for full, block in zip(self._variants[FULL], self._variants[variant], strict=True):
                full.siblings[variant] = block
        return self._variants[variant]

    @property
    def rounded(self) -> list[str]:
        """The variants that were made beside the full one."""
        return sorted({*self._variants, *self._heads} - {FULL})

    def maps_of(self, variant: str) -> list[LinearMap]:
        """All linear maps that were made in a variant, of the layers and the head."""
        joint = [one for block in self._variants.get(variant, ()) for one in block.linear.values()]
        heads = [self._heads[variant]] if variant in self._heads else []
        return [one for linear in (*joint, *heads) for one in linear.maps]

    def _shown(self, variants: Sequence[str]) -> Iterable[nn.Module]:
        """The layers, with a bar of how many are done where making these variants takes long."""
        made = [variant for variant in variants if variant != FULL]
        count = len(made) * sum(parameter.numel() for layer in self._layers for parameter in layer.parameters())
        hidden = True if count < MANY_WEIGHTS else None
        return logging.tqdm(self._layers, desc=f"Making weights in {' and '.join(made)}", disable=hidden)

    def _drop_layers(self, drop: Drop) -> list[Block]:
        """The layers in these variants, each of which loses its own weights before the next is made."""
        maps = [readable_maps(layer, self.family) for layer in self._layers]
        if not all(in_mlp for _, in_mlp in maps):  # said before anything is lost
            names = ", ".join(drop.variants)
            raise ValueError(f"drop_full=True is not possible: {names} can't run all feed-forwards of this base")
        rows, pages = [_FULL, *map(_small, drop.variants)], FilePages()
        self._variants = {row.name: [] for row in rows}
        for index, layer in enumerate(self._shown(drop.variants)):
            weights = [one.weight.data for part in maps[index] for one in part]  # where they lay before they were joined
            along = self.corrections.of_layer(index)
            for row in rows:
                block = Block(layer, self.family, self.base.config, index, row, along, self.orders)
                self._variants[row.name].append(block)
                self._variants[FULL][index].siblings[row.name] = block
            blocks = [self._variants[row.name][index] for row in rows[1:]]
            rounded = [one for block in blocks for one in block.linear.values() if not one.runs_modules]
            drop_weights({id(module): module for one in rounded for module in one.modules}.values())
            for one in rounded:
                if one.variant.name not in drop.layers:
                    one.forget()
            pages.leave(weights)
            del weights
            return_memory()
        return self._variants[FULL]

    def _drop_head(self, drop: Drop) -> None:
        """The head in these variants; it loses its own weight, unless it is needed or the embeddings are read from it."""
        head: Any = self._head_modules[-1]
        if not is_plain(head):
            return
        weight, pages = head.weight.data, FilePages()
        for variant in dict.fromkeys(map(whole_of, drop.variants)):
            self._heads[variant] = JointLinear([head], _small(variant), self.corrections.of_head())
            if variant not in drop.heads:
                self._heads[variant].forget()
        if FULL not in drop.heads and head.weight is not getattr(self.embed_tokens, "weight", None):
            self._heads[FULL] = JointLinear([head], _FULL)
            drop_weights([head])
        pages.leave([weight])  # of embeddings a text needs few rows
        del weight
        return_memory()

    @property
    def gone(self) -> frozenset[str]:
        """Variants that layers can't run in any more."""
        return frozenset() if self.drop is None else frozenset({FULL, *self.drop.variants}) - self.drop.layers

    @property
    def gone_heads(self) -> frozenset[str]:
        """The same of the head."""
        own = getattr(self._head_modules[-1], "weight", None)
        rest = frozenset() if self.drop is None else frozenset(self.drop.variants) - self.drop.heads
        return rest | {FULL} if isinstance(own, DroppedWeight) else rest

    def head_of(self, variant: str) -> Callable[[Tensor], Tensor]:
        """The head in a variant, [..., D] -> [..., V]; made when it is first asked for.

        Raises:
            ValueError: nobody knows the variant, or the head can't be run in it.
        """
        module, made = self._head_modules[-1], self._heads.get(variant)
        if is_plain(module) or (made is not None and not made.runs_modules):
            return head_function(self.head_map(variant), self.config, self.family)
        if variant_named(variant).name != FULL:
            raise ValueError(f"variant {variant!r} is not possible for the head of this base: a {type(module).__name__}")
        return head_function(module, self.config, self.family)

    def head_map(self, variant: str) -> JointLinear:
        """The linear map of the head in a variant; made when it is first asked for."""
        if variant not in self._heads:
            self._heads[variant] = JointLinear(self._head_modules[-1:], variant_named(variant), self.corrections.of_head())
        return self._heads[variant]

    def head_work(self, variant: str) -> Work:
        """Work that every token needs once: final norm and head, in a variant, and what projects embeddings."""
        before = [] if self._project_in is None else [self._project_in]
        if variant == FULL:
            return work_of([*before, *self._head_modules])
        return work_of([*before, *self._head_modules[:-1]]) + map_work([self.head_map(variant)])

    def measure_costs(
        self, hardware: Hardware | str, bridges: Bridges | None = None, table: ActionTable = DEFAULT_TABLE
    ) -> CostTable:
        """What every action costs at every layer, the bridges included; at hardware's prices, or in bytes or flops."""
        blocks = {variant: self.blocks_of(variant) for variant in {FULL, *table.variants}}
        heads = {variant: self.head_work(variant) for variant in table.heads}
        prices = HARDWARE[hardware] if isinstance(hardware, str) else hardware
        costs = CostTable.measure(blocks, heads, prices, bridges, table)
        return replace(costs, gone=self.gone, gone_heads=self.gone_heads, dtype=self.base.dtype)

    def logits(self, hidden: Tensor, head: str = FULL) -> Tensor:
        """Final norm and head, in a variant, [..., D] -> [..., V]."""
        return self.head_of(head)(self.final_norm(hidden))

    def positions(self, attention_mask: Mask, past: int, tokens: int, device: torch.device) -> Tensor:
        """Default positions of new tokens, int64 [B or 1, T]."""
        if self.family.positions_count_tokens and isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            mask = attention_mask.to(device, torch.long)
            return (mask.cumsum(dim=1) * mask - 1)[:, -tokens:]
        return torch.arange(past, past + tokens, device=device).unsqueeze(0)

    def add_positions(self, embeddings: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Token embeddings [B, T, D] -> hidden states: scaled, projected, with learned positions, as the family has it."""
        if token_type_ids is not None and self._finished is None and bool(token_type_ids.any()):
            raise ValueError(f"token_type_ids are not allowed: a {self.config.model_type} base knows no pairs of texts")
        if self._embedding_multiplier is not None:
            embeddings = embeddings * self._embedding_multiplier
        if self._project_in is not None:
            embeddings = self._project_in(embeddings)
        if self._positions is None:
            return embeddings
        try:
            embeddings = embeddings + self._positions(position_ids)
        except IndexError as error:
            raise ValueError(
                f"a token is at position {int(position_ids.max())}, but this {self.config.model_type} base has learned only "
                f"{self.config.max_position_embeddings} positions (max_position_embeddings): shorten the text"
            ) from error
        return embeddings if self._finished is None else self._finished(embeddings, token_type_ids)

    def rotation(self, hidden: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Rotation | None:
        """Rotary cos and sin of the positions [B or 1, T]; with a layer type where they differ by it."""
        if self._rotary is None:
            return None
        kind = () if layer_type is None else (layer_type,)
        cos, sin = self._rotary(hidden, position_ids, *kind)
        return prepare_rotation(cos, sin, self.family.rotary_interleaved)

    def rotations(self, hidden: Tensor, position_ids: Tensor) -> list[Rotation | None]:
        """The rotation of each layer."""
        made = {kind: self.rotation(hidden, position_ids, kind) for kind in set(self._rotary_kinds)}
        return [made[kind] if block.rotates else None for kind, block in zip(self._rotary_kinds, self.blocks, strict=True)]

    def masks(self, hidden: Tensor, attention_mask: Mask, cache: Cache | None, position_ids: Tensor) -> list[Tensor | None]:
        """Attention mask of each layer, [B or 1, 1, T, S], as the base would make it; None where no masking is needed."""
        if attention_mask is None and hidden.shape[1] == 1 and isinstance(cache, AneeCache):
            if cache.get_seq_length() < self.window:
                return [None] * len(self.blocks)
        if self.family.encoder:
            return [encoder_mask(hidden, attention_mask)] * len(self.blocks)
        if isinstance(attention_mask, dict):
            return self._ready_masks(attention_mask)
        masks = create_masks_for_generate(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **cache_argument(cache),
        )
        return [masks[block.layer_type] if isinstance(masks, dict) else masks for block in self.blocks]

    def _ready_masks(self, masks: dict[str, Tensor]) -> list[Tensor | None]:
        types = sorted({str(block.layer_type) for block in self.blocks})
        if not set(types) <= masks.keys():
            raise ValueError(
                f"attention_mask with the keys {sorted(masks)} is not allowed: this base has layers of the types {types}"
                if types != ["None"]
                else "attention_mask=dict is not allowed: the layers of this base share one mask"
            )
        return [masks[str(block.layer_type)] for block in self.blocks]


_FULL = Variant(FULL, DroppedLinear.make)


def _small(name: str) -> Variant:
    """A variant as it is made where memory counts."""
    row = variant_named(name)
    return row if row.make_small is None else replace(row, make=row.make_small)


def called_modules(base: PreTrainedModel, family: Family) -> set[nn.Module]:
    """The modules that are run, themselves or by what stands in for them; what holds them is not."""
    decoder = base.get_submodule(family.decoder)
    tops = [family.final_norm, family.project_in, family.project_out, family.rotary, family.position_embeddings]
    tops += [family.embedding_norm, family.token_types]
    called = {base.get_input_embeddings(), base.get_output_embeddings(), *_find_all(decoder, tops)}
    for layer in decoder.get_submodule(family.layers).children():
        called.update(_find_all(layer, _called_in_layer(family)))
    return called


def _called_in_layer(family: Family) -> list[str | None]:
    names = *family.qkv, family.output, family.query_norm, family.key_norm
    inside = [name and f"{family.attention}.{name}" for name in names]
    feed_forward = [family.feed_forward] if isinstance(family.feed_forward, str) else family.feed_forward
    norms = family.attention_norm, family.attention_output_norm, family.feed_forward_norm, family.feed_forward_output_norm
    return [*inside, *feed_forward, *norms]


def _find_all(parent: nn.Module, names: Iterable[str | None]) -> list[nn.Module]:
    """Those of the modules that are there: what was put in a module's place may have no such parts."""
    found = []
    for name in names:
        if name is not None:
            with contextlib.suppress(AttributeError):
                found.append(parent.get_submodule(name))
    return found


def running_device(base: PreTrainedModel) -> torch.device:
    """The device of a base's weights or, if accelerate keeps them elsewhere, that which it runs them on."""
    if base.device.type != "meta":
        return base.device
    hooks = (getattr(module, "_hf_hook", None) for module in base.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((torch.device(device) for device in devices if device is not None), base.device)


def _in_turn(modules: list[nn.Module]) -> nn.Module:
    """One module that runs all of them."""
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def position_function(decoder: nn.Module, family: Family, config: PreTrainedConfig) -> Callable[[Tensor], Tensor] | None:
    """Learned position embeddings, int64 [B or 1, T] -> [B or 1, T, D]."""
    if family.position_embeddings is None:
        return None
    module = decoder.get_submodule(family.position_embeddings)
    if family.first_position_field is not None:
        return partial(_shifted, module, getattr(config, family.first_position_field) + 1)
    # opt's module takes a mask and a past length first, and needs neither when it is given positions.
    return partial(module, None, 0) if family.positions_count_tokens else module


def _shifted(module: nn.Module, by: int, position_ids: Tensor) -> Tensor:
    return module(position_ids + by)


def head_function(head: Callable[[Tensor], Tensor], config: PreTrainedConfig, family: Family) -> Callable[[Tensor], Tensor]:
    """The head with what the family does to its logits: [..., D] -> [..., V]."""
    fields = (family.logit_multiplier_field, family.logit_divisor_field, family.logit_softcap_field)
    multiplier, divisor, softcap = (getattr(config, field) if field else None for field in fields)
    if multiplier is None and divisor is None and softcap is None:
        return head
    return partial(_scaled_logits, head, multiplier, divisor, softcap)


def _scaled_logits(
    head: Callable[[Tensor], Tensor], multiplier: float | None, divisor: float | None, softcap: float | None, hidden: Tensor
) -> Tensor:
    logits = head(hidden)
    if multiplier is not None:
        logits = logits * multiplier
    if divisor is not None:
        logits = logits / divisor
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
