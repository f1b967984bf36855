"""The text of every token of a sequence, such that together they are the text."""

from collections.abc import Sequence
from typing import Any


CONTEXT = 8  # tokens before one that its text may depend on


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it.

    A token by itself may lose its leading space, or be only some of the bytes of a character; the last token of such a
    character has all of it, those before it have a replacement character.
    """
    return [_added(tokenizer, ids[max(i - CONTEXT, 0) : i], ids[i]) for i in range(len(ids))]


def _added(tokenizer: Any, before: Sequence[int], token: int) -> str:
    known, whole = (tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (before, [*before, token]))
    known = known.rstrip("\ufffd")  # the rest of the bytes may follow
    return whole[len(known) :] if whole.startswith(known) else tokenizer.decode([token])
