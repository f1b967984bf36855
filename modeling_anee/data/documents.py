"""A recipe's sources as windows of tokens. Text that the base samples itself is made in `sampled.py`."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers.utils import logging

from .encoding import encode_pieces, encode_texts, joined, start_tokens
from .randomness import derive_seed
from .sampled import check_chat_template, sampled_documents
from .sources import DatasetSource, FileSource, GeneratedSource, name_of
from .templates import fill
from .text import check_string, in_pieces, read_lines, read_pieces
from .windows import window_rows


logger = logging.get_logger("transformers.anee")

AnySource = FileSource | DatasetSource | GeneratedSource
Progress = Callable[[int], Any]


def token_windows(
    sources: list[AnySource],
    tokenizer: Any,
    length: int,
    data_dir: Path,
    seed: int,
    base: Any = None,
    progress: Progress | None = None,
) -> Tensor:
    """Windows of tokens, shuffled; documents are joined by the EOS token and cut anywhere.

    Each begins with what the tokenizer puts before every text by default, a BOS token for example; this is part of its length.

    Args:
        sources: where the text comes from; one that has less than its `tokens` gives what it has, with a warning.
        tokenizer: the base's.
        length: tokens of a window.
        data_dir: folder of the files.
        seed: of sampled text and of the order.
        base: the plain base, for text that it samples.
        progress: called with the number of tokens that have just been taken; they are those of all sources at most.

    Returns:
        int64 [W, length], the same for the same arguments.

    Raises:
        OSError: a file is missing.
        ValueError: a file is not what its source says, or there is not enough text for one window.
        ImportError: a dataset is asked for, and `datasets` is not installed.
    """
    check_end(tokenizer)
    start = start_tokens(tokenizer)
    parts = [window_rows(torch.empty(0, dtype=torch.int32), length, start)]
    for number, source in enumerate(sources):
        stretches = _stretches(source, tokenizer, data_dir, derive_seed(seed, "sampled", number), base)
        tokens = joined(_counted(stretches, source.tokens, progress), source.tokens)
        if len(tokens) < source.tokens:
            logger.warning(f"text of {name_of(source)} has {len(tokens)} tokens, fewer than tokens={source.tokens}")
        parts.append(window_rows(tokens, length, start))
    windows = torch.cat(parts)
    if not len(windows):
        names = ", ".join(map(name_of, sources)) or "none"
        raise ValueError(f"the text (sources: {names}) is too short for one window of {length} tokens")
    order = torch.Generator().manual_seed(derive_seed(seed, "order"))
    return windows[torch.randperm(len(windows), generator=order)]


def check_end(tokenizer: Any) -> None:
    """Notice a tokenizer that documents can't be joined with.

    Raises:
        ValueError: it has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, which documents are joined by")


def count_tokens(source: FileSource, tokenizer: Any, data_dir: Path) -> int:
    """How many tokens a file gives, its `tokens` at most. Raises as `token_windows`."""
    count = 0
    for stretch in _stretches(source, tokenizer, data_dir, 0, None):
        count += len(stretch)
        if count >= source.tokens:
            return source.tokens
    return count


def _counted(stretches: Iterable[list[int]], count: int, progress: Progress | None) -> Iterator[list[int]]:
    """The same, told to `progress`, `count` tokens at most."""
    for stretch in stretches:
        if progress is not None:
            progress(min(len(stretch), count))
        count -= min(len(stretch), count)
        yield stretch


def _stretches(source: AnySource, tokenizer: Any, data_dir: Path, seed: int, base: Any) -> Iterator[list[int]]:
    """Token ids of a source, documents ended by EOS, as far as they are asked for."""
    if isinstance(source, GeneratedSource):
        if base is None:
            raise ValueError(f"generated={source.generated!r} is not allowed: there is no base to sample text")
        return _ended(sampled_documents(source, base, tokenizer, seed), tokenizer)
    if isinstance(source, DatasetSource):
        return _ended(_tokenized(_dataset_texts(source), tokenizer), tokenizer)
    path = data_dir / source.file
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: --data must name the folder that has {source.file}")
    if source.is_jsonl:
        return _ended(_tokenized(_record_texts(source, path, tokenizer), tokenizer), tokenizer)
    if source.lines:
        return _ended(_tokenized((line for _, line in _lines(source, path)), tokenizer), tokenizer)
    return chain(encode_pieces(tokenizer, in_pieces(_passage(source, path))), [[tokenizer.eos_token_id]])


def _ended(documents: Iterable[list[int]], tokenizer: Any) -> Iterator[list[int]]:
    eos = tokenizer.eos_token_id
    return (document if document[-1:] == [eos] else [*document, eos] for document in documents)


def _tokenized(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    return encode_texts(tokenizer, (text for text in texts if text.strip()))


def _passage(source: FileSource, path: Path) -> Iterator[str]:
    """The source's part of a file, in pieces."""
    first, last = _part(source, lambda: sum(map(len, read_pieces(path))))
    place = 0
    for piece in read_pieces(path):
        yield piece[max(first - place, 0) : None if last is None else max(last - place, 0)]
        place += len(piece)
        if last is not None and place >= last:
            return


def _lines(source: FileSource, path: Path) -> Iterator[tuple[int, str]]:
    """The source's part of the lines of a file, with their numbers from 1."""
    first, last = _part(source, lambda: sum(1 for _ in read_lines(path)))
    return islice(enumerate(read_lines(path), 1), first, last)


def _part(source: FileSource, count: Callable[[], int]) -> tuple[int, int | None]:
    """The first of a file's characters or lines that a source takes, and the one after its last; parts that meet share none."""
    if source.start == 0 and source.stop == 1:
        return 0, None
    items = count()
    return int(source.start * items), int(source.stop * items)


def _record_texts(source: FileSource, path: Path, tokenizer: Any) -> Iterator[str]:
    """Documents from lines of JSON.

    Raises:
        ValueError: a line is not a JSON object, lacks a field or has something else than a text there; with its number.
    """
    if source.chat is not None:
        check_chat_template(tokenizer, f"chat={source.chat!r}")
    for number, line in _lines(source, path):
        if not line.strip():
            continue
        try:
            yield check_string(_document(source, json.loads(line), tokenizer), "the text of its fields")
        except json.JSONDecodeError as error:
            raise ValueError(f"{source.file}, line {number} is not JSON ({error}): {line[:80]!r}") from error
        except TemplateError as error:
            raise ValueError(f"{source.file}, line {number} does not fit the tokenizer's chat template: {error}") from error
        except ValueError as error:
            raise ValueError(f"{source.file}, line {number}: {error}") from error


def _document(source: FileSource, record: Any, tokenizer: Any) -> str:
    """The text of one record."""
    if not isinstance(record, dict):
        raise ValueError(f"it is not a JSON object: {record!r:.80}")
    if source.chat is None:
        return fill(source.template or "", record)
    messages = [{"role": role, "content": fill(content, record)} for role, content in source.chat]
    return tokenizer.apply_chat_template(messages, tokenize=False)


def _dataset_texts(source: DatasetSource) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"dataset={source.dataset!r} needs the library datasets: pip install 'modeling-anee[train-data]'"
        ) from error
    data = load_dataset(source.dataset, source.config, split=source.split, revision=source.revision)
    if source.column not in data.column_names:
        raise ValueError(f"column={source.column!r} is not allowed: {source.dataset} has {', '.join(data.column_names)}")
    for number, row in enumerate(data):
        yield check_string(row[source.column], f"{source.dataset}, row {number}: column {source.column!r}")
