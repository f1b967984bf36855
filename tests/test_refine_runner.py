"""`refine` where it runs: what it is, token by token; that several tokens at once are the same; what is computed twice."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modeling_anee import AneeForCausalLM
from modeling_anee.budget import Dial
from modeling_anee.cache import AneeCache

from .tiny import BRIDGES, LAYERS, tiny_base, token_ids, wrap


PRECISE = {"precisions": ["int8", "int4"]}
BUDGET = 0.7
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def refining(family: str = "llama", setting: float | None = None, **fields) -> AneeForCausalLM:
    """A model of which some tokens run again; or from a doubt on, whatever the budget, if it has a setting."""
    model = wrap(tiny_base(family), "refine", **({"refine_from": 1} | BRIDGES | fields))
    if setting is not None:
        model.controller.dial = Dial(None, neutral=setting)
    return model


def half_refining(ids: torch.Tensor, **fields) -> AneeForCausalLM:
    """One of which about half of these tokens run again, whatever the budget."""
    model = refining(**fields)
    logits = model(ids, actions=model.controller.first.expand(*ids.shape, -1).contiguous()).logits
    doubts = model.controller.doubt(logits[0]).sort().values
    return refining(setting=float(doubts[len(doubts) // 2 - 1 : len(doubts) // 2 + 1].mean()), **fields)


def followed(model: AneeForCausalLM, ids: torch.Tensor, from_layer: int):
    """What `refine` is: every token alone in the first plan, then, if it is in doubt, from a layer on again."""
    cache, logits, refined = AneeCache(model.stack.blocks), [], []
    first, again = model.controller.first, model.controller.again
    whole = again.clone()
    whole[:from_layer] = first[:from_layer]
    for place, token in enumerate(ids[0]):
        actions = torch.zeros_like(first) if place < model.config.keep_first_tokens else first
        found = model(token.view(1, 1), cache=cache, actions=actions.view(1, 1, -1)).logits[0]
        doubt = float(model.controller.doubt(found))
        refined.append(place >= model.config.keep_first_tokens and doubt > float(model.controller.dial.settings[0]))
        if refined[-1]:
            cache.crop(-1)
            found = model(token.view(1, 1), cache=cache, actions=whole.view(1, 1, -1)).logits[0]
        logits.append(found)
    return torch.cat(logits), refined


@pytest.mark.parametrize("from_layer", range(LAYERS + 1))
@pytest.mark.parametrize("together", [True, False])
@torch.no_grad()
def test_it_is_one_run_and_where_in_doubt_another_over_it(from_layer, together):
    ids = token_ids(1, 24)
    model = half_refining(ids, refine_from=from_layer)
    expected, refined = followed(model, ids, from_layer)
    assert 3 < sum(refined) < 21
    cache = AneeCache(model.stack.blocks)
    parts = [ids] if together else ids.split(1, dim=1)
    found = torch.cat([model(part, cache=cache, energy_budget=0.5).logits for part in parts], dim=1)
    torch.testing.assert_close(found[0], expected, **CLOSE)
    assert cache.execution_log.trace.refined[0].tolist() == refined


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("setting", [-1000.0, 1000.0])
@torch.no_grad()
def test_if_all_run_again_from_the_start_it_is_the_second_plan_and_if_none_the_first(family, setting):
    model, ids = refining(family, setting, refine_from=0, keep_first_tokens=0, **PRECISE), token_ids(2, 15)
    all_run = setting < 0
    actions = model.controller.again if all_run else model.controller.first
    plan = wrap(model.base, "plan", plans=[model.config.table.text(actions.tolist(), 1)], **PRECISE, **BRIDGES)
    found = model(ids, energy_budget=0.0)
    torch.testing.assert_close(found.logits, plan(ids, actions=actions.expand(2, 15, -1)).logits, atol=0.05, rtol=0.05)
    assert (found.execution.refined == all_run).all() and (found.execution.actions == actions).all()


@pytest.mark.parametrize("kind", ["ours", "dynamic", "static"])
@torch.no_grad()
def test_any_cut_into_steps_gives_the_same_in_caches_of_transformers_too(kind):
    ids, budget = token_ids(2, 20), 0.5
    model = half_refining(ids)
    config = model.base.config
    caches = {"dynamic": lambda: DynamicCache(config=config), "static": lambda: StaticCache(config=config, max_cache_len=32)}
    whole = model(ids, energy_budget=budget, use_cache=False)
    assert 0.1 < whole.execution.refined_share < 0.9
    cache = caches.get(kind, lambda: AneeCache(model.stack.blocks))()
    found = [model(part, energy_budget=budget, cache=cache).logits for part in ids.split([7, 1, 1, 5, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), whole.logits, **CLOSE)


@torch.no_grad()
def test_weights_of_fewer_bits_are_decided_about_alike_alone_and_together():
    ids = token_ids(1, 20)
    model = half_refining(ids, precisions=["int8"])
    whole, cache = model(ids, energy_budget=0.0, use_cache=False), AneeCache(model.stack.blocks)
    found = [model(part, energy_budget=0.0, cache=cache).logits for part in ids.split(1, dim=1)]
    assert 0.1 < whole.execution.refined_share < 0.9
    assert torch.equal(cache.execution_log.trace.refined, whole.execution.refined)
    assert torch.equal(cache.execution_log.trace.head, whole.execution.head)
    torch.testing.assert_close(torch.cat(found, dim=1), whole.logits, atol=0.1, rtol=0.05)


def test_a_cache_that_cant_be_read_is_refused():
    class Hidden(DynamicCache):
        pass

    model, cache = refining(), Hidden()
    model(token_ids(1, 3), cache=cache, energy_budget=1.0)
    for layer in cache.layers:
        layer.__class__ = type("Packed", (type(layer),), {})
    with pytest.raises(ValueError, match="can't run with a Hidden of Packed"):
        model(token_ids(1, 3), cache=cache, energy_budget=BUDGET)


@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_a_token_that_runs_once_asks_the_head_once_and_one_that_runs_again_twice(rows, monkeypatch):
    asked = []
    model = refining()
    head = model.stack.head_of
    monkeypatch.setattr(model.stack, "head_of", lambda name: lambda hidden: asked.append(hidden.numel()) or head(name)(hidden))
    cache = model(token_ids(rows, 5), energy_budget=BUDGET).cache
    for setting, runs in ((1000.0, 1), (-1000.0, 2)):
        model.controller.dial = Dial(None, neutral=setting)
        asked.clear()
        trace = model(token_ids(rows, 1), energy_budget=BUDGET, cache=cache).execution
        assert sum(asked) == runs * rows * model.config.hidden_size
        spent = model.controller.cost + (runs - 1) * model.controller.charge
        assert trace.cost[:, 0].tolist() == pytest.approx([spent] * rows)


@torch.no_grad()
def test_only_some_layers_of_some_tokens_run_again(monkeypatch):
    """Sweeps go on from the first token that was wrong, and settle."""
    ids = token_ids(1, 40)
    model = half_refining(ids, refine_from=2)
    queries, run = [], model.executor.layers.run
    monkeypatch.setattr(
        model.executor.layers, "run", lambda hidden, *rest: queries.append(hidden.shape[1]) or run(hidden, *rest)
    )
    trace = model(ids, energy_budget=0.5).execution
    assert 0.1 < trace.refined_share < 0.9
    first, sweep, *later = queries
    assert first == sweep == 40 and 0 < len(later) < 10 and later[-1] < 2 * 40


def test_generation_tells_and_an_artifact_remembers(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    calibration = {"budgets": [0.3, 0.9], "settings": [1.0, -9.0]}
    fields = {"refine_plans": ["PSSP", "PPPP"], "refine_from": 2, "confidence_metric": "margin", "calibration": calibration}
    model = AneeForCausalLM.from_base(tmp_path / "base", controller="refine", **fields)
    model.save_pretrained(tmp_path / "artifact")
    loaded = AneeForCausalLM.from_pretrained(tmp_path / "artifact")
    options = {"max_new_tokens": 12, "energy_budget": BUDGET, "return_dict_in_generate": True}
    found, expected = (each.generate(token_ids(2), **options) for each in (loaded, model))
    assert torch.equal(found.sequences, expected.sequences)
    trace = found.execution
    assert torch.equal(trace.refined, expected.execution.refined) and trace.refined.any()
    assert f"{trace.refined_share:.0%} of the tokens ran again" in trace.summary()
    assert trace.rows(torch.tensor([1])).refined.shape == (1, trace.refined.shape[1])
