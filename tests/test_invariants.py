"""What must always hold, for every family and controller, with bridges and translators of random weights.

Numbers are those of `docs/design.md`; 8 is in `test_base_loading`, 10 in `test_lossless`.
"""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from modeling_anee import AneeForCausalLM, hardware
from modeling_anee.actions import EXIT, PROCESS, SKIP

from .tiny import BRIDGES, CONFIGS, CONTROLLERS, LAYERS, calibration_of_gates, tiny_base, token_ids, wrap


BUDGETS = (0.0, 0.4, 0.6, 0.85, 1.0)
PLANS = ["PSFE", "PEEE", "PFSP", "FSPF", "PSPE", "PFPS", "SPFP"]
NARROW = {"narrow": ["full_half"], "plans": [*PLANS, "PABP", "CAFP"]}  # A, B, C: layers, and parts of one, by half
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
ALL_FAMILIES = sorted(CONFIGS)
FAMILIES = ("gemma3_text", "gpt2", "gpt_neox", "llama")  # four anatomies; `test_base_families` has them all
few = settings(max_examples=60, deadline=None, derandomize=True)
flops = st.sampled_from([0.0, hardware.GATHERING_FLOPS["cpu"]])  # for tiny models: gather always, and never


@functools.cache
def model_of(family: str, controller: str, mode: str = "average") -> AneeForCausalLM:
    fields = {
        "budget": {"exit_budget_threshold": 0.5},
        "confidence": {"confidence_threshold": 0.93, "exit_layers": [1, 2]},
        "gated": {"exit_layers": [2, 3]},
        "learned": {"decision_interval": 2},
        "plan": NARROW,
        "refine": {"plans": PLANS, "refine_from": 1},
        "routed": NARROW,
    }
    return wrap(tiny_base(family), controller, budget_mode=mode, **fields[controller], **BRIDGES)


every_model = pytest.mark.parametrize("family, controller", [(f, c) for f in FAMILIES for c in CONTROLLERS])
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_model
def test_1_full_budget_is_the_base(family, controller):
    model, ids = model_of(family, controller), token_ids()
    output = model(ids, energy_budget=1.0)
    torch.testing.assert_close(output.logits, model.base(ids).logits, **CLOSE)
    assert (output.execution.cost == 1.0).all() and (output.execution.actions == PROCESS).all()


@pytest.mark.parametrize("controller", ["gated", "learned", "routed"])
def test_1_an_untrained_controller_changes_nothing(controller):
    untrained = AneeForCausalLM.from_base(tiny_base(), controller=controller, **BRIDGES)
    ids = token_ids()
    torch.testing.assert_close(untrained(ids, energy_budget=0.1).logits, untrained.base(ids).logits, **CLOSE)


@every_model
def test_2_every_layer_caches_keys_and_values_of_every_token(family, controller):
    model, ids = model_of(family, controller), token_ids()
    output = model(ids, energy_budget=[0.5, 0.65], output_hidden_states=True)
    assert len(output.execution.actions.unique()) >= {"plan": 4, "gated": 3, "learned": 3, "routed": 3}.get(controller, 2)
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    for layer, block in enumerate(model.stack.blocks):
        entering = output.hidden_states[layer]
        keys, values = block.keys_values(entering, model.stack.rotations(entering, positions)[layer]).chunk(2, dim=1)
        torch.testing.assert_close(output.past_key_values.layers[layer].keys, keys, **CLOSE)
        torch.testing.assert_close(output.past_key_values.layers[layer].values, values, **CLOSE)


@few
@given(data=st.data())
def test_3_scoring_is_decoding(data):
    """Any cut of a sequence into steps gives the logits, actions and costs of one forward, with any cache."""
    hardware.GATHERING_FLOPS["cpu"] = data.draw(flops)  # the fixture puts it back
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
    trace = cache.execution_log.trace
    assert torch.equal(trace.actions, whole.execution.actions)
    torch.testing.assert_close(trace.cost, whole.execution.cost)


@few
@given(data=st.data())
def test_4_rows_do_not_depend_on_their_batch_or_padding(data):
    hardware.GATHERING_FLOPS["cpu"] = data.draw(flops)  # the fixture puts it back
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
    hardware.GATHERING_FLOPS["cpu"] = data.draw(flops)  # the fixture puts it back
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
    assert torch.equal(cache.execution_log.trace.actions, expected.execution.actions)


@every_model
def test_6_costs_add_up(family, controller):
    model, ids = model_of(family, controller), token_ids()
    for budget in (0.4, 0.95):
        trace = model(ids, energy_budget=budget).execution
        assert torch.equal(trace.actions[:, 0], torch.zeros_like(trace.actions[:, 0])) and (trace.cost[:, 0] == 1.0).all()
        actions, deciding = trace.actions[:, 1:], trace.cost[:, 1:] - model.costs.of_plans(trace.actions[:, 1:])
        expected = torch.zeros_like(deciding)
        if controller == "learned":
            pairs = zip(model.controller.probes, model.controller.policies, strict=True)
            for (start, _), pair in zip(model.controller.segments, pairs, strict=True):
                asked = actions[..., start - 1] != EXIT
                expected += asked * model.costs.of_module(torch.nn.ModuleList(pair))
        if controller == "gated":
            expected += deciding_of_gates(model.controller, actions)
        if controller == "refine":  # what ran first is thrown away from there on
            kind, refined = model.controller, trace.refined[:, 1:]
            expected += refined * (model.costs.of_actions(kind.first[kind.start :], kind.start) + model.costs.head)
        if controller == "routed":
            expected += model.costs.of_module(model.controller.predictor)
        if controller == "confidence":  # nobody asks who cannot go on, so at least who went on did
            question = model.costs.head + model.costs.of_module(model.bridges.of_exit(1))
            asked = (deciding / question).round()
            went_on = sum((actions[..., start] == PROCESS).long() for start, _ in model.controller.segments)
            assert (asked >= went_on).all() and (asked <= went_on + 1).all()
            expected = asked * question
        torch.testing.assert_close(deciding, expected, atol=1e-6, rtol=0)


def deciding_of_gates(controller, actions):
    """Exit gates of tokens that are there still, and routers of those that stay."""
    stays = actions != controller.leave
    gates = sum(stays[..., layer - 1] for layer in controller.asked_exits)
    return gates * controller.gate_cost + stays[..., controller.gated_layers].sum(dim=-1) * controller.router_cost


@every_family
def test_6_translators_are_charged_once_where_they_run(family):
    """Token by token, at the last layer's EXIT; never where a token stays."""
    model = wrap(tiny_base(family), plans=["PSEE"], **BRIDGES)
    trace = model(token_ids(1), energy_budget=0.0).execution
    process, skip, leave, _ = model.costs.layers.unbind(dim=1)
    bridge, translator = (model.costs.of_module(module) for module in (model.bridges.of_skip(1), model.bridges.of_exit(2)))
    bare = wrap(tiny_base(family), plans=["PSEE"]).costs.layers[:, SKIP]
    torch.testing.assert_close(skip, bare + bridge)
    torch.testing.assert_close(leave, bare + translator * torch.tensor([0.0, 0.0, 0.0, 1.0]))
    expected = float(process[0] + bare[1:].sum()) + bridge + translator + model.costs.head
    assert trace.cost[0, 1:].tolist() == pytest.approx([expected] * 11)


@pytest.mark.usefixtures("always_gather")
@every_family
# Where tokens of one forward differ, bridges run for all of them, since gathering would cost more.
@pytest.mark.parametrize("steps, bridges", [(1, {}), (12, BRIDGES)])
def test_6_skipped_work_is_not_run(family, steps, bridges):
    """The FLOPs of linear maps that run are those that the trace claims: nothing is computed and thrown away."""
    model = wrap(tiny_base(family), "plan", cost_unit="flops", **NARROW, **bridges)
    ids = token_ids(1)
    for budget in (0.35, 0.45, 0.6, 1.0):
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
        assert linear / model.costs.total == pytest.approx(cost, rel=1e-6)


@every_model
def test_7_a_lower_budget_never_costs_more_and_is_kept(family, controller):
    model = model_of(family, controller)
    if controller == "learned":  # by its price, which it has where it is calibrated
        wide = {"budgets": [0.05, 0.95], "settings": [400.0, -400.0]}
        model = wrap(model.base, controller, calibration=wide, decision_interval=2, **BRIDGES)
    if controller == "gated":
        model = wrap(model.base, controller, exit_layers=[2, 3], **BRIDGES)
        model.config.calibration = calibration_of_gates(model.config, (0.05, 0.95), (400.0, 0.5))
        model.controller.bind(model.costs)
    if controller == "refine":
        right = {"budgets": [0.6, 1.0], "settings": [4.0, 3.2]}
        model = wrap(model.base, controller, calibration=right, plans=PLANS, refine_from=1, **BRIDGES)
    ids = token_ids(2, 100)
    budgets = [step / 20 for step in range(21)]
    traces = [model(ids, energy_budget=budget, use_cache=False).execution for budget in budgets]
    costs = [trace.mean_cost for trace in traces]
    assert costs == sorted(costs) and costs[0] < costs[-2]
    if controller in ("plan", "budget"):
        for budget, cost in zip(budgets, costs, strict=True):
            assert abs(cost - max(budget, traces[0].floor)) <= 0.02
    if controller == "confidence":
        for budget, trace in zip(budgets, traces, strict=True):
            assert (trace.cost[:, model.controller.keep_first :] <= max(budget, trace.floor) + 1e-6).all()


@every_model
def test_7_a_strict_budget_is_kept_by_every_token(family, controller):
    model, ids = model_of(family, controller, "strict"), token_ids(2, 20)
    for budget in (0.0, 0.3, 0.5, 0.7, 0.9, 0.99):
        output = model(ids, energy_budget=budget)
        assert (output.execution.cost <= max(budget, output.execution.floor) + 1e-6).all()
    parts = [model(ids[:, :1], energy_budget=0.99)]
    parts.append(model(ids[:, 1:], energy_budget=0.99, past_key_values=parts[0].past_key_values))
    torch.testing.assert_close(torch.cat([part.logits for part in parts], dim=1), output.logits, **CLOSE)
    assert (model(ids, energy_budget=1.0).execution.cost == 1.0).all()


def test_9_no_randomness_of_our_own():
    model, ids = model_of("llama", "learned"), token_ids()
    state = torch.random.get_rng_state()
    model(ids, energy_budget=0.5)
    assert torch.equal(torch.random.get_rng_state(), state)
