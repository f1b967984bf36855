"""`AneePool`: rungs over different tokenizers serve, budgets hold, failures are reported and the next rung serves."""

import shutil

import pytest
import torch

from modeling_anee.pool import AneePool, PoolConfig
from modeling_anee.pool.config import POLICIES, RungConfig
from modeling_anee.pool.pool import NoRungError

from .pools import make_models, make_pool


SHORT = {"max_new_tokens": 3, "do_sample": False}
PROMPTS = ["w3 w4 w5", "w9 w10 w11 w12 w13 w3 w4 w6 7"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with models and the file of a pool."""
    folder = make_models(tmp_path_factory.mktemp("pool"))
    make_pool(folder)
    return folder


@pytest.fixture
def pool(made):
    return AneePool.from_pretrained(made)


def without(pool, **changes):
    """The same pool with other fields."""
    return AneePool(pool.config.model_copy(update=changes), pool._loader._folder)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_and_says_which_rung_and_why(pool, policy):
    output = pool.generate(PROMPTS, policy=policy, **SHORT)
    assert len(output.texts) == len(output.decisions) == len(output.executions) == 2
    for decision, trace in zip(output.decisions, output.executions, strict=True):
        assert decision.rung in pool.config.measured and decision.policy == policy and decision.reason
        assert decision.rung in decision.summary() and decision.bytes_per_token > 0 and not decision.failures
        own = trace.mean_cost * pool.rung(decision.rung).model.costs.total
        looked = decision.passes
        assert decision.bytes_per_token > own if looked else decision.bytes_per_token == pytest.approx(own)


def test_a_rung_gives_what_its_model_gives_alone(pool):
    output = pool.generate(PROMPTS[0], policy="energy", **SHORT)
    rung = pool.rung(output.decisions[0].rung)
    inputs = rung.tokenizer(PROMPTS[0], return_tensors="pt")
    ids = rung.model.generate(input_ids=inputs["input_ids"], energy_budget=rung.energy_budget, **SHORT)
    assert output.texts[0] == rung.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("energy_budget", [0.35, 0.6, 0.98, 1.0])
def test_energy_is_never_over_budget_and_takes_the_most_accurate(pool, energy_budget):
    output = pool.generate(PROMPTS, energy_budget, "energy", **SHORT)
    measured = pool.config.measured
    for decision in output.decisions:
        assert decision.share <= energy_budget + 1e-6
        affordable = [one for one in measured.values() if one.most_bytes_per_token <= energy_budget * pool.dearest * 1.000001]
        assert measured[decision.rung].loss == min(one.loss for one in affordable)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_budget_counts_what_runs_before(pool, policy):
    for decision in pool.generate(PROMPTS, 0.95, policy, **SHORT).decisions:
        assert decision.share <= 0.95 * (2.5 if decision.passes else 1)  # a look is at another tokenizer's number of tokens


def test_a_budget_that_affords_nothing_is_an_error_that_says_what_rungs_cost(pool):
    with pytest.raises(NoRungError, match="affords no rung under energy: .* letters-int8 0.302"):
        pool.generate(PROMPTS, 0.1, "energy", **SHORT)
    with pytest.raises(ValueError, match="energy_budget=2 is not allowed"):
        pool.generate(PROMPTS, 2, **SHORT)
    with pytest.raises(ValueError, match="policy='best' is not allowed: it must be one of energy"):
        pool.generate(PROMPTS, policy="best", **SHORT)
    with pytest.raises(ValueError, match="policy='cascade' is not possible"):
        without(pool, cascade=None).generate(PROMPTS, policy="cascade", **SHORT)


def test_rungs_are_loaded_when_they_are_needed_and_share_their_base(pool):
    assert not pool._loader._models
    pool.generate(PROMPTS, 0.35, "energy", **SHORT)
    assert len(pool._loader._models) == 1
    assert pool.rung("letters").model.base is pool.rung("letters-int8").model.base


def test_a_rung_that_cant_be_loaded_is_reported_and_the_next_serves(made, tmp_path, said, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # where it is looked for next
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    shutil.rmtree(folder / "artifact")
    pool = AneePool.from_pretrained(folder)
    pool.generate(PROMPTS, policy="energy", **SHORT)
    output = pool.generate(PROMPTS, policy="energy", **SHORT)
    assert all(decision.rung == "words" for decision in output.decisions)
    assert all("rung low can't be loaded" in decision.failures[0] for decision in output.decisions)
    assert len([line for line in said if "rung low can't be loaded" in line]) == 1  # it is not tried again


@pytest.mark.parametrize("policy", POLICIES)
def test_a_rung_without_memory_is_reported_and_the_next_serves(pool, monkeypatch, policy, said):
    best = pool.generate(PROMPTS[0], policy=policy, **SHORT).decisions[0].rung
    rung = pool.rung(best)
    monkeypatch.setattr(rung.model, "generate", out_of_memory)
    decision = pool.generate(PROMPTS[0], policy=policy, **SHORT).decisions[0]
    assert decision.rung != best and f"rung {best} failed" in decision.failures[0] and said
    monkeypatch.undo()
    assert pool.generate(PROMPTS[0], policy=policy, **SHORT).decisions[0].rung == best  # the next request may be shorter


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("no more")


def test_without_the_rung_that_looks_what_is_known_of_rungs_is_left(pool, monkeypatch):
    monkeypatch.setattr(pool.rung(pool.config.glance).model, "forward", out_of_memory)
    decision = pool.generate(PROMPTS[0], policy="learned", **SHORT).decisions[0]
    assert decision.reason.startswith("the most accurate of") and decision.failures


def test_an_error_of_the_users_is_no_failure_of_a_rung(pool):
    with pytest.raises(ValueError, match="no_such_argument"):
        pool.generate(PROMPTS[0], no_such_argument=1)


def test_a_cascade_asks_the_dear_rung_where_the_cheap_one_is_not_sure(pool):
    cascade = pool.config.cascade
    for threshold, rung, passes in ((0.0, cascade.cheap, []), (1.1, cascade.dear, [cascade.cheap])):
        sure = without(pool, cascade=cascade.model_copy(update={"threshold": threshold}))
        decision = sure.generate(PROMPTS[0], policy="cascade", **SHORT).decisions[0]
        assert decision.rung == rung and decision.passes == passes
    assert "below 1.1" in decision.reason


def test_messages_go_to_rungs_with_a_chat_template(pool):
    messages = [{"role": "user", "content": "w5 w6"}]
    with pytest.raises(NoRungError, match="its tokenizer has no chat template for messages"):
        pool.generate(messages, 0.35, "energy", **SHORT)  # affords only letters-int8
    (answer,) = pool(messages, **SHORT)
    assert answer["generated_text"][0] == messages[0] and answer["generated_text"][1]["role"] == "assistant"
    assert answer["rung"] in ("low", "words") and answer["reason"]


def test_as_a_pipeline_the_prompt_comes_first(pool):
    answers = pool(PROMPTS, policy="energy", **SHORT)
    texts = pool.generate(PROMPTS, policy="energy", **SHORT).texts
    assert [answer["generated_text"] for answer in answers] == [p + t for p, t in zip(PROMPTS, texts, strict=True)]


def test_a_rung_that_was_not_measured_is_refused():
    with pytest.raises(ValueError, match="rung 'a' has no entry in measured"):
        AneePool(PoolConfig(rungs=[RungConfig(name="a", model="b")]))
