"""Tokens on their way through layers whose actions are known: what `forward` works out in each call is worked out once.

Positions go up by one, rotations are made for many tokens at once, masks only where one is needed, and no decision, ledger or
trace is made. For decoding that runs the same tokens in several plans; see `lossless.py`.

Shapes: B rows, T tokens, L layers, D hidden size, S cached tokens, V tokens of the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from .base_model import BaseStack
from .base_rotary import Rotation
from .cache import AneeCache
from .layer_runner import LayerRunner, runs_alone
from .plan_runner import LayerRun
from .positions import Places
from .step import Step


TOGETHER = 16  # tokens, at most, that follow each other in one call of a kernel
AHEAD = 64  # tokens whose rotations are made at once
MOVING = ("dynamic", "longrope")  # rotations that depend on how long the text is by now
_NOTHING = torch.zeros(1, 1, device="cpu")  # budgets, which nobody reads here
_NOWHERE = Places(_NOTHING.long(), _NOTHING == 0)


@dataclass(frozen=True)
class StraightPlan:
    """A plan that every token of a call follows.

    Args:
        text: the plan in short.
        actions: one a layer, places in the table of `layers`.
        head: hidden states that leave the last layer [..., D] -> logits [..., V].
        layers: what runs them.
        cost: of a token, as a share of the whole model, in the model's unit.
        weights_read: the same in bytes of weights.
    """

    text: str
    actions: list[int]
    head: Callable[[Tensor], Tensor]
    layers: LayerRunner
    cost: float = 1.0
    weights_read: float = 1.0

    @cached_property
    def together(self) -> list[LayerRun] | None:
        """What runs each layer for a few tokens that follow each other; None where there are no kernels for that."""
        return self.layers.together(self.actions)


class Feed:
    """Feeds the next tokens of a text to a base.

    Args:
        stack: the base.
        cache: keys and values of the tokens so far.
        position: of the next token, int64 [B or 1, 1].
        mask: which of the cached tokens are real, int64 [B, S]; None: all.
    """

    def __init__(self, stack: BaseStack, cache: Cache, position: Tensor, mask: Tensor | None = None) -> None:
        self.stack, self.cache, self.past = stack, cache, int(cache.get_seq_length())
        self._begin, self._position, self._mask = self.past, position, mask
        self._rotations: list[Rotation | None] = []  # of so many tokens, from the first on
        self._first, self._made = 0, 0
        self._seen: dict[int, Tensor] = {}  # for so many tokens, what each sees of the others

    @torch.inference_mode()
    def run(self, ids: Tensor, plan: StraightPlan) -> Tensor:
        """Logits [B, T, V] of the next tokens int64 [B, T]; their keys and values go into the cache."""
        stack, tokens = self.stack, ids.shape[1]
        begin = self.past - self._begin
        positions = self._position + begin
        if tokens > 1:
            positions = positions + torch.arange(tokens, device=ids.device)
        hidden = stack.add_positions(stack.embed_tokens(ids), positions)
        rotations = self._rotated(hidden, begin, tokens)
        if plan.together is not None and 1 < tokens <= TOGETHER and self._is_plain(hidden):
            hidden = self._run_together(hidden, rotations, plan.together)
        else:
            hidden = self._run_layers(hidden, rotations, positions, plan)
        self.past += tokens
        return plan.head(hidden)

    def _is_plain(self, hidden: Tensor) -> bool:
        """Whether tokens [1, T, D] see all before them, in our cache, and halves of layers can take them."""
        alone = len(hidden) == 1 and hidden.is_cpu and hidden.dtype == torch.float32 and isinstance(self.cache, AneeCache)
        return alone and self._mask is None and self.past + hidden.shape[1] <= self.stack.window

    def _run_together(self, hidden: Tensor, rotations: list[Rotation | None], runs: list[LayerRun]) -> Tensor:
        """A few tokens [1, T, D] through layers: the same bits as each alone."""
        rows, layers = hidden.contiguous().view(-1), cast(AneeCache, self.cache).layers
        for run, rotation, layer in zip(runs, rotations, layers, strict=True):
            rows = run(rows, rotation, layer)
        return rows.view_as(hidden)

    def _run_layers(self, hidden: Tensor, rotations: list[Rotation | None], positions: Tensor, plan: StraightPlan) -> Tensor:
        """Tokens [B, T, D] through the layers of a plan."""
        masks = self._masks(hidden, positions)
        step = Step(budget=_NOTHING, places=_NOWHERE, rotations=rotations, masks=masks, cache=self.cache, past=self.past)
        if runs_alone(hidden, step):
            return plan.layers.run_alone(range(len(plan.actions)), hidden, step, plan.actions)
        for layer, action in enumerate(plan.actions):
            hidden = plan.layers.alike(layer, hidden, step, action)
        return hidden

    def rewind(self, tokens: int) -> None:
        """Forget the last so many tokens."""
        if tokens:
            self.cache.crop(-tokens)
            self.past -= tokens

    def mask_of(self, tokens: int) -> Tensor | None:
        """Which of the first so many tokens are real, int64 [B, S]; None: all."""
        return None if self._mask is None else F.pad(self._mask[:, : self._begin], (0, tokens - self._begin), value=1)

    def _rotated(self, hidden: Tensor, begin: int, tokens: int) -> list[Rotation | None]:
        """The rotation of each layer for tokens from the one at `begin` on."""
        if not self._first <= begin <= begin + tokens <= self._first + self._made:
            ahead = torch.arange(max(AHEAD, tokens), device=hidden.device)
            self._first, self._made = begin, len(ahead)
            self._rotations = self.stack.rotations(hidden, self._position + begin + ahead)
        place = slice(begin - self._first, begin - self._first + tokens)
        made = {id(one): one and (one[0][:, place], one[1][:, place]) for one in self._rotations}
        return [made[id(one)] for one in self._rotations]

    def _masks(self, hidden: Tensor, positions: Tensor) -> list[Any]:
        """The attention mask of each layer."""
        rows, tokens = hidden.shape[:2]
        ends = self.past + tokens
        if tokens == 1 or self._mask is not None or ends > self.stack.window or not isinstance(self.cache, AneeCache):
            return self.stack.masks(hidden, self.mask_of(ends), self.cache, positions)
        if tokens not in self._seen:
            later = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden.device).triu(1)
            self._seen[tokens] = hidden.new_zeros(tokens, tokens).masked_fill_(later, torch.finfo(hidden.dtype).min)
        return [F.pad(self._seen[tokens], (self.past, 0))[None, None]] * len(self.stack.blocks)


def why_not(stack: BaseStack, cache: Any) -> str:
    """Why tokens can't be fed so; nothing where they can."""
    if cache is None:
        return "there is no cache (use_cache=False)"
    plain = isinstance(cache, AneeCache) or all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers)
    if not plain:
        return f"a {type(cache).__name__} can't forget its last tokens"
    parameters = getattr(stack.config, "rope_parameters", None) or {}
    kinds = [parameters, *(one for one in parameters.values() if isinstance(one, dict))]
    if any(one.get("rope_type") in MOVING for one in kinds):
        return "rotations of this base depend on the length of the text"
    return ""
