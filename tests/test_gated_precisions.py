"""`gated` with fewer bits: fixed plans where nothing is left out, routers and gates below; the invariants."""

import functools

import pytest
import torch

from modeling_anee import AneeForCausalLM

from .tiny import BRIDGES, FAMILIES, assert_alike, calibration_of_gates, tiny_base, token_ids, wrap


CLOSE = {"atol": 2e-3, "rtol": 0}
# In 4 bits kernels round to bfloat16 for few rows alone, so decisions could differ: compared in 8 bits and in full.
CHOICES = [
    {},
    {"precisions": ["int8"]},
    {"precisions": ["int8"], "gated_variants": ["full", "int8", "none"], "gated_head": "int8"},
]


@functools.cache
def model_of(family: str = "llama", mode: str = "average", choice: int = 1) -> AneeForCausalLM:
    model = wrap(tiny_base(family), "gated", budget_mode=mode, exit_layers=[2, 3], **CHOICES[choice], **BRIDGES)
    model.config.calibration = calibration_of_gates(model.config, (between(model, 0.2), between(model, 0.9)))
    model.controller.bind(model.costs)
    return model


def between(model: AneeForCausalLM, share: float) -> float:
    """A budget between the cheapest way and the fixed plans."""
    controller = model.controller
    low = controller.head_cost + controller.rest[0]
    return low + share * (controller.top - low)


@torch.no_grad()
def test_what_a_budget_affords_without_leaving_anything_out_is_as_of_fixed_plans(monkeypatch):
    model = model_of()
    plan = wrap(model.base, "plan", precisions=["int8"], plans=["4*INT8 / int8"], **BRIDGES)
    gated = wrap(model.base, "gated", precisions=["int8"], plans=["4*INT8 / int8"], **BRIDGES)
    monkeypatch.setattr(gated.controller, "scores", None)  # nobody asks
    ids = token_ids(2, 9)
    for budget in (gated.controller.top, 0.6, [0.99, 0.3]):
        assert_alike(gated, plan, ids, budget)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["average", "strict"])
@pytest.mark.parametrize("choice", range(len(CHOICES)))
def test_scoring_is_decoding_with_budgets_by_token(family, mode, choice):
    model, ids = model_of(family, mode, choice), token_ids(2, 24)
    some = [between(model, 0.5), 0.9, between(model, 0.3), model.controller.top, 1.0, 0.0]
    budgets = torch.tensor([some * 4, some[::-1] * 4], dtype=torch.float64)
    whole = model(ids, energy_budget=budgets, use_cache=False)
    assert len(whole.execution.actions.unique()) >= 2
    for row in range(2):
        for size in (1, 5):
            parts, cache = [], None
            for part, budget in zip(ids[row : row + 1].split(size, 1), budgets[row : row + 1].split(size, 1), strict=True):
                parts.append(model(part, energy_budget=budget, past_key_values=cache, use_cache=True))
                cache = parts[-1].past_key_values
            torch.testing.assert_close(torch.cat([part.logits for part in parts], dim=1)[0], whole.logits[row], **CLOSE)
            trace = cache.execution_log.trace
            assert torch.equal(trace.actions[0], whole.execution.actions[row])
            torch.testing.assert_close(trace.cost[0], whole.execution.cost[row])


@torch.no_grad()
@pytest.mark.parametrize("choice", range(len(CHOICES)))
def test_rows_do_not_depend_on_their_batch_or_padding(choice):
    model, ids, lengths = model_of(choice=choice), token_ids(4, 12), [12, 5, 9, 1]
    budgets = [between(model, 0.4), 0.5, 0.0, between(model, 0.8)]
    mask = torch.stack([torch.arange(12) >= 12 - length for length in lengths]).long()
    together = model(ids, attention_mask=mask, position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0), energy_budget=budgets)
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, 12 - length :], energy_budget=budgets[row])
        torch.testing.assert_close(together.logits[row, 12 - length :], alone.logits[0], **CLOSE)
        assert torch.equal(together.execution.actions[row, 12 - length :], alone.execution.actions[0])


@torch.no_grad()
@pytest.mark.parametrize("choice", range(len(CHOICES)))
def test_costs_add_up_and_strict_budgets_are_kept(choice):
    for mode in ("average", "strict"):
        model, ids = model_of(mode=mode, choice=choice), token_ids(2, 60)
        controller = model.controller
        for share in (-0.1, 0.1, 0.4, 0.7, 0.95):
            trace = model(ids, energy_budget=between(model, share), use_cache=False).execution
            if mode == "strict":
                assert (trace.cost <= max(between(model, share), controller.floor) + 1e-6).all()
            asked = torch.ones_like(trace.valid)
            asked[:, : controller.keep_first] = False
            stays = trace.actions != controller.leave
            deciding = stays[..., controller.gated_layers].sum(dim=-1) * controller.router_cost
            deciding += sum(stays[..., layer - 1] for layer in controller.asked_exits) * controller.gate_cost
            expected = model.costs.of_plans(trace.actions, trace.head) + asked * deciding
            torch.testing.assert_close(trace.cost.double(), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_generation_is_that_of_one_forward():
    model, ids = model_of(), token_ids(1, 6)
    for capacity in (0.3, 0.6, 1.0):
        found = model.generate(ids, max_new_tokens=8, do_sample=False, capacity=capacity)
        logits = model(found[:, :-1], capacity=capacity).logits[0, 5:]
        assert torch.equal(logits.argmax(dim=-1), found[0, 6:])


@torch.no_grad()
def test_three_variants_are_all_taken_and_dearer_where_more_would_be_lost():
    model, ids = model_of.__wrapped__(choice=2), token_ids(2, 60)
    del model.config.calibration["shares"]  # without, thresholds stay where they are
    model.controller.bind(model.costs)
    output = model(ids, energy_budget=between(model, 0.5), output_hidden_states=True)
    controller, actions = model.controller, output.execution.actions
    for layer in controller.gated_layers:
        here = actions[:, 1:, layer]
        scores = controller.scores(layer, output.hidden_states[layer])[:, 1:]
        taken = [scores[here == place] for place in controller.choices]
        for dear, cheap in zip(taken[:-1], taken[1:], strict=True):
            assert not len(dear) or not len(cheap) or dear.min() > cheap.max()
    assert set(controller.choices.tolist()) <= set(actions.unique().tolist())


def test_a_price_gives_each_layer_the_thresholds_at_which_losses_are_worth_their_cost():
    controller = model_of(choice=2).controller
    saved = controller.costs[:, :-1] - controller.costs[:, 1:]
    routers, exits = controller.at_price(-1.0)
    middle = controller.relative[0].double().exp()
    first = (-1.0 + saved[:, 0].log() - middle.log()).exp() * middle  # loss of the middle variant there
    torch.testing.assert_close(first, torch.exp(torch.tensor(-1.0, dtype=torch.float64)) * saved[:, 0])
    second = -1.0 + saved[:, 1].log() - (1 - middle).log()
    torch.testing.assert_close(routers[1], second)
    torch.testing.assert_close(routers[0], torch.maximum(-1.0 + saved[:, 0].log() - middle.log(), second))
    assert exits.shape == (2,)
    torch.testing.assert_close(controller.at_price(0.0)[0], routers + 1.0)


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    base = type(tiny_base()).from_pretrained(tmp_path / "base")
    model, ids = wrap(base, "gated", **CHOICES[2], **BRIDGES), token_ids()
    model.controller.relative.fill_(-1.0)
    model.save_pretrained(tmp_path / "artifact")
    again = AneeForCausalLM.from_pretrained(tmp_path / "artifact")
    assert torch.equal(again.controller.relative, model.controller.relative)
    assert again.config.gated_variants == ["full", "int8", "none"] and again.config.calibration == model.config.calibration
    for budget in (0.5, 0.8):
        assert torch.equal(again(ids, energy_budget=budget).logits, model(ids, energy_budget=budget).logits)


@torch.no_grad()
def test_the_head_of_tokens_that_are_decided_about_may_be_cheaper():
    model = model_of(choice=2)
    controller, heads = model.controller, model.config.table.heads
    trace = model(token_ids(1, 24), energy_budget=[between(model, 0.5)]).execution
    kept = controller.keep_first
    assert [heads[place] for place in trace.head[0, :kept]] == ["full"] * kept
    assert {heads[place] for place in trace.head[0, kept:]} == {"int8"}
    expected = model.costs.of_plans(trace.actions, trace.head)
    assert (trace.cost[0, kept:] > expected[0, kept:] - 1e-6).all()  # what routers cost comes on top


@torch.no_grad()
def test_attention_runs_in_the_variant_of_the_feed_forward():
    model = model_of(choice=2)
    taken = model(token_ids(2, 24), energy_budget=between(model, 0.5)).execution.actions.unique().tolist()
    assert {model.config.table.names[place] for place in taken} <= {"PROCESS", "INT8", "INT8_SKIP_FFN", "EXIT"}
