"""A pool of tiny models: two bases of different families, each with a tokenizer of its own, and an artifact over the first."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from modeling_anee.pool.config import PoolConfig
from modeling_anee.pool.examples import Example
from modeling_anee.pool.loading import Loader
from modeling_anee.pool.making import make_config, parse_rung
from modeling_anee.pool.measuring import measure, summarise

from .tiny import VOCABULARY, tiny_base, wrap
from .workshop import CHAT, WORDS, words


RUNGS = ("low=artifact@0.5!", "words=first", "letters-int8=second@4*INT8 / int8", "letters=second")


def word_tokenizer():
    """Words w3, w4, ... that are a token each, unlike those of others; with a chat template, and nothing before a text."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = CHAT
    return wrapped


def letter_tokenizer():
    """Pieces of words, byte by byte where there are no others, and a BOS token before a text; no chat template."""
    tokenizer = Tokenizer(models.BPE(unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([words(400), "".join("0123456789 w")], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_models(folder: Path) -> Path:
    """Write the models into a folder."""
    for name, family, tokenizer in (("first", "llama", word_tokenizer()), ("second", "gpt_neox", letter_tokenizer())):
        tiny_base(family).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    artifact = wrap(tiny_base(), "plan", base_model_name_or_path="../first", cost_unit="bytes", plans=["2*PROCESS, 2*SKIP"])
    artifact.save_pretrained(folder / "artifact", tokenizer=word_tokenizer())
    return folder


def examples(count: int = 12) -> list[Example]:
    """Prompts of different lengths, and what comes next."""
    lines = words(40 * count).splitlines()
    return [Example(lines[i][: 12 + i], " " + lines[i + count][:20], f"text {i % 2}") for i in range(count)]


def make_pool(folder: Path, rungs=RUNGS) -> PoolConfig:
    """Write the file of a pool over `make_models`, with all policies."""
    configs = [parse_rung(rung, folder, "float32") for rung in rungs]
    loader = Loader(folder)
    samples = measure([lambda one=one: loader.load(one) for one in configs], examples())
    config = make_config(configs, summarise(samples), samples, [0.1, 1.0])
    config.save(folder)
    return config
