"""Classifiers as rungs: one artifact at two budgets answers with classes, and what it costs is that of the exits it used."""

from functools import partial

import pytest

from modeling_anee.pool import AneePool
from modeling_anee.pool.config import POLICIES, RungConfig
from modeling_anee.pool.examples import Example, read_examples
from modeling_anee.pool.loading import Loader
from modeling_anee.pool.making import make_config
from modeling_anee.pool.measuring import measure, summarise
from modeling_anee.pool.pool import NoRungError

from .pools import make_models
from .test_sequence_classification import NAMES, TEXTS, classifier
from .workshop import tiny_tokenizer, words


BUDGETS = {"early": 0.3, "late": 1.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with models, and labelled text."""
    folder = make_models(tmp_path_factory.mktemp("classifiers"))
    artifact = classifier(base_model_name_or_path="../first")
    artifact.save_pretrained(folder / "classifier", tokenizer=tiny_tokenizer())
    lines = words(160).splitlines()
    (folder / "labelled.tsv").write_text("".join(f"{line}\t{NAMES[i % 3]}\n" for i, line in enumerate(lines)))
    return folder


def configs(strict=False):
    return [RungConfig(name=name, model="classifier", energy_budget=budget, strict=strict) for name, budget in BUDGETS.items()]


def rungs(folder):
    loader = Loader(folder)
    return [loader.load(one) for one in configs()]


def make_pool(folder, strict=False):
    pytest.importorskip("simpful"), pytest.importorskip("sklearn")
    loader = Loader(folder)
    samples = measure([partial(loader.load, one) for one in configs(strict)], read_examples(folder / "labelled.tsv"))
    return AneePool(make_config(configs(strict), summarise(samples), samples, [0.1]), folder)


@pytest.fixture
def pool(made):
    return make_pool(made)


def test_a_rung_answers_as_its_model_and_pays_for_the_exit_that_it_used(made):
    early, late = rungs(made)
    assert early.model is late.model and early.model.costs.unit == "bytes"
    for rung in (early, late):
        for text in TEXTS:
            answer = rung.generate(text)
            inputs = rung.tokenizer(text, return_tensors="pt")
            output = rung.model(inputs["input_ids"], energy_budget=rung.energy_budget)
            assert answer.text == NAMES[int(output.logits.argmax())] and 1 / 3 <= answer.confidence <= 1
            layers = rung.model.costs.layers[: int(output.exits[0]), rung.model._action].sum() * rung.model.costs.total
            heads = float(rung.model.exit_costs.heads.sum())
            assert float(layers) * answer.tokens <= answer.work <= float(layers) * answer.tokens + heads
    assert sum(early.generate(text).work for text in TEXTS) < sum(late.generate(text).work for text in TEXTS)


def test_losses_are_shares_of_wrong_answers(made):
    early, late = rungs(made)
    examples = read_examples(made / "labelled.tsv")
    assert all(example.is_label and example.weight == 1 for example in examples)
    for rung in (early, late):
        wrong = sum(rung.generate(example.prompt).text != example.answer for example in examples)
        assert sum(rung.outcome(example).loss for example in examples) == wrong
    number = Example(TEXTS[0], str(NAMES.index(late.generate(TEXTS[0]).text)), "numbers", True)
    assert late.outcome(number).loss == 0.0


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_classes(pool, policy):
    output = pool.generate(TEXTS, policy=policy)
    assert set(output.texts) <= set(NAMES) and all(decision.rung in BUDGETS for decision in output.decisions)


def test_energy_is_never_over_budget(made):
    # Where a text may pass an exit, all layers count.
    for pool, lowest in ((make_pool(made, strict=True), 0.4), (make_pool(made), 1.0)):
        with pytest.raises(NoRungError, match="affords no rung"):
            pool.generate(TEXTS, lowest - 0.2, "energy")
        for budget in (lowest, 1.0):
            assert all(decision.share <= budget for decision in pool.generate(TEXTS, budget, "energy").decisions)


def test_what_a_classifier_cant_do_is_said(made, pool):
    with pytest.raises(ValueError, match="max_new_tokens is not allowed: rung 'late' is a classifier|rung 'early'"):
        pool.generate(TEXTS, max_new_tokens=3)
    with pytest.raises(NoRungError, match="it classifies text, not messages"):
        pool.generate([{"role": "user", "content": "w5"}])
    early, _ = rungs(made)
    with pytest.raises(ValueError, match="it needs texts with labels"):
        early.outcome(Example("w5", " w6", "text.txt"))
    words_rung = Loader(made).load(RungConfig(name="words", model="first"))
    with pytest.raises(ValueError, match="labelled.tsv has labels, which are for classifiers"):
        words_rung.outcome(read_examples(made / "labelled.tsv", 1)[0])
