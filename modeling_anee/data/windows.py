"""Windows of tokens: what a model runs together. Each begins with what the tokenizer puts before every text."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor


Item = TypeVar("Item")


class Window(NamedTuple):
    """Token ids int64 [T] that are run together; the first `context` of them are not scored."""

    ids: Tensor
    context: int


def windows(
    ids: Tensor, length: int = 512, stride: int | None = None, start: Sequence[int] = (), limit: int | None = None
) -> list[Window]:
    """Cut a text into windows that begin every `stride` tokens.

    Without a stride they do not overlap; with a smaller one every token is scored once, in the first window that has it.
    What has no token before it in its window is not scored: without `start`, the first token of the text and, if there is no
    overlap, that of each window.

    Args:
        ids: integers [N].
        length: tokens of a window, `start` included; the last one may be shorter.
        stride: tokens of the text from a window's beginning to the next's, 1 to as many as a window has; default: so many.
        start: tokens that every window begins with, as context: see `start_tokens`.
        limit: take so many windows at most, evenly spread over the text; default: all.

    Raises:
        ValueError: a length, stride or limit that is not allowed, or fewer than two tokens.
    """
    room = room_of(length, start)
    stride = room if stride is None else stride
    if not 1 <= stride <= room:
        raise ValueError(
            f"stride={stride} is not allowed: it must be between 1 and what a window has of the text, {room} tokens"
        )
    if ids.dim() != 1 or len(start) + len(ids) < 2:
        raise ValueError(f"ids of shape {tuple(ids.shape)} is not allowed: it must be one row of at least 2 tokens")
    first = torch.tensor(start, dtype=torch.int64)
    cut, scored = [], 0  # tokens before `scored` are done
    for begin in range(0, len(ids), stride):
        end = min(begin + room, len(ids))
        context = max(len(start) + scored - begin, 1)
        if context < len(start) + end - begin:
            cut.append((begin, end, context))
        scored = end
        if end == len(ids):
            break
    return [Window(torch.cat([first, ids[begin:end].long()]), context) for begin, end, context in spread(cut, limit)]


def full_windows(ids: Tensor, length: int, start: Sequence[int] = (), limit: int | None = None) -> list[Window]:
    """The same without overlap and without a last window that is shorter; none if the text is too short for one."""
    room = room_of(length, start)
    return windows(ids[: len(ids) // room * room], length, None, start, limit) if len(ids) >= room else []


def window_rows(ids: Tensor, length: int, start: Sequence[int] = ()) -> Tensor:
    """Full windows without overlap as rows, int64 [W, length], of integers [N]."""
    room = room_of(length, start)
    rows = ids[: len(ids) // room * room].long().view(-1, room)
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(len(rows), -1), rows], dim=1)


def room_of(length: int, start: Sequence[int]) -> int:
    """How many tokens of the text a window of `length` tokens has.

    Raises:
        ValueError: not even one besides another before it.
    """
    least = max(len(start) + 1, 2)
    if length < least:
        raise ValueError(f"length={length} is not allowed: a window needs at least {least} tokens")
    return length - len(start)


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` of the items, evenly spread over them; all if it is None.

    Raises:
        ValueError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} is not allowed: at least one window must be scored")
    if limit is None or limit >= len(items):
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * limit)] for i in range(limit)]


def digest_of(windows: Sequence[Window]) -> str:
    """SHA-256 of windows."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(f"{len(window.ids)} {window.context} ".encode())
        digest.update(window.ids.cpu().to(torch.int64).numpy().tobytes())
    return digest.hexdigest()
