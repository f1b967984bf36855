"""What policies look at before a rung is chosen: numbers that every tokenizer gives alike, or nearly so."""

import re
from typing import NamedTuple


FEATURES = ("length", "rarity", "perplexity", "digits", "code")
MEANING = {
    "length": "words of the prompt",
    "rarity": "tokens per word, in the vocabulary of the rung that looks",
    "perplexity": "bits per byte of the prompt, under the rung that looks",
    "digits": "share of the characters that are digits",
    "code": "share of the characters that are signs of code",
}
SIGNS = frozenset("{}()[]<>=;_\\/|&*#+%$@^~`")


class Glance(NamedTuple):
    """What a cheap pass over a prompt found, and the bytes of weights that it read."""

    bits_per_byte: float
    tokens: int
    work: float


def features_of(text: str, glance: Glance) -> dict[str, float]:
    """The features of a prompt, by name, in the order of `FEATURES`."""
    words, characters = len(re.findall(r"\S+", text)), max(len(text), 1)
    values = (
        float(words),
        glance.tokens / max(words, 1),
        glance.bits_per_byte,
        sum(character.isdigit() for character in text) / characters,
        sum(character in SIGNS for character in text) / characters,
    )
    return dict(zip(FEATURES, values, strict=True))
