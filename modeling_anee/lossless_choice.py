"""Whether a generation drafts, and in which plans."""

from collections.abc import Sequence
from typing import Any

from .draft_plans import draft_plans, draft_texts, full_plan
from .draft_policy import OVERALL, Acceptance, DraftPolicy, Outlook
from .draft_times import times_of
from .feed import why_not


def policy_of(model: Any, rows: int, draws: bool) -> DraftPolicy:
    """A policy for a generation, from what was measured.

    Args:
        model: an `AneeForCausalLM`.
        rows: of the batch.
        draws: whether tokens are drawn, not the likeliest ones.

    Raises:
        ValueError: the base can't be run in any plan that drafts.
    """
    measured, texts = model.config.drafts or {}, draft_texts_of(model)
    plans = prepared(model, texts)
    times = times_of(model, full_plan(model), plans, rows)
    by_margin = not draws and model.device.type == "cpu"
    columns = [measured.get(name) or [None] * len(texts) for name in ("drafted", "kept")]
    outlooks = [
        Outlook(plan, own, Acceptance.of(drafted, kept, by_margin), overall(drafted, kept), rows)
        for plan, own, drafted, kept in zip(plans, times, *columns, strict=True)
    ]
    return DraftPolicy(outlooks)


def draft_texts_of(model: Any) -> list[str]:
    """The plans that a model may draft with."""
    config = model.config
    return config.drafts["plans"] if config.drafts else draft_texts(config.precisions, config.num_layers)


def prepared(model: Any, texts: Sequence[str]) -> list[Any]:
    """Plans by what they are in short; made when they are first asked for."""
    known = model.executor.drafts
    if missing := [text for text in texts if text not in known]:
        known |= dict(zip(missing, draft_plans(model, missing), strict=True))
    return [known[text] for text in texts]


def overall(drafted: Sequence[float] | None, kept: Sequence[float] | None) -> float:
    """Share of a plan's drafted tokens that are kept, by what was measured, if anything was."""
    if drafted is None or kept is None:
        return OVERALL
    return (sum(kept) + OVERALL) / (sum(drafted) + 1.0)


def why_plain(model: Any, cache: Any, config: Any, synced: bool) -> str:
    """Why a generation can't draft at all; nothing where it can.

    Args:
        model: an `AneeForCausalLM`.
        cache: of the generation, or None.
        config: of the generation.
        synced: whether processes must call the model equally often.
    """
    if synced:
        return "all processes must call the model equally often (synced_gpus=True)"
    if config.return_dict_in_generate and config.output_hidden_states:
        return "hidden states of every step were asked for (output_hidden_states=True)"
    return why_not(model.stack, cache)
