"""`learned` with precisions: variants in every layer, the head by the budget, budgets kept, and what it is trained on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_anee import AneeForCausalLM
from modeling_anee.actions import PROCESS
from modeling_anee.controller_learned import allowed_actions, leaving_action, segments_of
from modeling_anee.training.fit import fit
from modeling_anee.training.ladder import ladder_of
from modeling_anee.training.recipe import Recipe

from .test_stages import ANEE, STAGES
from .tiny import BRIDGES, FAMILIES, LAYERS, tiny_base, token_ids, wrap
from .workshop import make_workshop, recipe_fields


APART = 0.25  # int4: a few rows run in a kernel that rounds to bfloat16
WIDE = {"budgets": [0.05, 0.95], "settings": [4000.0, -4000.0]}
few = settings(max_examples=25, deadline=None, derandomize=True)


def model_of(family: str = "llama", **fields) -> AneeForCausalLM:
    return wrap(tiny_base(family), "learned", precisions=["int8", "int4"], **{"decision_interval": 2, **BRIDGES, **fields})


def test_every_layer_has_the_variants_that_run_it_whole_and_decided_ones_all():
    config = model_of(min_layers=2, keep_last_layers=1).config
    names = [{config.table.names[a] for a, has in enumerate(row) if has} for row in allowed_actions(config)]
    assert names[0] == names[1] == names[3] == {"PROCESS", "INT8", "INT4", "INT8_INT4", "INT4_INT8"}
    assert names[2] >= {"SKIP", "SKIP_INT4", "INT4_SKIP_FFN", "EXIT_INT4"} and not names[2] & {"EXIT", "EXIT_INT8"}
    assert config.table.names[leaving_action(config)] == "EXIT_INT4"
    assert segments_of(config) == [(0, 2), (2, 4)]
    skips = model_of(min_layers=1, controller_actions=["SKIP_INT4"]).config
    assert segments_of(skips) == [(1, 3)]


@few
@given(data=st.data())
def test_strict_never_costs_more_than_the_budget(data):
    limits = {"min_layers": data.draw(st.integers(0, LAYERS)), "keep_last_layers": data.draw(st.integers(0, LAYERS))}
    actions = data.draw(st.sampled_from([None, ["INT4"], ["SKIP_INT4"], ["INT8", "EXIT", "EXIT_INT4"]]))
    interval = data.draw(st.integers(1, LAYERS))
    model = model_of(budget_mode="strict", decision_interval=interval, controller_actions=actions, **limits)
    ids = token_ids(1, 20, seed=data.draw(st.integers(0, 20)))
    for budget in (0.0, 0.2, 0.4, 0.7, 0.9):
        trace = model(ids, energy_budget=budget).execution
        assert (trace.cost <= max(budget, trace.floor) + 1e-6).all()
        assert (trace.cost >= trace.floor - 1e-6).all()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_invariants(family):
    model, ids, budgets = model_of(family, calibration=WIDE), token_ids(3, 10), [0.9, 0.5, 0.2]
    full = model(ids, energy_budget=1.0)
    torch.testing.assert_close(full.logits, model.base(ids).logits, atol=1e-5, rtol=1e-4)
    whole = model(ids, energy_budget=budgets)
    assert len(whole.execution.actions.unique()) > 3 and whole.execution.head[1:].unique().tolist() == [2]
    cache, parts = None, []
    for token in ids.split(1, dim=1):
        parts.append(model(token, cache=cache, use_cache=True, energy_budget=budgets))
        cache = parts[-1].cache
    trace = cache.execution_log.trace
    same = (trace.actions == whole.execution.actions).flatten(1).all(dim=1)
    for row in range(3):  # signals differ by the rounding of 4 bits, so a decision between equals may
        if same[row]:
            decoded = torch.cat([part.logits for part in parts], dim=1)[row]
            torch.testing.assert_close(decoded, whole.logits[row], atol=APART, rtol=0)
    assert same.any() and torch.equal(trace.head, whole.execution.head)
    costs = [model(ids, energy_budget=budget, use_cache=False).execution.mean_cost for budget in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert costs == sorted(costs)
    deciding = whole.execution.cost - model.costs.of_plans(whole.execution.actions, whole.execution.head)
    most = sum(
        model.costs.of_module(torch.nn.ModuleList(pair))
        for pair in zip(model.controller.probes, model.controller.policies, strict=True)
    )
    assert (deciding >= -1e-6).all() and (deciding <= most + 1e-6).all()


def test_a_ladder_goes_down_through_the_precisions_of_the_plans_and_ends_over_bridges():
    model = model_of(min_layers=1, keep_last_layers=1)
    ladder, table = ladder_of(model), model.config.table
    names = [[table.names[a] for a in row] for row in ladder.actions.tolist()]
    assert names[0] == names[3] == ["PROCESS", "INT8", "INT4", "INT4"]
    assert names[1] == names[2] == ["PROCESS", "INT8", "INT4", "SKIP_INT4"]
    assert (ladder.savings >= 0).all() and ladder.gaps.sum() == 2
    scores = ladder.scores(torch.tensor([[0.0, -3.0, 2.0, 0.0]]).where(ladder.of_gaps > 0, torch.inf))
    assert (scores.diff(dim=-1) > 0)[scores[..., 1:].isfinite()].all()
    all_but_gaps = ladder.taken(scores, torch.tensor([-3.0]))
    heads = torch.tensor([ladder.head])
    assert float(model.costs.of_plans(all_but_gaps, heads)) == pytest.approx(ladder.whole)
    assert float(model.costs.of_plans(ladder.taken(scores, torch.tensor([9.0])), heads)) == pytest.approx(ladder.floor)
    assert (ladder.taken(scores, torch.tensor([-99.0])) == PROCESS).all()


@pytest.mark.parametrize("rank", [4, 0])
def test_every_stage_runs_with_precisions(tmp_path, rank):
    make_workshop(tmp_path)
    named = ["traces", "probe", "supervised", "reinforcement", "calibration"]
    stages = {name: STAGES[name] for name in (["closed_form", *named] if rank else named)}
    stages["calibration"] = {"windows": 3, "budgets": [0.2, 0.6]}
    anee = ANEE | {"precisions": ["int8", "int4"], "bridge_rank": rank, "ffn_bridge_rank": 0, "exit_translator_rank": 0}
    anee["controller_actions"] = ["INT8", "INT4", "SKIP_INT4"]
    del anee["exit_layers"]
    recipe = Recipe.model_validate(recipe_fields(tmp_path, length=16, anee=anee, stages=stages, text=texts()))
    fit(recipe, tmp_path / "run", tmp_path / "data")
    model = AneeForCausalLM.from_pretrained(tmp_path / "run" / "artifact")
    table = model.config.calibration
    assert table["cost"] == sorted(table["cost"])
    trace = model(token_ids(2, 16), energy_budget=0.4).execution
    assert {"INT8", "INT4"} & {model.config.table.names[a] for a in trace.actions.unique().tolist()}


def texts() -> dict:
    parts = {"train": {"tokens": 400, "stop": 0.6}, "calibrate": {"tokens": 400, "start": 0.7}}
    return {part: [{"file": "text.txt", **fields}] for part, fields in parts.items()}
