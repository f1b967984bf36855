"""What must always hold, for every family and controller (DESIGN's invariants 1-7 and 9)."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from modeling_anee import AneeForCausalLM
from modeling_anee.actions import Action

from .tiny import CONFIGS, CONTROLLERS, LAYERS, tiny_base, token_ids, wrap


BUDGETS = (0.0, 0.4, 0.6, 0.85, 1.0)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
ALL_FAMILIES = sorted(CONFIGS)
few = settings(max_examples=60, deadline=None)


@functools.cache
def model_of(family: str, controller: str) -> AneeForCausalLM:
    fields = {"exit_budget_threshold": 0.5} if controller == "budget" else {}
    if controller == "confidence":
        fields = {"confidence_threshold": 0.93, "exit_layers": [1, 2]}
    if controller == "plan":
        fields = {"plans": ["PSSP", "PPSS", "PSPE", "PPPS", "SPPP"]}
    return wrap(tiny_base(family), controller, **fields)


every_model = pytest.mark.parametrize("family, controller", [(f, c) for f in ALL_FAMILIES for c in CONTROLLERS])


@every_model
def test_1_full_budget_is_the_base(family, controller):
    model, ids = model_of(family, controller), token_ids()
    output = model(ids, energy_budget=1.0)
    torch.testing.assert_close(output.logits, model.base(ids).logits, **CLOSE)
    assert (output.execution.cost == 1.0).all() and (output.execution.actions == Action.PROCESS).all()


def test_1_an_untrained_learned_controller_changes_nothing():
    untrained = AneeForCausalLM.from_base(tiny_base(), controller="learned")
    ids = token_ids()
    torch.testing.assert_close(untrained(ids, energy_budget=0.1).logits, untrained.base(ids).logits, **CLOSE)


@every_model
def test_2_every_layer_caches_keys_and_values_of_every_token(family, controller):
    model, ids = model_of(family, controller), token_ids()
    output = model(ids, energy_budget=0.6, output_hidden_states=True)
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    for layer, block in enumerate(model.stack.blocks):
        entering = output.hidden_states[layer]
        keys, values = block.keys_values(entering, model.stack.rotations(entering, positions)[layer])
        torch.testing.assert_close(output.past_key_values.layers[layer].keys, keys, **CLOSE)
        torch.testing.assert_close(output.past_key_values.layers[layer].values, values, **CLOSE)


@few
@given(data=st.data())
def test_3_scoring_is_decoding(data):
    """Any cut of a sequence into steps gives the logits, actions and costs of one forward, with any cache."""
    model = model_of(data.draw(st.sampled_from(ALL_FAMILIES)), data.draw(st.sampled_from(CONTROLLERS)))
    budget = data.draw(st.sampled_from(BUDGETS))
    ids = token_ids(2, 10, seed=data.draw(st.integers(0, 50)))
    whole = model(ids, energy_budget=budget, use_cache=False)
    cuts = sorted(data.draw(st.sets(st.integers(1, 9))))
    own, config = data.draw(st.booleans()), model.config.get_text_config()
    cache = None if own else DynamicCache(config=config)
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, 10], strict=True):
        parts.append(model(ids[:, start:stop], past_key_values=cache, energy_budget=budget))
        cache = parts[-1].past_key_values
    torch.testing.assert_close(torch.cat([part.logits for part in parts], dim=1), whole.logits, **CLOSE)
    trace = cache.layers[-1].trace
    assert torch.equal(trace.actions, whole.execution.actions)
    torch.testing.assert_close(trace.cost, whole.execution.cost)


@few
@given(data=st.data())
def test_4_rows_do_not_depend_on_their_batch_or_padding(data):
    model = model_of(data.draw(st.sampled_from(ALL_FAMILIES)), data.draw(st.sampled_from(CONTROLLERS)))
    lengths = data.draw(st.lists(st.integers(1, 8), min_size=2, max_size=4))
    budgets = [data.draw(st.sampled_from(BUDGETS)) for _ in lengths]
    left = data.draw(st.booleans())
    ids = token_ids(len(lengths), max(lengths), seed=data.draw(st.integers(0, 50)))
    columns = torch.arange(ids.shape[1])
    mask = torch.stack([columns >= ids.shape[1] - n if left else columns < n for n in lengths]).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    batch = model(ids, attention_mask=mask, position_ids=positions, energy_budget=budgets)
    for row, budget in enumerate(budgets):
        real = mask[row].bool()
        alone = model(ids[row : row + 1, real], energy_budget=budget)
        torch.testing.assert_close(batch.logits[row, real], alone.logits[0], **CLOSE)
        assert torch.equal(batch.execution.actions[row, real], alone.execution.actions[0])
        assert torch.equal(batch.execution.valid[row], real)
        torch.testing.assert_close(batch.execution.row_cost[row], alone.execution.row_cost[0])


@few
@given(data=st.data())
def test_5_cache_operations_keep_everything_true(data):
    """After any program of cache operations, going on equals scoring the rows that the cache then holds."""
    model = model_of(data.draw(st.sampled_from(ALL_FAMILIES)), data.draw(st.sampled_from(CONTROLLERS)))
    budget = data.draw(st.sampled_from(BUDGETS))
    # Without a config: transformers' sliding layers can't be cropped once their window is full.
    cache = None if data.draw(st.booleans()) else DynamicCache()
    rows = token_ids(2, 5, seed=data.draw(st.integers(0, 50)))
    cache = model(rows, past_key_values=cache, energy_budget=budget).past_key_values
    for number in range(data.draw(st.integers(1, 5))):
        operation = data.draw(st.sampled_from(["go on", "crop", "reorder", "repeat", "select"]))
        if operation == "go on":
            more = token_ids(len(rows), data.draw(st.integers(1, 3)), seed=number)
            rows = torch.cat((rows, more), dim=1)
            model(more, past_key_values=cache, energy_budget=budget)
        elif operation == "crop" and rows.shape[1] > 1:
            count = data.draw(st.integers(1, rows.shape[1] - 1))
            rows = rows[:, :-count]
            cache.crop(-count)
        elif operation == "repeat" and len(rows) < 5:
            rows = rows.repeat_interleave(2, dim=0)
            cache.batch_repeat_interleave(2)
        elif operation in ("reorder", "select"):
            index = torch.tensor(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4)))
            if operation == "reorder":
                index = index.repeat(len(rows))[: len(rows)]
            rows = rows[index]
            (cache.reorder_cache if operation == "reorder" else cache.batch_select_indices)(index)
    last = token_ids(len(rows), 2, seed=99)
    expected = model(torch.cat((rows, last), dim=1), energy_budget=budget)
    output = model(last, past_key_values=cache, energy_budget=budget)
    torch.testing.assert_close(output.logits, expected.logits[:, -2:], **CLOSE)
    assert torch.equal(cache.layers[-1].trace.actions, expected.execution.actions)


@every_model
def test_6_costs_add_up(family, controller):
    model, ids = model_of(family, controller), token_ids()
    trace = model(ids, energy_budget=0.95).execution
    actions = model.costs.of_actions(trace.actions).float()
    if controller in ("plan", "budget"):
        torch.testing.assert_close(trace.cost, actions)
        return
    # The rest is what deciding cost: a whole number of questions per token.
    question = model.costs.head if controller == "confidence" else model.costs.of_module(model.controller)
    questions = (trace.cost - actions) / question
    torch.testing.assert_close(questions, questions.round(), atol=1e-3, rtol=0)
    questions = questions.round()
    assert questions.min() >= 0 and 0 < questions.max() <= len(model.controller.segments)


# gemma2 has no sdpa: its attention scores are matrix products that this count can't tell from linear maps.
@pytest.mark.parametrize("family", [family for family in ALL_FAMILIES if family != "gemma2"])
@pytest.mark.parametrize("steps", [1, 12])
def test_6_skipped_work_is_not_run(family, steps):
    """The FLOPs of linear maps that run are those that the trace claims: nothing is computed and thrown away."""
    model = wrap(tiny_base(family), "plan", cost_unit="flops", plans=["PSPE", "PSSP"])
    ids = token_ids(1)
    for budget in (0.45, 0.6, 1.0):
        linear = 0
        cache, cost = None, 0.0
        for part in ids.split(ids.shape[1] // steps, dim=1):
            with FlopCounterMode(display=False) as counter:
                output = model(part, past_key_values=cache, energy_budget=budget)
                cache = output.past_key_values
                _ = [layer.keys for layer in cache.layers[:LAYERS]]  # whatever was deferred
            counts = counter.get_flop_counts()["Global"]
            linear += sum(flops for name, flops in counts.items() if "attention" not in str(name))
            cost += float(output.execution.cost.double().sum())
        head = model.costs.head * ids.shape[1]
        assert linear / model.costs.stack == pytest.approx(cost + head, rel=1e-6)


@every_model
def test_7_a_lower_budget_never_costs_more_and_is_kept(family, controller):
    model = model_of(family, controller)
    ids = token_ids(2, 100)
    budgets = [step / 20 for step in range(21)]
    traces = [model(ids, energy_budget=budget, use_cache=False).execution for budget in budgets]
    costs = [trace.mean_cost for trace in traces]
    if controller in ("plan", "budget"):
        assert costs == sorted(costs)
        for budget, cost in zip(budgets, costs, strict=True):
            assert abs(cost - max(budget, traces[0].floor)) <= 0.02
    if controller == "confidence":
        assert all((trace.cost <= max(budget, trace.floor) + 1e-6).all() for budget, trace in zip(budgets, traces, strict=True))


def test_9_no_randomness_of_our_own():
    model, ids = model_of("llama", "learned"), token_ids()
    state = torch.random.get_rng_state()
    model(ids, energy_budget=0.5)
    assert torch.equal(torch.random.get_rng_state(), state)
