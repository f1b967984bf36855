"""A frozen base causal LM, taken apart: embeddings, blocks, final norm and head.

This is the only file that knows where a base keeps its parts; `families.py` has the names.
"""

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from .blocks import Block, Rotation, prepare_rotation
from .cache import AneeCache
from .costs import CostTable
from .families import family_of


Masks = Tensor | dict[str, Tensor | None] | None


class BaseStack:
    """The parts of a base causal LM, by reference; nothing is copied.

    Raises:
        ValueError: an unknown family or attention implementation.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self.config = base.config
        family = family_of(base)
        decoder = base.get_submodule(family.decoder)
        layers = decoder.get_submodule(family.layers)
        self.blocks = [Block(layer, family, base.config, index) for index, layer in enumerate(layers)]
        self.embed_tokens = base.get_input_embeddings()
        self.final_norm = decoder.get_submodule(family.final_norm)
        self.lm_head = base.get_output_embeddings()
        self._rotary = decoder.get_submodule(family.rotary) if family.rotary else None
        self._positions = decoder.get_submodule(family.position_embeddings) if family.position_embeddings else None
        self._all_full = all(block.layer_type in (None, "full_attention") for block in self.blocks)

    def __reduce__(self) -> tuple:
        """Copies and pickles are taken apart anew from the copied base."""
        return type(self), (self.base,)

    def measure_costs(self, unit: str) -> CostTable:
        """What every action costs at every layer."""
        return CostTable.measure(self.blocks, [self.final_norm, self.lm_head], unit)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head, [..., D] -> [..., V]."""
        return self.lm_head(self.final_norm(hidden))

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Token ids [B, T] -> hidden states [B, T, D] that enter the first layer."""
        return self.add_positions(self.embed_tokens(input_ids), position_ids)

    def add_positions(self, embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """Token embeddings [B, T, D] -> hidden states, for families with learned positions."""
        return embeddings if self._positions is None else embeddings + self._positions(position_ids)

    def rotation(self, hidden: Tensor, position_ids: Tensor) -> Rotation | None:
        """Rotary cos and sin of the positions [B or 1, T]."""
        return None if self._rotary is None else prepare_rotation(*self._rotary(hidden, position_ids))

    def masks(self, hidden: Tensor, attention_mask: Tensor | None, cache: Cache | None, position_ids: Tensor) -> Masks:
        """Attention masks, as the base would make them; None where no masking is needed."""
        if attention_mask is None and hidden.shape[1] == 1 and isinstance(cache, AneeCache) and self._all_full:
            return None
        return create_masks_for_generate(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )

    def mask_of(self, block: Block, masks: Masks) -> Tensor | None:
        """The mask of one layer, [B or 1, 1, T, S] or None."""
        return masks[block.layer_type] if isinstance(masks, dict) else masks



def token_positions(attention_mask: Tensor | None, past: int, tokens: int, rows: int) -> tuple[Tensor, Tensor]:
    """Index of each new token among its row's real tokens, int64 [B, T], and whether it is one, bool [B, T]; on the CPU."""
    if attention_mask is None or attention_mask.dim() != 2:
        index = torch.arange(past, past + tokens).expand(rows, tokens)
        return index, torch.ones(rows, tokens, dtype=torch.bool)
    mask = attention_mask.cpu().bool()
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -tokens:], mask[:, -tokens:]
