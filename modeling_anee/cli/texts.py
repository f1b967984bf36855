"""The text of --text as token ids."""

from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.encoding import encode_pieces, joined, start_tokens
from ..data.progress import progress, waiting
from ..data.text import STDIN, check_text, read_pieces, size_of
from ..data.windows import Window, full_windows, room_of
from ..evaluation.processes import ALONE, Processes


def check_text_option(text: Path, processes: Processes = ALONE) -> None:
    """Notice a text that can't be read before the model is loaded.

    Raises:
        OSError, ValueError: as `check_text`; or several processes would share the standard input.
    """
    if text == STDIN and processes.count > 1:
        raise ValueError("--text - is not allowed with several processes: each needs the whole text, so give a file")
    check_text(text)


def encode_file(tokenizer: Any, text: Path, count: int | None = None) -> Tensor:
    """Token ids int32 [N] of a text without special tokens, the first `count` at most, with progress on stderr.

    Raises:
        ValueError: there is nothing in it; and what reading it raises.
    """
    size = size_of(text)
    if size is None:
        with waiting("tokenising the text"):
            ids = joined(encode_pieces(tokenizer, read_pieces(text)), count)
    else:
        with progress("tokenising the text (bytes)", size) as advance:
            ids = joined(encode_pieces(tokenizer, read_pieces(text, advance)), count)
    if not len(ids):
        raise ValueError(f"--text {text} is empty: there is no text in it")
    return ids


def full_windows_of(tokenizer: Any, text: Path, length: int, limit: int | None) -> list[Window]:
    """At most `limit` windows of `length` tokens each; a last one that is shorter is dropped.

    Raises:
        ValueError: the text is too short for one.
    """
    start, ids = start_tokens(tokenizer), encode_file(tokenizer, text)
    if len(ids) < room_of(length, start):
        raise ValueError(f"--text has {len(ids)} tokens, too few for one window of --length {length}")
    return full_windows(ids, length, start, limit)
