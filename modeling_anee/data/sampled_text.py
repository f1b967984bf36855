"""Text that a base samples itself in place of a folder of files, for a recipe that has no data."""

from collections.abc import Sequence
from typing import Any

from .encoding import start_tokens
from .sources import GeneratedSource
from .windows import room_of


BATCH = 8  # documents that are sampled at once
SHORTEST = 8  # tokens of a document, on average: there are enough documents even then


class SampledText:
    """What `OwnText` has, of text that there is as much of as is asked for."""

    def windows(self, part: str, tokenizer: Any, length: int, most: int) -> list[int]:
        """As many as are asked for, of the one source."""
        return [most]

    def sources(self, part: str, tokenizer: Any, length: int, counts: Sequence[int], wanted: int) -> list[GeneratedSource]:
        """One source of `wanted` windows: chats where the tokenizer has a template for them.

        Documents are half as long as a window, or shorter, so that a window has several.
        """
        tokens = wanted * room_of(length, start_tokens(tokenizer))
        return [
            GeneratedSource(
                generated="chat" if tokenizer.chat_template else "bos",
                tokens=tokens,
                documents=max(BATCH, -(-tokens // SHORTEST)),
                new_tokens=max(1, length // 2),
                user_tokens=max(1, length // 8),
                batch=BATCH,
            )
        ]
