"""Rungs and what they read: bits are those of the model, the same text has the same bytes under every tokenizer."""

import math

import pytest
import torch

from modeling_anee.data.windows import Window
from modeling_anee.evaluation.perplexity import score
from modeling_anee.pool.config import RungConfig
from modeling_anee.pool.examples import Example, read_examples
from modeling_anee.pool.loading import Loader
from modeling_anee.pool.making import parse_rung
from modeling_anee.pool.measuring import measure, summarise
from modeling_anee.pool.rungs import glance_of

from .pools import RUNGS, examples, make_models
from .tiny import tiny_base
from .workshop import words


TEXT = "w3 w4 w5 w6 w7"


@pytest.fixture(scope="module")
def rungs(tmp_path_factory):
    """Loaded rungs by name."""
    folder = make_models(tmp_path_factory.mktemp("rungs"))
    loader = Loader(folder)
    return {one.name: loader.load(one) for one in (parse_rung(rung, folder, "float32") for rung in RUNGS)}


@pytest.mark.parametrize("name", ["low", "words", "letters-int8", "letters"])
def test_a_reading_is_what_the_model_says(rungs, name):
    rung = rungs[name]
    reading = rung.read(TEXT)
    ids = rung.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    scores = score(rung.model, [Window(ids[0], 1)], rung.energy_budget)
    assert float(reading.bits.sum()) == pytest.approx(float(scores.nll[0]) / math.log(2), rel=1e-5)
    assert float(reading.work.sum()) == pytest.approx(float(scores.cost[0]) * rung.model.costs.total)
    assert reading.tokens == ids.shape[1] and reading.ends[-1] == len(TEXT)
    assert reading.dearest >= float(reading.work.sum()) / reading.tokens * (1 - 1e-6)
    assert ((0 < reading.sure) & (reading.sure <= 1)).all() and (reading.bits >= 0).all()


def test_a_glance_is_of_the_prompt_alone(rungs):
    for rung in rungs.values():
        assert glance_of(rung.read(TEXT), "w3 w4 w5") == pytest.approx(rung.glance("w3 w4 w5"), rel=1e-5)


def test_a_plan_is_what_every_token_follows_and_a_strict_budget_holds_for_every_token(rungs):
    plan, low = rungs["letters-int8"], rungs["low"]
    assert plan.read(TEXT).dearest == pytest.approx(plan.energy_budget * plan.model.costs.total)
    assert plan.energy_budget < 0.4 and low.model.config.budget_mode == "strict"


def test_confidence_is_that_of_the_new_tokens(rungs):
    rung = rungs["words"]
    answer = rung.generate(TEXT, with_confidence=True, max_new_tokens=3, do_sample=False)
    assert 0 < answer.confidence <= 1 and rung.generate(TEXT, max_new_tokens=3, do_sample=False).confidence is None
    assert answer.work == pytest.approx(rung.model.costs.total * answer.tokens)


def test_prompt_and_answer_share_a_texts_bits(rungs):
    for rung in rungs.values():
        example = Example("w3 w4", " w5 w6 w7", "text")
        outcome, reading = rung.outcome(example), rung.read(TEXT)
        prompt = glance_of(reading, example.prompt).bits_per_byte * len(example.prompt)
        assert outcome.loss + prompt == pytest.approx(float(reading.bits.sum()))


def test_figures_of_a_pool_are_sums_over_samples(rungs):
    samples = measure([lambda rung=rung: rung for rung in rungs.values()], examples(6))
    assert [sample.text for sample in samples] == [example.prompt for example in examples(6)]
    for name, measured in summarise(samples).items():
        outcomes = [sample.outcomes[name] for sample in samples]
        assert measured.loss == pytest.approx(sum(o.loss for o in outcomes) / sum(sample.weight for sample in samples))
        assert measured.bytes_per_token * sum(o.tokens for o in outcomes) == pytest.approx(sum(o.work for o in outcomes))
        assert measured.bytes_per_token <= measured.most_bytes_per_token * (1 + 1e-6) and len(measured.losses) == 2


def test_weights_that_are_no_safetensors_are_refused(tmp_path):
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save(base.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        Loader(tmp_path).load(RungConfig(name="a", model="base"))


def test_a_folder_that_is_not_there_is_said_to_be(tmp_path):
    for model in (str(tmp_path / "nowhere"), "./nowhere"):
        with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
            Loader(tmp_path).load(RungConfig(name="a", model=model))


def test_a_plan_is_not_for_an_artifact(tmp_path):
    make_models(tmp_path)
    with pytest.raises(ValueError, match="rung 'a' has a plan, and artifact is an artifact"):
        Loader(tmp_path).load(RungConfig(name="a", model="artifact", plan="4*INT8"))


def test_examples_of_lines_and_of_records(tmp_path):
    (tmp_path / "text.txt").write_text("short\n" + words(200))
    found = read_examples(tmp_path / "text.txt", 4, prompt=10, answer=8)
    assert len(found) == 4
    for one in found:
        assert one.answer.startswith(" ") and len(one.prompt) >= 10 and len(one.answer) >= 8 and one.source == "text.txt"
    (tmp_path / "pairs.jsonl").write_text('{"question": "w3?", "answer": "w4"}\n\n')
    assert read_examples(tmp_path / "pairs.jsonl") == [Example("w3?\n", "w4", "pairs.jsonl")]
    (tmp_path / "pairs.jsonl").write_text('{"question": "w3?"}\n')
    with pytest.raises(ValueError, match="line 1: it must be a JSON record with the fields question and answer"):
        read_examples(tmp_path / "pairs.jsonl")
    (together,) = read_examples(tmp_path / "text.txt")  # no line is long enough
    assert "\n" in together.prompt and len(together.prompt) >= 300 and len(together.answer) >= 300
    (tmp_path / "text.txt").write_text("short\n")
    with pytest.raises(ValueError, match="has no records and less than 600 characters"):
        read_examples(tmp_path / "text.txt")
