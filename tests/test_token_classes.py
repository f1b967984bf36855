"""Classes of tokens: words in their places, pieces, numbers, bytes; and that every token has exactly one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_anee.evaluation.token_classes import (
    CLASSES,
    FUNCTION,
    NAME,
    NUMBER,
    PIECE,
    PUNCTUATION,
    SPACE,
    WORD,
    token_class,
    token_classes,
)


relaxed = settings(deadline=None, derandomize=True, max_examples=200)


@pytest.mark.parametrize(
    ("text", "previous", "expected"),
    [
        ("The", "", FUNCTION),
        (" the", " of", FUNCTION),
        ("(the", " x", FUNCTION),
        ("'s", " dog", FUNCTION),
        ("’s", " dog", FUNCTION),
        ("t", "'", FUNCTION),
        ("t", " (", WORD),
        (" I", " and", FUNCTION),
        (" dog", " the", WORD),
        ("dog", "(", WORD),
        (".com", "google", WORD),
        (" Paris", " in", NAME),
        ("Paul", "-", NAME),
        (" Smith", ",", NAME),
        (" Paris", ".", WORD),
        ("Paris", "\n", WORD),
        ("Paris", "", WORD),
        (" Paris", ' "', WORD),
        (" NASA", ".", NAME),
        (" A", " grade", FUNCTION),
        (" B", ".", WORD),
        ("oul", " B", PIECE),
        ("Donald", " Mc", PIECE),
        ("the", " ba", PIECE),
        ("é", "\ufffd", PIECE),
        ("\ufffd", " caf", PIECE),
        ("", " a", PIECE),
        (" 1914", " in", NUMBER),
        ("7", "1", NUMBER),
        ("1st", " ", NUMBER),
        ("½", " ", NUMBER),
        (",", " a", PUNCTUATION),
        (" @-@", " a", PUNCTUATION),
        (".\n", " end", PUNCTUATION),
        ("$", "", PUNCTUATION),
        (" ", ",", SPACE),
        ("\n\n", ".", SPACE),
    ],
)
def test_a_token_has_the_class_that_a_reader_would_give_it(text, previous, expected):
    assert token_class(text, previous) == expected


@given(st.text(), st.text())
@relaxed
def test_every_token_has_a_class(text, previous):
    assert token_class(text, previous) in CLASSES


@given(st.lists(st.text(max_size=6)))
@relaxed
def test_the_classes_of_a_text_are_those_of_its_tokens_with_their_predecessors(texts):
    listed = [token_class(text, texts[place - 1] if place else "") for place, text in enumerate(texts)]
    assert token_classes(texts) == listed
