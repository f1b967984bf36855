"""Token ids of long texts: those of the whole text, in pieces; and what a tokenizer puts before a text."""

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from modeling_anee.data import encoding
from modeling_anee.data import text as reader
from modeling_anee.data.encoding import encode_pieces, encode_text, encode_texts, joined, start_tokens

from .workshop import tiny_tokenizer


def byte_level():
    """As of GPT-2, with tokens of blanks."""
    merges = [("Ċ", "Ċ"), ("Ġ", "Ċ"), ("Ġ", "Ġ"), ("a", "b"), ("Ġ", "ab"), ("Ġ", "a"), ("ĊĊ", "ĊĊ"), ("ĠĊ", "ĠĊ")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def byte_fallback():
    """As of Llama 2: a blank is put before a text, and there is nothing between words."""
    merges = [("▁", "a"), ("▁", "▁"), ("a", "b"), ("▁a", "b"), ("\n", "\n")]
    vocabulary = {token: number for number, token in enumerate(["<unk>", "▁", "a", "b", "\n", *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


KINDS = {"byte level": byte_level, "byte fallback": byte_fallback}


def wrapped(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_pieces_are_those_of_the_whole_text(kind):
    tokenizer = wrapped(KINDS[kind]())

    @settings(deadline=None)
    @given(st.lists(st.sampled_from(["ab", "a", " ", "  ", "\n", "\n\n", " \n"]), max_size=80))
    def check(parts):
        text = "".join(parts)
        pieces = list(reader.in_pieces([text]))
        if all(len(piece) < reader.LONGEST - 1 for piece in pieces):  # each ends with a line
            assert joined(encode_pieces(tokenizer, pieces)).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "PIECE", 8)
        patch.setattr(reader, "LONGEST", 60)
        check()


def test_encoded_pieces_are_few_and_compact():
    text = "w5 w6 w7\n" * 50_000
    ids = encode_text(tiny_tokenizer(), text)
    assert ids.dtype == torch.int32 and ids.tolist() == [5, 6, 7] * 50_000
    asked = []
    first = joined(encode_pieces(tiny_tokenizer(), (asked.append(1) or piece for piece in reader.in_pieces([text]))), 10)
    assert first.tolist() == [5, 6, 7, 5, 6, 7, 5, 6, 7, 5] and len(asked) == 2
    assert joined([]).tolist() == [] and encode_text(tiny_tokenizer(), "").tolist() == []


@pytest.mark.parametrize("longest", [5, 1 << 19])
def test_many_texts_are_tokenised_some_at_once(monkeypatch, longest):
    monkeypatch.setattr(encoding, "GROUP", 3)
    monkeypatch.setattr(encoding, "LONGEST", longest)
    texts = [" ".join(f"w{3 + (i + j) % 60}" for j in range(i)) for i in range(8)]
    assert list(encode_texts(tiny_tokenizer(), iter(texts))) == [[3 + (i + j) % 60 for j in range(i)] for i in range(8)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [(None, []), ("$A", []), ("<s> $A", [1]), ("$A </s>", []), ("<s> $A </s>", [1]), ("</s> <s> $A", [2, 1])],
)
def test_what_is_put_before_a_text_is_asked_of_the_tokenizer(template, expected):
    tokenizer = tiny_tokenizer()
    if template is not None:
        special = [("<s>", 1), ("</s>", 2)]
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    assert start_tokens(tokenizer) == expected
    assert list(chain.from_iterable(encode_pieces(tokenizer, ["w5\n", "w6"]))) == [5, 6]
