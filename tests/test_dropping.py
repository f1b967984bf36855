"""A base whose full weights were dropped: what is left runs as before, and what is gone is refused by name."""

import copy

import pytest
import torch

from modeling_anee import AneeForCausalLM
from modeling_anee.base_dropped import DroppedWeight

from .tiny import BRIDGES, CONFIGS, FAMILIES, LAYERS, tiny_base, token_ids, wrap


GREEDY = {"max_new_tokens": 4, "do_sample": False}
UNTIED = "qwen2"
FIELDS = {
    "precisions": ["int8", "int4"],
    "plans": [f"{LAYERS}*INT8 / int8", "INT8, INT4_INT8, INT4_SKIP_FFN, SKIP_INT4 / int8"],
}
GONE = "full weights.*dropped"


def dropped_of(base, **fields) -> AneeForCausalLM:
    return wrap(base, drop_full=True, **(FIELDS | BRIDGES | fields))


# In 8 bits alone, in which a row is computed as the same one among many: a router then decides alike.
ROUTES = {
    "precisions": ["int8"],
    "plans": [f"2*PROCESS, {LAYERS - 2}*INT8 / int8", f"{LAYERS}*INT8 / int8", "INT8, SKIP_INT8, INT8_SKIP_FFN, INT8 / int8"],
    "min_layers": 1,
    "router_budgets": [0.2, 0.0],
    "calibration": {"budgets": [0.15, 0.3], "settings": [3.0, -1.0]},
}


def lost(base) -> set[str]:
    return {name for name, weight in base.named_parameters() if isinstance(weight, DroppedWeight)}


@pytest.mark.parametrize("family", [*CONFIGS, "llama-biases", "opt-norm_after", "granite-biases", "falcon-multi_query"])
@torch.no_grad()
def test_what_is_left_runs_as_it_did_before(family):
    base, ids = tiny_base(family), token_ids(2, 7)
    model, expected = dropped_of(copy.deepcopy(base)), wrap(base, **FIELDS, **BRIDGES)
    weights = {
        name
        for name, weight in base.named_parameters()
        if weight.dim() == 2 and "norm" not in name and (".layers." in name or ".h." in name)
    }
    assert lost(model.base) - {"lm_head.weight", "embed_out.weight"} == weights
    for budget, close in ((model.controller.ceiling, 1e-5), (0.0, 0.25)):  # many rows of 4 bits run in another kernel
        one, other = (each(ids, energy_budget=budget) for each in (model, expected))
        torch.testing.assert_close(one.logits, other.logits, atol=close, rtol=1e-5)
        torch.testing.assert_close(one.execution.cost, other.execution.cost)
    found, tokens = (each.generate(ids, energy_budget=model.controller.ceiling, **GREEDY) for each in (model, expected))
    assert torch.equal(found, tokens)
    assert torch.equal(model.costs.layers, expected.costs.layers) and model.costs.heads == expected.costs.heads


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_router_chooses_among_what_is_left_as_it_did_before(family):
    base, ids = tiny_base(family), token_ids(2, 20)
    expected = wrap(copy.deepcopy(base), "routed", **ROUTES, **BRIDGES)
    model = wrap(base, "routed", drop_full=True, **ROUTES, **BRIDGES)
    controller = model.controller
    assert controller.ceiling == controller.top == expected.controller.top and controller.floor == expected.controller.floor
    assert torch.equal(controller.plans, expected.controller.plans) and model.costs.gone == {"full"}
    budgets = [controller.ceiling, (controller.floor + controller.top) / 2, 0.0]
    for budget in budgets:
        one, other = (each(ids, energy_budget=budget) for each in (model, expected))
        torch.testing.assert_close(one.logits, other.logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(one.execution.actions, other.execution.actions)
        torch.testing.assert_close(one.execution.cost, other.execution.cost)
        found, tokens = (each.generate(ids, energy_budget=budget, **GREEDY) for each in (model, expected))
        assert torch.equal(found, tokens)
    assert len(model(ids, energy_budget=budgets[1]).execution.actions.flatten(0, 1).unique(dim=0)) > 1  # it does choose
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=f"energy_budget=1 is not possible: .*{GONE}"):
            call(ids, energy_budget=1.0)


@torch.no_grad()
def test_a_strict_router_without_full_weights_keeps_every_token_in_its_budget():
    model, ids = wrap(tiny_base(), "routed", drop_full=True, budget_mode="strict", **ROUTES, **BRIDGES), token_ids(2, 20)
    for budget in (model.controller.ceiling, (model.controller.floor + model.controller.top) / 2):
        assert (model(ids, energy_budget=budget).execution.cost <= budget + 1e-6).all()
    assert model(ids).execution.mean_cost == pytest.approx(model.controller.ceiling)


def test_a_budget_that_needs_what_is_gone_is_refused_with_the_largest():
    model, ids = dropped_of(tiny_base()), token_ids()
    largest = model.controller.ceiling
    assert largest == pytest.approx(model.costs.of_plans(*plan_of(model, FIELDS["plans"][0])).item())
    for call in (model, model.generate):
        for budget in (1.0, largest + 1e-3, [0.1, 0.9]):
            with pytest.raises(ValueError, match=f"energy_budget=.* is not possible: .*{GONE}.*at most 0.{int(largest * 1e4)}"):
                call(ids, energy_budget=budget)
    with pytest.raises(ValueError, match="prompt_energy_budget=1 is not possible"):
        model.generate(ids, energy_budget=0.1, prompt_energy_budget=1.0)
    model.generate(ids, energy_budget=largest, budget_feedback=1.0, **GREEDY)


def plan_of(model, plan) -> tuple[torch.Tensor, torch.Tensor]:
    table = model.config.table
    return torch.tensor(table.plan(plan, LAYERS), dtype=torch.uint8), torch.tensor(table.head_of(plan))


def test_the_default_budget_is_the_largest_and_is_not_saved(tmp_path, caplog):
    tiny_base().save_pretrained(tmp_path / "base")
    AneeForCausalLM.from_base(tmp_path / "base", controller="plan", **FIELDS).save_pretrained(tmp_path / "artifact")
    model, ids = AneeForCausalLM.from_pretrained(tmp_path / "artifact", drop_full=True), token_ids()
    assert model(ids).execution.mean_cost == pytest.approx(model.controller.ceiling)
    assert model.generate(ids, return_dict_in_generate=True, **GREEDY).execution.mean_cost == pytest.approx(
        model.controller.ceiling
    )
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "artifact" / "config.json").read_text()
    whole = AneeForCausalLM.from_pretrained(tmp_path / "again")
    assert whole(ids).execution.mean_cost == 1.0
    torch.testing.assert_close(whole(ids, energy_budget=0.0).logits, model(ids, energy_budget=0.0).logits, atol=0.25, rtol=0)


def test_the_base_by_itself_is_refused_and_so_is_whatever_would_change_it(tmp_path):
    base, ids = tiny_base(), token_ids()
    model = dropped_of(base)
    calls = [
        lambda: base(ids),
        lambda: base.generate(ids, **GREEDY),
        lambda: wrap(base),
        lambda: copy.deepcopy(model),
        lambda: model.to(torch.bfloat16),
        lambda: base.model.layers[0].mlp.down_proj.weight.sum(),
        lambda: model.stack.blocks[0].feed_forward(torch.ones(1, 2, 32)),
        lambda: model.stack.blocks_of("full")[0].qkv.row(torch.ones(32)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=GONE):
            call()
    before = model(ids, energy_budget=0.0).logits
    assert torch.equal(model.to("cpu", torch.float32)(ids, energy_budget=0.0).logits, before)
    with pytest.raises(ValueError, match=GONE):
        base.save_pretrained(tmp_path)
    base.model.norm.weight = torch.nn.Parameter(torch.ones(32), requires_grad=False)
    with pytest.raises(ValueError, match=GONE):
        model(ids, energy_budget=0.0)


@torch.no_grad()
def test_given_actions_run_unless_they_need_what_is_gone():
    base, ids = tiny_base(UNTIED), token_ids()
    expected, model = wrap(copy.deepcopy(base), **FIELDS, **BRIDGES), dropped_of(base)
    table = model.config.table
    actions = torch.full((*ids.shape, LAYERS), table.place("INT4"), dtype=torch.uint8)
    output, whole = model(ids, actions=actions), expected.executor.run(*expected.begin(ids), given=actions)[0]
    logits = expected.head_logits(expected.stack.final_norm(whole), output.execution.head)
    torch.testing.assert_close(output.logits, logits, atol=0.25, rtol=0)
    assert (output.execution.head == table.heads.index("int8")).all()
    for name in ("PROCESS", "SKIP", "EXIT", "SKIP_FFN"):
        actions[0, 3:, 2:] = table.place(name)
        with pytest.raises(ValueError, match=f"actions has {name}.*which is not possible.*were dropped"):
            model(ids, actions=actions)


@pytest.mark.parametrize("family, plan, gone", [(UNTIED, "/ int8", True), (UNTIED, "", False), ("gpt2", "/ int8", False)])
@torch.no_grad()
def test_the_head_goes_unless_it_is_needed_or_is_the_embeddings(family, plan, gone):
    base, ids = tiny_base(family), token_ids()
    model = dropped_of(base, plans=[f"{LAYERS}*INT8 {plan}"])
    assert isinstance(base.get_output_embeddings().weight, DroppedWeight) == gone == ("full" in model.costs.gone_heads)
    assert model(ids).execution.mean_cost == pytest.approx(model.controller.ceiling)
    if gone:
        with pytest.raises(ValueError, match=GONE):
            model.stack.logits(torch.ones(1, 32))


@torch.no_grad()
def test_padding_decides_nothing():
    model, ids, mask = dropped_of(tiny_base(UNTIED)), token_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, :3] = 0
    whole = model(ids, attention_mask=mask, energy_budget=0.0)
    alone = model(ids[1:, 3:], energy_budget=0.0)
    torch.testing.assert_close(whole.logits[1, 3:], alone.logits[0], atol=0.25, rtol=0)
    padding = model(ids[1:, :2], attention_mask=mask[1:, :2], use_cache=True)
    more = model(ids[1:, 2:], attention_mask=mask[1:], cache=padding.cache, energy_budget=0.0)
    torch.testing.assert_close(more.logits[0, 1:], alone.logits[0], atol=0.25, rtol=0)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"controller": "learned", "precisions": ["int8"]}, "with controller='learned'.*it must be 'plan' or 'routed'"),
        ({"controller": "routed", "precisions": None}, "every plan runs layers, or their keys and values, in full"),
        (
            {"controller": "routed", "plans": ["4*INT8", "3*INT8, SKIP"]},
            "it chooses among plans, and '3.INT8, SKIP' runs layers",
        ),
        (
            {"controller": "routed", "plans": ["3*INT8, SKIP_INT8"]},
            "nothing out runs layers in full; give one such as '4.INT8'",
        ),
        ({"precisions": None}, "every plan runs layers, or their keys and values, in full"),
        ({"plans": ["3*INT8, PROCESS"]}, "every plan runs layers"),
        ({"plans": ["3*INT8, SKIP"]}, "every plan runs layers"),
    ],
)
def test_what_can_do_nothing_without_full_weights_is_refused_and_loses_nothing(fields, message):
    base, ids = tiny_base(), token_ids()
    before = base(ids).logits
    fields = {"precisions": ["int8"], "controller": "plan"} | fields
    with pytest.raises(ValueError, match=f"drop_full=True is not possible.*{message}"):
        AneeForCausalLM.from_base(base, drop_full=True, **fields)
    assert torch.equal(base(ids).logits, before)


def test_a_base_with_a_feed_forward_that_can_not_be_read_loses_nothing():
    base, ids = tiny_base("gpt2"), token_ids()
    for name in ("c_fc", "c_proj"):
        getattr(base.transformer.h[2].mlp, name).register_forward_hook(lambda module, args, output: output)
    before = base(ids).logits
    with pytest.raises(ValueError, match="drop_full=True is not possible: int4, int8 can't run all feed-forwards"):
        dropped_of(base)
    assert torch.equal(base(ids).logits, before)


@torch.no_grad()
def test_what_runs_itself_stays():
    base, ids = tiny_base(), token_ids()
    base.model.layers[1].self_attn.o_proj.register_forward_hook(lambda module, args, output: output)
    model = dropped_of(base)
    assert "model.layers.1.self_attn.o_proj.weight" not in lost(base) and "model.layers.0.self_attn.o_proj.weight" in lost(base)
    assert model(ids, energy_budget=0.0).logits.isfinite().all()


@torch.no_grad()
def test_only_what_the_plans_run_in_is_kept():
    base, ids = tiny_base(UNTIED), token_ids()
    expected = wrap(copy.deepcopy(base), **FIELDS)
    model = dropped_of(base, plans=[f"{LAYERS}*INT4 / int8", "4*PROCESS"], **dict.fromkeys(BRIDGES, 0))
    assert torch.equal(model.costs.layers, expected.costs.layers) and model.costs.heads == expected.costs.heads
    assert model.costs.gone == {"full", "int8"} and model.costs.gone_heads == {"full", "int4"}
    assert model(ids).execution.mean_cost == pytest.approx(model.controller.ceiling)
    for variant in ("full", "int8"):
        with pytest.raises(ValueError, match=GONE):
            model.stack.blocks_of(variant)[0].feed_forward(torch.ones(1, 2, 32))
    with pytest.raises(ValueError, match="actions has INT8, which is not possible"):
        model(ids, actions=torch.full((*ids.shape, LAYERS), model.config.table.place("INT8"), dtype=torch.uint8))
    with pytest.raises(ValueError, match=GONE):
        model.stack.head_of("int4")(torch.ones(1, 32))
