"""The lm-evaluation-harness over an artifact: local tasks of every kind, at budget 1.0 and below."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from modeling_anee import AneeForCausalLM

from . import children
from .tiny import BRIDGES, tiny_base, wrap
from .workshop import WORDS, tiny_tokenizer, words


SHIPPED_TASKS = Path(__file__).parents[1] / "configuration" / "lm_eval"
CHOICES = {
    "task": "choices",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "choices.jsonl"}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
ANSWERS = {
    "task": "answers",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "choices.jsonl"}},
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["w9"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
TASKS = ("local_text", "local_last_word", CHOICES, ANSWERS)


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A folder with a base, an artifact over it and the files of the tasks; the tests run in it."""
    folder = tmp_path_factory.mktemp("harness")
    tiny_base().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    model = wrap(tiny_base(), "plan", base_model_name_or_path="org/base", **BRIDGES)
    model.save_pretrained(folder / "artifact", tokenizer=tiny_tokenizer())
    (folder / "texts").mkdir()
    for i in range(3):
        (folder / "texts" / f"{i}.txt").write_text(words(20 + 10 * i, seed=i))
    lines = words(80, seed=3).splitlines()
    (folder / "passages.txt").write_text("\n".join(lines) + "\n")
    rows = [
        {"question": line[: 11 + 2 * i], "choices": [*WORDS[20 + i : 23 + i], "w5 w6"], "answer": i % 4}
        for i, line in enumerate(lines)
    ]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ANEE_BASE_PATH", str(folder))
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def at_one(place):
    return evaluate(artifact(1.0), *TASKS)


@pytest.fixture(scope="module")
def at_six_tenths(place):
    return evaluate(artifact(0.6), *TASKS)


def evaluate(model_args, *tasks, batch_size=3):
    """Figures by task, and every single response by task, of a model that is described as on the command line."""
    done = simple_evaluate(
        model="hf",
        model_args=f"{model_args},device=cpu,max_length=32",
        tasks=[dict(task) if isinstance(task, dict) else task for task in tasks],
        task_manager=TaskManager(include_path=str(SHIPPED_TASKS), include_defaults=False),
        batch_size=batch_size,
        bootstrap_iters=0,
        log_samples=True,
    )
    figures = {name: {k: v for k, v in row.items() if isinstance(v, float)} for name, row in done["results"].items()}
    return figures, {name: [row["filtered_resps"] for row in rows] for name, rows in done["samples"].items()}


def artifact(budget):
    return f"pretrained=artifact,trust_remote_code=True,energy_budget={budget}"


def log_probability(model, text):
    """Of the words of a text after a first `<s>`."""
    ids = torch.tensor([[1, *tiny_tokenizer()(text)["input_ids"]]])
    with torch.no_grad():
        log_p = model(ids[:, :-1]).logits.log_softmax(dim=-1)
    return float(log_p.gather(2, ids[:, 1:, None]).sum())


def test_at_budget_one_every_result_is_that_of_the_base(at_one):
    figures, responses = evaluate("pretrained=base", *TASKS)
    ours, our_responses = at_one
    assert set(figures) == {"local_text", "local_last_word", "choices", "answers"}
    for task, row in figures.items():
        assert ours[task] == pytest.approx(row, rel=1e-5), task
    for task in ("local_text", "local_last_word"):
        for one, two in zip(our_responses[task], responses[task], strict=True):
            assert torch.tensor(one).allclose(torch.tensor(two))
    assert our_responses["answers"] == responses["answers"]


def test_a_lower_budget_reaches_scoring_and_generation(at_one, at_six_tenths):
    responses = at_six_tenths[1]
    for task, rows in responses.items():
        assert all(one != two for one, two in zip(rows, at_one[1][task], strict=True)), task
    model = AneeForCausalLM.from_pretrained("artifact", energy_budget=0.6)
    short = Path("texts/0.txt").read_text()  # one window
    assert responses["local_text"][0][0] == pytest.approx(log_probability(model, short), rel=1e-5)
    prompts = [json.loads(line)["question"] for line in Path("choices.jsonl").read_text().splitlines()]
    for prompt, (answer,) in zip(prompts, responses["answers"], strict=True):
        inputs = tiny_tokenizer()(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tiny_tokenizer().decode(tokens, skip_special_tokens=True).split("w9")[0].strip() == answer.strip()


def test_padding_of_a_batch_changes_nothing(at_six_tenths):
    alone, together = evaluate(artifact(0.6), CHOICES, batch_size=1)[1]["choices"], at_six_tenths[1]["choices"]
    assert torch.tensor(alone).allclose(torch.tensor(together))


def test_the_base_may_be_named_and_the_length_is_that_of_the_base(monkeypatch, place):
    monkeypatch.delenv("ANEE_BASE_PATH")
    options = {"base_model_name_or_path": str(place / "base"), "energy_budget": 0.7, "device": "cpu"}
    ours, base = HFLM("artifact", trust_remote_code=True, **options), HFLM("base", device="cpu")
    assert ours.model.config.energy_budget == 0.7
    assert ours.max_length == base.max_length


@pytest.mark.parametrize("budget", ["1.5", "much"])
def test_a_wrong_budget_is_refused(budget):
    with pytest.raises(ValueError, match=f"energy_budget='?{budget}"):
        evaluate(artifact(budget), "local_text")


@pytest.mark.slow
def test_the_command_of_the_readme_with_the_code_of_the_artifact(place, tmp_path):
    """In a process of its own, which does not import the installed package."""
    scores = []
    for model_args in ("pretrained=base", artifact(1.0), artifact(0.6)):
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"{model_args},max_length=32"]
        command += [
            "--tasks",
            "local_text",
            "--include_path",
            str(SHIPPED_TASKS),
            "--device",
            "cpu",
            "--output_path",
            "out.json",
        ]
        done = children.run(command, tmp_path, env=os.environ | {"HF_HOME": str(place / "home")})
        assert done.returncode == 0, done.stderr
        (written,) = place.glob("out*.json")
        scores.append(json.loads(written.read_text())["results"]["local_text"]["word_perplexity,none"])
        written.unlink()
    assert scores[0] == pytest.approx(scores[1], rel=1e-5) and scores[2] != pytest.approx(scores[0], rel=1e-2)
