"""Text that the base samples itself, so that an artifact can be fitted without any data."""

from collections.abc import Iterator
from typing import Any

import torch

from .randomness import derive_seed, seeded
from .sources import GeneratedSource


MARK = "[the user's turn]"  # shows where a chat template puts it


def sampled_documents(source: GeneratedSource, base: Any, tokenizer: Any, seed: int) -> Iterator[list[int]]:
    """Token ids of documents that the plain base samples, one batch after the other.

    Raises:
        ValueError: a chat is asked for, and the tokenizer has no chat template.
    """
    if source.generated == "chat":
        check_chat_template(tokenizer, "generated='chat'")
    for first in range(0, source.documents, source.batch):
        count = min(source.batch, source.documents - first)
        with seeded(derive_seed(seed, first), base.device):
            documents = (_chats if source.generated == "chat" else _plain)(source, base, tokenizer, count)
        yield from documents


def check_chat_template(tokenizer: Any, what: str) -> None:
    """Notice a tokenizer without a chat template.

    Raises:
        ValueError: it has none; the message names `what` needs one.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"{what} is not allowed: the base's tokenizer has no chat template")


def _plain(source: GeneratedSource, base: Any, tokenizer: Any, count: int) -> list[list[int]]:
    # Windows have EOS between documents, and it begins a text where a tokenizer has no BOS.
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return _continue(source, base, tokenizer, [[first]] * count, source.new_tokens)


def _chats(source: GeneratedSource, base: Any, tokenizer: Any, count: int) -> list[list[int]]:
    """Chats whose user turn the base makes up, since a model of chats has learned these too (arXiv:2406.08464)."""
    opening = _render(tokenizer, MARK).partition(MARK)[0]
    turns = _continue(source, base, tokenizer, [_encode(tokenizer, opening)] * count, source.user_tokens)
    questions = [tokenizer.decode(turn, skip_special_tokens=True).strip() for turn in turns]
    prompts = [_encode(tokenizer, _render(tokenizer, question)) for question in questions]
    answers = _continue(source, base, tokenizer, prompts, source.new_tokens)
    return [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]


def _render(tokenizer: Any, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _continue(source: GeneratedSource, base: Any, tokenizer: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Sampled continuations of prompts, without the token that ends them."""
    ends = base.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [] if ends is None else [ends])}
    width = max(map(len, prompts))
    pad = tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = base.generate(
        ids.to(base.device),
        attention_mask=mask.to(base.device),
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=source.temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
    )
    return [_until(row, ends) for row in output[:, width:].tolist()]


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]
