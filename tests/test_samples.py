"""Samples: the model's own greedy answers, one per prompt and budget, shown as they are."""

import pytest

from modeling_anee.evaluation.samples import PROMPTS, as_text, sample

from .tiny import tiny_base, wrap
from .workshop import tiny_tokenizer


ASKED = ("w7 w8", "w9 w10 w11")


@pytest.fixture(scope="module")
def model():
    return wrap(tiny_base(), "plan")


def test_one_row_per_prompt_and_budget_with_the_greedy_answer(model):
    tokenizer, advanced = tiny_tokenizer(), []
    rows = sample(model, tokenizer, [1.0, 0.7], 6, ASKED, advanced.append)
    assert [(row["prompt"], row["budget"]) for row in rows] == [(prompt, b) for prompt in ASKED for b in (1.0, 0.7)]
    assert sum(advanced) == len(rows) and rows == sample(model, tokenizer, [1.0, 0.7], 6, ASKED)
    for row in rows:
        messages = [{"role": "user", "content": row["prompt"]}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        ids = model.generate(**inputs, energy_budget=row["budget"], max_new_tokens=6, do_sample=False)
        assert tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == row["text"]
    assert all(row["cost"] == 1.0 for row in rows if row["budget"] == 1.0)
    assert all(abs(row["cost"] - 0.7) < 0.1 for row in rows if row["budget"] == 0.7)


def test_a_tokenizer_without_a_chat_template_is_an_error(model):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        sample(model, tokenizer, [1.0], 2)


def test_ten_different_questions():
    assert len(set(PROMPTS)) == 10 and all(prompt[-1] in "?." for prompt in PROMPTS)


def test_the_text_is_unedited_whatever_is_in_it():
    fences = {"  # no heading\n\n```python\n1\n```": "````", "````": "`````", "| a | b |": "```", "": "```"}
    rows = [{"prompt": "p", "budget": 1.0, "cost": 1.0, "text": text} for text in fences]
    shown = as_text(rows)
    assert shown.count("**p**") == 1
    for text, fence in fences.items():
        assert f"{fence}text\n{text}\n{fence}" in shown
