"""Windows of tokens from a recipe's sources. Text that the base samples itself is made in `sampled.py`."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.utils import logging

from .randomness import derive_seed
from .sampled import check_chat_template, sampled_documents
from .sources import DatasetSource, FileSource, GeneratedSource, name_of


logger = logging.get_logger("transformers.anee")

PIECE = 1 << 16  # characters of a long text that are tokenised at once
GROUP = 256  # documents that are tokenised at once

AnySource = FileSource | DatasetSource | GeneratedSource
Items = TypeVar("Items", str, list[str])


def token_windows(sources: list[AnySource], tokenizer: Any, length: int, data_dir: Path, seed: int, base: Any = None) -> Tensor:
    """Windows of tokens, shuffled; documents are joined by the EOS token and cut anywhere.

    Args:
        sources: where the text comes from; one that has less than its `tokens` gives what it has, with a warning.
        tokenizer: the base's.
        length: tokens of a window.
        data_dir: folder of the files.
        seed: of sampled text and of the order.
        base: the plain base, for text that it samples.

    Returns:
        int64 [W, length], the same for the same arguments.

    Raises:
        OSError: a file is missing.
        ValueError: a file is not what its source says, or there is not enough text for one window.
        ImportError: a dataset is asked for, and `datasets` is not installed.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, which documents are joined by")
    parts = [torch.empty(0, length, dtype=torch.long)]
    for number, source in enumerate(sources):
        stretches = _stretches(source, tokenizer, data_dir, derive_seed(seed, "sampled", number), base)
        tokens = _take(stretches, source.tokens)
        if len(tokens) < source.tokens:
            logger.warning(f"text of {name_of(source)} has {len(tokens)} tokens, fewer than tokens={source.tokens}")
        parts.append(tokens[: len(tokens) // length * length].view(-1, length))
    windows = torch.cat(parts)
    if not len(windows):
        names = ", ".join(map(name_of, sources)) or "none"
        raise ValueError(f"the text (sources: {names}) is too short for one window of {length} tokens")
    order = torch.Generator().manual_seed(derive_seed(seed, "order"))
    return windows[torch.randperm(len(windows), generator=order)]


def _take(stretches: Iterable[list[int]], count: int) -> Tensor:
    """The first `count` tokens, int64 [at most count]; no more text is read than that needs."""
    tokens: list[int] = []
    for stretch in stretches:
        tokens += stretch
        if len(tokens) >= count:
            break
    return torch.tensor(tokens[:count], dtype=torch.long)


def _stretches(source: AnySource, tokenizer: Any, data_dir: Path, seed: int, base: Any) -> Iterator[list[int]]:
    """Token ids of a source, documents ended by EOS, as far as they are asked for."""
    if isinstance(source, GeneratedSource):
        if base is None:
            raise ValueError(f"generated={source.generated!r} is not allowed: there is no base to sample text")
        return _ended(sampled_documents(source, base, tokenizer, seed), tokenizer)
    if isinstance(source, DatasetSource):
        return _ended(_tokenized(_dataset_texts(source), tokenizer), tokenizer)
    text = _read(source, data_dir)
    if source.is_jsonl:
        records = _share(text.split("\n"), source)
        return _ended(_tokenized(_record_texts(source, records, tokenizer), tokenizer), tokenizer)
    if source.lines:
        return _ended(_tokenized(_share(text.split("\n"), source), tokenizer), tokenizer)
    return _long_text(_share(text, source), tokenizer)


def _ended(documents: Iterable[list[int]], tokenizer: Any) -> Iterator[list[int]]:
    eos = tokenizer.eos_token_id
    return (document if document[-1:] == [eos] else [*document, eos] for document in documents)


def _tokenized(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    filled = (text for text in texts if text.strip())
    while group := list(islice(filled, GROUP)):
        yield from tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]


def _long_text(text: str, tokenizer: Any) -> Iterator[list[int]]:
    """One document in pieces that end with a line, so that only as much is tokenised as is needed."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + PIECE) + 1 or len(text)
        yield tokenizer(text[start:stop], add_special_tokens=False, verbose=False)["input_ids"]
        start = stop
    yield [tokenizer.eos_token_id]


def _read(source: FileSource, data_dir: Path) -> str:
    path = data_dir / source.file
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            return str(file.read())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist: --data must name the folder that has {source.file}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error


def _share(items: Items, source: FileSource) -> Items:
    """The part of a text or of its lines that a source takes; parts that meet do not overlap."""
    return items[int(source.start * len(items)) : int(source.stop * len(items))]


def _record_texts(source: FileSource, lines: list[str], tokenizer: Any) -> Iterator[str]:
    """Documents from lines of JSON.

    Raises:
        ValueError: a line is not a JSON object, or lacks a field.
    """
    turns = source.chat or [["user", source.template or ""]]
    if source.chat is not None:
        check_chat_template(tokenizer, f"chat={source.chat!r}")
    for line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            messages = [{"role": role, "content": content.format_map(record)} for role, content in turns]
        except KeyError as error:
            raise ValueError(
                f"{source.file} has a line without the field {error}; its fields are {', '.join(record)}"
            ) from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{source.file} has a line that is not a JSON object ({error}): {line[:80]!r}") from error
        yield messages[0]["content"] if source.chat is None else tokenizer.apply_chat_template(messages, tokenize=False)


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
    return (str(row[source.column]) for row in data)
