"""How many of a plan's drafted tokens the full model keeps, measured by drafting: what `config.drafts` holds."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from ..cache import AneeCache
from ..draft_policy import MOST, Acceptance, DraftPolicy, Outlook, Times
from ..feed import Feed, StraightPlan
from ..lossless import LosslessDecoding, Request
from ..lossless_account import LosslessAccount
from ..lossless_choice import prepared
from ..modeling_anee import AneeForCausalLM


LENGTH = 5  # tokens of each draft


class EqualDrafts(DraftPolicy):
    """Drafts of the same number of tokens in one plan, whatever becomes of them."""

    def __init__(self, plan: StraightPlan) -> None:
        super().__init__([Outlook(plan, Times([1.0] * (MOST + 1), 0.0), Acceptance.of(None, None))])

    @property
    def pays(self) -> bool:
        """Always: it is to be found out."""
        return True

    def goes_on(self, drafted: int, chance: float, most: int) -> bool:
        """Up to the number."""
        return drafted < min(most, LENGTH)


def measure_drafts(
    model: AneeForCausalLM,
    prompts: Sequence[Tensor],
    texts: Sequence[str],
    new_tokens: int,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, list]:
    """Drafts in each plan while the model goes on from prompts by itself, greedily: `plans`, `drafted` and `kept`.

    Args:
        model: an artifact, or a wrapped base.
        prompts: token ids, int64 [T] each.
        texts: the plans.
        new_tokens: after each prompt.
        progress: is told of every prompt that is done in a plan.

    Raises:
        ValueError: a plan that the base can't be run in, or that leaves the stack early.
    """
    plans = prepared(model, texts)
    found: dict[str, list] = {"plans": [plan.text for plan in plans], "drafted": [], "kept": []}
    for plan in plans:
        account = LosslessAccount()
        for ids in prompts:
            _draft(model, ids.unsqueeze(0).to(model.device), plan, new_tokens, account)
            if progress is not None:
                progress(1)
        drafted, kept = account.by_margin[plan.text]
        found["drafted"].append(drafted)
        found["kept"].append(kept)
    return found


@torch.no_grad()
def _draft(model: AneeForCausalLM, ids: Tensor, plan: StraightPlan, new_tokens: int, account: LosslessAccount) -> None:
    """One prompt [1, T], continued; the account is added to."""
    cache, tokens = AneeCache(model.stack.blocks), ids.shape[1]
    logits = model(ids, cache=cache, energy_budget=1.0, logits_to_keep=1).logits
    config = GenerationConfig(do_sample=False, max_length=tokens + new_tokens)
    config._pad_token_tensor = None
    ends: list[Any] = [MaxLengthCriteria(config.max_length)]
    if (end := model.generation_config.eos_token_id) is not None:
        ends.append(EosTokenCriteria(end))
    request = Request(ids, LogitsProcessorList(), StoppingCriteriaList(ends), config)
    position = torch.full((1, 1), tokens, dtype=torch.int64, device=ids.device)
    LosslessDecoding(model, Feed(model.stack, cache, position), EqualDrafts(plan), request, account).run(logits)
