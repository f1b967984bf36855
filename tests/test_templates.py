"""Templates: what is filled in, and what is refused, before or while it is."""

import pytest

from modeling_anee.data.templates import check_template, fill, has_fields


RECORD = {
    "question": "Why?",
    "answer": 42,
    "share": 0.5,
    "messages": [{"content": "Hi"}],
    "none": None,
    "yes": True,
    "nan": float("nan"),
}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{question}\n{answer}", "Why?\n42"),
        ("{messages[0][content]}", "Hi"),
        ("{share:.2f} {{question}} {question!r}", "0.50 {question} 'Why?'"),
        ("nothing", "nothing"),
    ],
)
def test_fields_are_filled(template, expected):
    check_template(template)
    assert fill(template, RECORD) == expected
    assert has_fields(template) == (template != "nothing")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{none}", "the field 'none' is null, not a text"),
        ("{yes}", "the field 'yes' is True"),
        ("{nan}", "the field 'nan' is nan"),
        ("{messages}", "the field 'messages' is "),
        ("{gone}", "no field 'gone'; the fields are question, answer"),
        ("{messages[1][content]}", r"no field 'messages\[1\]\[content\]'"),
        ("{question.upper}", "the field 'question.upper' is"),
        ("{question:d}", "Unknown format code 'd'"),
    ],
)
def test_what_is_no_text_is_named(template, message):
    check_template(template)
    with pytest.raises(ValueError, match=message):
        fill(template, RECORD)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question", "expected '}'"),
        ("question}", "Single '}'"),
        ("{}", "a field needs a name"),
        ("{0}", "a field needs a name"),
        ("{a[}", "'}'"),
        ("{a[]}", "Empty attribute"),
        ("{a!z}", "conversion"),
    ],
)
def test_wrong_syntax_is_noticed_without_a_record(template, message):
    with pytest.raises(ValueError, match=message):
        check_template(template)
