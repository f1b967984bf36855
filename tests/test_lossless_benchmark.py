"""The benchmark of lossless decoding, its questions, and the verb that measures drafts."""

import json

import pytest
import torch
from typer.testing import CliRunner

from modeling_anee import AneeForCausalLM
from modeling_anee.cli.lossless import benchmark_as_text
from modeling_anee.cli.main import app
from modeling_anee.evaluation.lossless_benchmark import benchmark_lossless, first_difference
from modeling_anee.evaluation.questions import OWN, Question, over_categories, read_questions

from .tiny import tiny_base, wrap
from .workshop import tiny_tokenizer


QUESTIONS = [Question("birds", "w5 w6 w7"), Question("fish", "w8 w9"), Question("birds", "w10 w11 w12")]


def anee(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_report_has_a_row_for_each_category_and_says_that_tokens_are_the_same():
    base = tiny_base()
    base.generation_config.eos_token_id = None
    done: list[int] = []
    report = benchmark_lossless(wrap(base, precisions=["int8"]), tiny_tokenizer(), QUESTIONS, 12, done.append)
    assert sum(done) == 3 and [row["category"] for row in report["rows"]] == ["all", "birds", "fish"]
    every = report["rows"][0]
    assert every["questions"] == every["identical"] == 3 and 0 < every["acceptance"] <= 1 and every["tokens_per_verify"] > 1
    assert every["faster"]["lossless"] > 0 and every["faster"]["prompt lookup"] > 0
    assert all(one["new"] == 12 and not one["differs"] for one in report["answers"])
    assert ("early exit" in report["answers"][0]["seconds"]) == ("early exit" not in report["left_out"])
    assert "early exit" not in report["answers"][1]["seconds"]
    text = benchmark_as_text(report)
    assert "birds" in text and "3/3" in text and "another token" not in text
    json.dumps(report, allow_nan=False)


def test_tokens_that_differ_are_told():
    base = tiny_base()
    base.generation_config.eos_token_id = None
    report = benchmark_lossless(wrap(base, precisions=["int8"]), tiny_tokenizer(), QUESTIONS[:1], 4, lambda count: None)
    report["answers"][0] |= {"differs": {"lossless": 2}, "margins": {"lossless": 1e-6}}
    assert "lossless: another token than plain generate in question 1, token 3 (likeliest by 1.0e-06" in benchmark_as_text(
        report
    )


def test_the_first_difference_is_after_the_prompt():
    ids = torch.arange(8)
    assert first_difference(ids, ids, 3) is None
    assert first_difference(ids, ids[:6], 3) == 3
    other = ids.clone()
    other[5:] = 0
    assert first_difference(ids, other, 3) == 2


def test_questions_come_from_all_categories_in_turn(tmp_path):
    file = tmp_path / "questions.jsonl"
    rows = [{"category": category, "turns": [f"{category} {n}", "more"]} for category in "abc" for n in range(3)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert [one.text for one in over_categories(read_questions(file), 4)] == ["a 0", "b 0", "c 0", "a 1"]
    assert over_categories(OWN, None) == list(OWN)
    for wrong in ("{", '{"category": "a"}', '{"category": "a", "turns": []}', '{"category": "a", "turns": [3]}', ""):
        file.write_text(wrong)
        with pytest.raises(ValueError, match="questions.jsonl(, line 1,| has no questions)"):
            read_questions(file)


@pytest.fixture
def artifact(tmp_path):
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    model = AneeForCausalLM.from_base(str(tmp_path / "base"), controller="plan", precisions=["int8", "int4"])
    model.save_pretrained(tmp_path / "artifact", tokenizer=tokenizer)
    (tmp_path / "text.txt").write_text(" ".join(f"w{3 + n % 50}" for n in range(200)))
    return tmp_path / "artifact"


def test_drafts_are_measured_and_saved_in_an_artifact(artifact, tmp_path):
    few = ("--text", tmp_path / "text.txt", "--prompts", 2, "--length", 6, "--new-tokens", 12)
    done = anee("drafts", "--model", artifact, *few, "--save", "--output", tmp_path / "drafts.json")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "drafts.json").read_text())
    assert json.loads((artifact / "config.json").read_text())["drafts"] == found
    assert found["plans"] == ["4*INT8 / int8", "4*INT4 / int8", "4*INT4 / int4"]
    assert all(0 < sum(kept) <= sum(drafted) for drafted, kept in zip(found["drafted"], found["kept"], strict=True))
    assert all(plan in done.stdout for plan in found["plans"]) and "saved in" in done.stdout
    done = anee("generate", "--model", artifact, "--prompt", "w5 w6", "--lossless", "--stats", "--max-new-tokens", 9)
    assert done.exit_code == 0 and "lossless: " in done.stderr
    assert done.stdout == anee("generate", "--model", artifact, "--prompt", "w5 w6", "--max-new-tokens", 9).stdout
    done = anee("bench", "--lossless", "--model", artifact, "--limit", 1, "--new-tokens", 6, "--output", tmp_path / "b.json")
    assert done.exit_code == 0 and "1/1" in done.stdout, done.output


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("generate", "--prompt", "w5", "--lossless", "--energy-budget", 0.5), "leave --energy-budget out"),
        (("generate", "--prompt", "w5", "--lossless", "--target-speedup", 2), "leave --target-speedup out"),
        (("bench", "--limit", 3), "--limit is for --lossless"),
        (("bench", "--lossless", "--questions", "no/such.jsonl"), "no/such.jsonl"),
        (("drafts", "--text", __file__, "--save"), "--save needs the folder of an artifact"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(call, message):
    done = anee(*call)
    assert done.exit_code == 1 and message in done.stderr.replace("\n", "")
