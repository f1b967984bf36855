"""What `forward` takes beside its named arguments: nothing is swallowed, a keyword that nobody knows is an error."""

from typing import Any

from torch import Tensor

from .checks import nearest


FOR_LOSS = ("num_items_in_batch", "ignore_index", "shift_labels", "label_smoothing")
# Where packed sequences begin, for attention kernels that read no masks; ours are told by `position_ids`.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# What transformers may pass to every model, with the one value that means nothing to a causal decoder.
NEUTRAL = {"is_causal": True, "output_router_logits": False, "return_legacy_cache": False, "head_mask": None}
NAMED = (
    "input_ids attention_mask position_ids past_key_values cache inputs_embeds labels use_cache logits_to_keep energy_budget "
    "capacity output_hidden_states output_attentions return_dict actions confidence_threshold patience exit_rule "
    "token_type_ids"
).split()


def loss_keywords(keywords: dict[str, Any], position_ids: Tensor | None) -> dict[str, Any]:
    """The keywords that are for the loss; one that is None is as good as not given.

    Raises:
        TypeError: a keyword that nobody knows.
        ValueError: one with a value that would change what is computed, and is not supported.
    """
    given = {name: value for name, value in keywords.items() if value is not None}
    for name, value in given.items():
        if name in NEUTRAL and value != NEUTRAL[name]:
            raise ValueError(f"{name}={value!r} is not supported: it must be {NEUTRAL[name]}")
        if name in PACKING and position_ids is None:
            raise ValueError(f"{name} is not supported without position_ids, which tell where packed sequences begin")
        if name not in (*FOR_LOSS, *PACKING, *NEUTRAL):
            raise TypeError(f"forward() got an unexpected keyword argument {nearest(name, [*NAMED, *FOR_LOSS])}")
    return {name: value for name, value in given.items() if name in FOR_LOSS}


def hidden_states_selected(states: tuple[Tensor, ...], selection: bool | int | list[int] | None) -> tuple[Any, ...]:
    """All hidden states [B, T, D], or those at the indices and None for the others; an index out of range selects nothing."""
    if isinstance(selection, bool) or selection is None:
        return states
    count, indices = len(states), [selection] if isinstance(selection, int) else list(selection)
    wanted = {index % count for index in indices if -count <= index < count}
    return tuple(state if index in wanted else None for index, state in enumerate(states))
