"""From text to token ids. What a tokenizer puts before a text by default is asked for apart, since it begins every window."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from .text import LONGEST, in_pieces


GROUP = 256  # texts that are tokenised at once


def start_tokens(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before every text by default, such as a BOS token; often nothing.

    A model whose tokenizer does so has seen no text without, and may predict nonsense there.
    """
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    full = tokenizer("x")["input_ids"]
    places = range(len(full) - len(bare) + 1)
    return full[: next((place for place in places if full[place : place + len(bare)] == bare), 0)]


def encode_pieces(tokenizer: Any, pieces: Iterable[str]) -> Iterator[list[int]]:
    """Token ids of each piece of a text, without special tokens.

    All of them together are those of the whole text, if the pieces end where tokens do: see `in_pieces`.
    """
    before, waiting = "", None
    for piece in pieces:
        if waiting is not None:
            after = piece[0] + "x" if piece[0].isspace() else "x"
            yield _encode_within(tokenizer, before, waiting, after)
            before = "\n"
        waiting = piece
    if waiting is not None:
        yield _encode_within(tokenizer, before, waiting, "")


def _encode_within(tokenizer: Any, before: str, piece: str, after: str) -> list[int]:
    """Token ids of a piece that has something before and after it.

    By itself it could have others at its ends: many tokenizers put a blank before what they take for the beginning of a
    text, and join the blanks at its end.
    """
    head, tail = _encode(tokenizer, before), _encode(tokenizer, "\n" + after)[len(_encode(tokenizer, "\n")) :]
    ids = _encode(tokenizer, before + piece + after)
    end = len(ids) - len(tail)
    return ids[len(head) : end] if ids[: len(head)] == head and ids[end:] == tail else _encode(tokenizer, piece)


def encode_texts(tokenizer: Any, texts: Iterable[str]) -> Iterator[list[int]]:
    """Token ids of each of many texts, without special tokens, some at once if they are short."""
    texts = iter(texts)
    while group := list(islice(texts, GROUP)):
        if sum(map(len, group)) <= LONGEST:
            yield from tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            yield from (list(chain.from_iterable(encode_pieces(tokenizer, in_pieces([text])))) for text in group)


def encode_text(tokenizer: Any, text: str) -> Tensor:
    """Token ids int32 [N] of a text, without special tokens."""
    return joined(encode_pieces(tokenizer, in_pieces([text])))


def joined(stretches: Iterable[list[int]], count: int | None = None) -> Tensor:
    """Token ids as one tensor.

    Args:
        stretches: token ids; no more of them are asked for than are needed.
        count: how many tokens to take at most; default: all.

    Returns:
        int32 [N], since a long text has to fit into memory.
    """
    parts, total = [torch.empty(0, dtype=torch.int32)], 0
    for stretch in stretches:
        parts.append(torch.tensor(stretch, dtype=torch.int32))
        total += len(stretch)
        if count is not None and total >= count:
            break
    return torch.cat(parts)[:count]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
