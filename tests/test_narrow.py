"""Narrow variants: a masked full computation, sliced; alike in every family, kept in artifacts, found by a stage."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache

from modeling_anee import AneeForCausalLM
from modeling_anee.action_looks import brightness
from modeling_anee.actions import DEFAULT_TABLE, ActionTable
from modeling_anee.base_families import family_of
from modeling_anee.base_int4 import Int4Linear
from modeling_anee.base_int8 import Int8Linear
from modeling_anee.base_kernels import KERNELS_VARIABLE, LinearKernel
from modeling_anee.base_model import BaseStack
from modeling_anee.compiled_layer import CompiledAttention, CompiledFeedForward
from modeling_anee.corrections import CorrectedLinear
from modeling_anee.costs import CostTable
from modeling_anee.narrow import HEADS, NARROW, NEURONS, Orders, places_of, projected_places
from modeling_anee.pictures.depth import draw_depth
from modeling_anee.pictures.heatmap import draw_heatmap
from modeling_anee.pictures.page import page
from modeling_anee.plan_runner import attention_run, feed_forward_run
from modeling_anee.training.fit import fit
from modeling_anee.training.recipe import Recipe
from modeling_anee.training.stages.corrections import leading
from modeling_anee.training.stages.importance import directions, of_parts

from .tiny import BRIDGES, CONFIGS, FAMILIES, LAYERS, VARIANTS, tiny_base, token_ids, wrap
from .workshop import make_workshop, recipe_fields


CLOSE = {"atol": 2e-5, "rtol": 1e-4}
APART = {"full": 2e-5, "int8": 2e-3, "int4": 0.25}  # two ways to the same result, see `test_precisions.py`
NAMES = [name for name in (*CONFIGS, *VARIANTS) if name != "falcon-one_norm"]  # whose weights may not be read


def narrow_model(family: str, plan: str = "4*FULL_HALF", **fields) -> AneeForCausalLM:
    """A base under one plan of narrow variants."""
    fields = {"narrow": [*NARROW], "precisions": ["int8", "int4"], "keep_first_tokens": 0} | fields
    return wrap(tiny_base(family, "eager"), "plan", plans=[plan], **fields)


def last_maps(base: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The output map of each layer's attention, and the last one of its feed-forward."""
    family, found = family_of(base), []
    for layer in base.get_submodule(family.decoder).get_submodule(family.layers):
        names = family.feed_forward
        mlp = layer.get_submodule(names) if isinstance(names, str) else layer.get_submodule(names[-1])
        maps = [module for module in mlp.modules() if getattr(module, "weight", None) is not None and module.weight.dim() == 2]
        found.append((layer.get_submodule(f"{family.attention}.{family.output}"), maps[-1]))
    return found


def masked(base: nn.Module, model: AneeForCausalLM, variant: str) -> nn.Module:
    """The base with the inputs of these maps silenced, where a narrow variant has none."""
    for block, maps in zip(model.stack.blocks_of(variant), last_maps(base), strict=True):
        total = model.stack.blocks[0].heads // block.kv_heads * block.head_size
        kept = places_of(block.groups, total), block.neurons
        for places, module in zip(kept, maps, strict=True):

            def silence(module, given, places=places):
                mask = torch.zeros(given[0].shape[-1]).index_fill(0, places, 1.0)
                return (given[0] * mask, *given[1:])

            module.register_forward_pre_hook(silence)
    return base


@pytest.mark.parametrize("variant", ["full_half", "full_quarter"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_sliced_is_masked(name, variant):
    model, ids = narrow_model(name, f"4*{variant.upper()}"), token_ids()
    found = model(ids, energy_budget=0.0)
    assert (found.execution.actions == model.config.table.place(variant.upper())).all()
    torch.testing.assert_close(found.logits, masked(tiny_base(name, "eager"), model, variant)(ids).logits, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_what_adds_nothing_all_is_there(family):
    """A base where all that is left out adds nothing is its half."""
    base, ids = tiny_base(family, "eager"), token_ids()
    model = narrow_model(family)
    for block, maps in zip(model.stack.blocks_of("full_half"), last_maps(base), strict=True):
        total = model.stack.blocks[0].heads // block.kv_heads * block.head_size
        for places, module in zip((places_of(block.groups, total), block.neurons), maps, strict=True):
            weight = module.weight if family == "gpt2" else module.weight.T
            weight[torch.isin(torch.arange(len(weight)), places, invert=True)] = 0.0
    half = wrap(base, "plan", plans=["4*FULL_HALF"], narrow=["full_half"], keep_first_tokens=0)
    torch.testing.assert_close(half(ids, energy_budget=0.0).logits, half.base(ids).logits, **CLOSE)


@pytest.mark.parametrize("precision", APART)
@pytest.mark.parametrize("family", sorted(CONFIGS))
@torch.no_grad()
def test_scoring_is_decoding_and_rows_are_alone(family, precision):
    half = f"{precision}_half".upper()
    model, ids = narrow_model(family, f"{half}, {half}_FFN, {half}_ATTENTION, {half}", **BRIDGES), token_ids(2, 9)
    whole = model(ids, energy_budget=0.0, use_cache=False).logits
    for cache in (None, DynamicCache()):
        parts = []
        for part in ids.split((4, 1, 1, 3), dim=1):
            output = model(part, cache=cache, energy_budget=0.0)
            cache = output.cache
            parts.append(output.logits)
        assert (torch.cat(parts, dim=1) - whole).abs().max() < APART[precision]
    assert (model(ids[1:], energy_budget=0.0).logits - whole[1:]).abs().max() < APART[precision]
    torch.testing.assert_close(model(ids, energy_budget=1.0).logits, model.base(ids).logits, **CLOSE)


@pytest.mark.parametrize("family", sorted(CONFIGS))
@torch.no_grad()
def test_keys_and_values_are_those_of_the_whole_layer(family):
    """So tokens that attend with some heads, with all, or not at all, see each other's."""
    model = narrow_model(family)
    hidden = torch.randn(1, 5, 32)
    rotations = model.stack.rotations(hidden, torch.arange(5).unsqueeze(0))
    for name, (whole, _) in NARROW.items():
        for part, block, rotation in zip(model.stack.blocks_of(name), model.stack.blocks_of(whole), rotations, strict=True):
            _, keys_values = part.queries_keys_values(hidden, rotation)
            apart = {"atol": APART[whole], "rtol": 1e-4}
            torch.testing.assert_close(keys_values, block.keys_values(hidden, rotation), **apart)
            torch.testing.assert_close(part.keys_values(hidden, rotation), keys_values, **apart)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_tokens_in_narrow_and_other_variants_mix(family):
    plans = ["FULL_HALF, SKIP, FULL_HALF_FFN, PROCESS", "PROCESS, FULL_QUARTER, SKIP_FFN, FULL_HALF_ATTENTION"]
    model = wrap(tiny_base(family), "plan", plans=plans, narrow=["full_half", "full_quarter"], **BRIDGES)
    ids, budget = token_ids(2, 10), [0.5, 0.8]
    whole = model(ids, energy_budget=budget, use_cache=False)
    assert len(whole.execution.actions.unique()) > 4
    assert model.config.table.complete[whole.execution.actions[:, 0].long()].all()  # the kept first tokens
    cache, parts = None, []
    for part in ids.split((1, 5, 4), dim=1):
        output = model(part, cache=cache, energy_budget=budget)
        cache, parts = output.cache, [*parts, output.logits]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_costs_are_what_torch_counts(name):
    stack, table = BaseStack(tiny_base(name, "eager").requires_grad_(False)), DEFAULT_TABLE.with_precisions([], ["full_half"])
    costs: CostTable = stack.measure_costs("flops", table=table)
    place, tokens, hidden = table.place("FULL_HALF"), 5, torch.randn(1, 5, stack.config.hidden_size)
    for layer, block in enumerate(stack.blocks_of("full_half")):
        rotation = stack.rotations(hidden, torch.arange(tokens).unsqueeze(0))[layer]
        with FlopCounterMode(display=False) as counter:
            queries, keys_values = block.queries_keys_values(hidden, rotation)
            block.add_feed_forward(hidden, block.add_attention(hidden, queries, *keys_values.chunk(2, dim=1), None))
        scores = 4 * tokens**2 * queries.shape[1] * block.head_size
        assert counter.get_total_flops() - scores == pytest.approx(float(costs.layers[layer, place]) * costs.total * tokens)
        assert costs.layers[layer, place] < costs.layers[layer, 0]


@pytest.mark.parametrize("unit", ["bytes", "flops"])
def test_a_part_costs_less_than_all_and_half_of_the_neurons_half_of_their_bytes(unit):
    model = narrow_model("llama", cost_unit=unit)
    table, costs = model.config.table, model.costs
    for name, (whole, parts) in NARROW.items():
        own, full = (float(costs.layers[0, table.place_of(whole, one)]) for one in (name, whole))
        nothing = float(costs.layers[0, table.place_of(whole, "none")])
        norms = {"bytes": 2 * 32 * 4, "flops": 0}[unit] / costs.total
        assert own - nothing - norms == pytest.approx((full - nothing - norms) / parts, rel=0.15)
        assert costs.layers[0, table.place_of(name, whole)] < full and costs.layers[0, table.place_of(name, name)] < own
    assert table.heads == ["full", "int4", "int8"]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_compiled_kernels_do_the_same(family, monkeypatch):
    plans, ids = "INT8_HALF, INT8_QUARTER, INT8_HALF_FFN, INT8_HALF_ATTENTION", token_ids(1, 8)
    expected = narrow_model(family, plans)(ids, energy_budget=0.0).logits
    monkeypatch.setenv(KERNELS_VARIABLE, "compiled")
    model, cache, parts = (
        wrap(tiny_base(family), "plan", plans=[plans], narrow=[*NARROW], precisions=["int8", "int4"], keep_first_tokens=0),
        None,
        [],
    )
    for part in ids.split(1, dim=1):
        output = model(part, cache=cache, use_cache=True, energy_budget=0.0)
        cache, parts = output.cache, [*parts, output.logits]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=0.01, rtol=0.01)
    block = model.stack.blocks_of("int8_half")[1]
    assert isinstance(attention_run(block), CompiledAttention) and isinstance(feed_forward_run(block), CompiledFeedForward)


def test_rows_of_narrow_variants():
    table = DEFAULT_TABLE.with_precisions(["int4"], ["int4_half"])
    both, feed, attend = (table[table.place(name)] for name in ("INT4_HALF", "INT4_HALF_FFN", "INT4_HALF_ATTENTION"))
    assert (both.attention, both.feed_forward) == ("int4_half", "int4_half") and not both.is_whole and both.runs_both
    assert (feed.attention, feed.feed_forward) == ("int4", "int4_half") and feed.keys_values == "int4"
    assert (attend.attention, attend.feed_forward) == ("int4_half", "int4")
    assert {table.names[table.whole[table.place(row.name)]] for row in (both, feed, attend)} == {"INT4"}
    assert len({row.letter for row in table}) == len(table) and "int4_half" in both.meaning
    assert not table.gaps[table.place("INT4_HALF")] and ActionTable.of(table.stored()) == table


def test_places_of_a_joint_projection():
    attending = torch.tensor([2, 3])  # of four heads in two groups: the second
    assert projected_places(attending, 4, 2, 1, grouped=False).tolist() == [2, 3, 4, 5, 6, 7]
    assert projected_places(attending, 4, 2, 1, grouped=True).tolist() == [4, 5, 2, 6, 3, 7]
    assert projected_places(attending, 4, 2, 2, grouped=True).tolist() == [8, 9, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]


def test_the_most_important_come_first():
    orders, weight = Orders.of({NEURONS: torch.tensor([[3.0, 1.0, 4.0, 1.0, 5.0]])}), torch.ones(2, 5, 1)
    assert orders.shapes == {NEURONS: [1, 5]} and orders.neurons.tolist() == [[4, 2, 0, 1, 3]]
    assert orders.most_important(NEURONS, 0, 2, weight).tolist() == [0, 2, 4]
    assert orders.most_important(NEURONS, 0, 4, weight).tolist() == [2, 4]
    weight[:, 1] = 2.0
    assert orders.most_important(HEADS, 0, 4, weight).tolist() == [0, 1]  # nothing is known of them but their weights
    with pytest.raises(ValueError, match="the order of neurons of layer 0 is not one of all 4 that the base has"):
        orders.most_important(NEURONS, 0, 2, weight[:, :4])


def test_weights_that_may_not_be_read_say_so():
    base = tiny_base()
    base.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ValueError, match="variant 'full_half' is not possible: .* may not be read"):
        wrap(base, narrow=["full_half"])


@torch.no_grad()
def test_an_artifact_keeps_the_orders_and_nothing_of_the_base(tmp_path):
    base, ids = tiny_base(), token_ids()
    base.save_pretrained(tmp_path / "base")
    fields = {"narrow": ["full_half"], "plans": ["4*FULL_HALF"], "orders": {NEURONS: [LAYERS, 48], HEADS: [LAYERS, 2]}}
    model = wrap(base, "plan", base_model_name_or_path=str(tmp_path / "base"), **fields)
    before = model(ids, energy_budget=0.0).logits
    for own in model.orders.buffers():
        own.copy_(own.flip(1))
    expected = model(ids, energy_budget=0.0).logits  # made anew, since the numbers are others
    assert not torch.allclose(expected, before)
    model.save_pretrained(tmp_path / "artifact")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact", dtype="float32")
    assert torch.equal(loaded(ids, energy_budget=0.0).logits, expected)
    own = loaded._own_state()
    assert {name for name in own if "orders" in name} == {"orders.neurons", "orders.heads"}
    assert own["orders.neurons"].dtype == torch.int32 and sum(x.numel() for x in own.values()) == LAYERS * 50 + 1  # its version


def test_half_of_an_odd_number_of_groups_is_rounded_up():
    base = tiny_base("gpt2", "eager")
    block = BaseStack(base.requires_grad_(False)).blocks_of("full_quarter")[0]
    assert len(block.groups) == math.ceil(4 / 4) and len(block.neurons) == 128 // 4


def test_importance_is_the_mean_norm_of_what_each_adds():
    base = tiny_base("gpt2", "eager")
    block, x = BaseStack(base.requires_grad_(False)).blocks_of("full_half")[1], torch.randn(7, 128)
    columns = base.transformer.h[1].mlp.c_proj.weight  # [neurons, out]
    torch.testing.assert_close(of_parts(block, "mlp_1", x), x.abs().mean(dim=0) * columns.norm(dim=1))
    heads = base.transformer.h[1].attn.c_proj.weight.unflatten(0, (4, 8))
    expected = torch.einsum("nhs,hso->nho", x[:, :32].unflatten(1, (4, 8)), heads).norm(dim=-1).mean(dim=0)
    torch.testing.assert_close(of_parts(block, "output", x[:, :32]), expected)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_stage_finds_orders_that_plans_use(tmp_path, rank):
    make_workshop(tmp_path)
    sources = {part: [{"file": "text.txt", "tokens": 200}] for part in ("train", "choose")}
    stages = {
        "corrections": {"windows": 3, "rank": 2, "head_rank": 1},
        "importance": {"windows": 3, "rank": rank},
        "plans": {"windows": 1, "lowest_budget": 0.0},
    }
    anee = {"controller": "plan", "precisions": ["int4"], "narrow": ["int4_half"], "min_layers": 0, "keep_last_layers": 0}
    anee["controller_actions"] = ["INT4", "INT4_HALF_FFN", "INT4_HALF"]
    fields = recipe_fields(tmp_path, length=16, text=sources, anee=anee, stages=stages)
    fit(Recipe.model_validate(fields), tmp_path / "run", tmp_path / "data")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "artifact", dtype="float32")
    for own in model.orders.buffers():
        assert torch.equal(own.sort(dim=1).values, torch.arange(own.shape[1], dtype=torch.int32).expand_as(own))
    assert model.config.orders == {"neurons": [LAYERS, 48], "heads": [LAYERS, 2]}
    parts = {"part_output": [LAYERS, rank, 32], "part_mlp_1": [LAYERS, rank, 48]} if rank else {}
    assert {name: own for name, own in model.config.corrections.items() if name.startswith("part_")} == parts
    assert len(model.config.corrections) == 5 + len(parts) and "INT4_HALF" in " ".join(model.config.plans)


def test_the_stage_needs_narrow_variants(tmp_path):
    make_workshop(tmp_path)
    sources = {"train": [{"file": "text.txt", "tokens": 100}]}
    fields = recipe_fields(
        tmp_path, length=16, text=sources, anee={"controller": "plan"}, stages={"importance": {"windows": 2}}
    )
    with pytest.raises(ValueError, match=r"stages.importance needs narrow variants"):
        fit(Recipe.model_validate(fields), tmp_path / "run", tmp_path / "data")


@pytest.mark.parametrize("make", [LinearKernel, Int8Linear, Int4Linear])
@torch.no_grad()
def test_what_is_kept_tells_what_is_left_out_along_the_directions(make):
    torch.manual_seed(0)
    weight, inputs, bias = torch.randn(48, 64), torch.arange(0, 64, 2), torch.randn(48)
    directions = torch.linalg.qr(torch.randn(64, 3)).Q.T.contiguous()
    part = CorrectedLinear.of(make(weight[:, inputs].contiguous(), bias), weight, directions, inputs)
    x = torch.randn(20, 3) @ directions
    exact, without = x @ weight.T + bias, part.rounded(x[:, inputs])
    assert (part(x[:, inputs]) - exact).abs().max() < 0.05 < (without - exact).abs().max()
    torch.testing.assert_close(part.row(x[0, inputs]), part(x[:, inputs])[0], atol=0.05, rtol=0.02)


@pytest.mark.parametrize("precision", ["full", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@torch.no_grad()
def test_corrections_bring_narrow_layers_nearer_to_the_base_and_are_charged(family, precision):
    plan, ids = f"4*{precision}_half".upper(), token_ids(2, 24)
    plain, shapes = narrow_model(family, plan), {}
    block = plain.stack.blocks_of(f"{precision}_half")[0]
    last = f"mlp_{len(block.mlp_maps) - 1}"
    for name in ("output", last):
        shapes[f"part_{name}"] = [LAYERS, 3, 32 if name == "output" else (128 if family == "gpt2" else 48)]
    model = narrow_model(family, plan, corrections=shapes)
    inputs = {name: [[] for _ in range(LAYERS)] for name in ("output", last)}
    handles = [
        module.register_forward_pre_hook(lambda _, given, own=inputs[name][layer]: own.append(given[0].flatten(0, -2)))
        for layer, maps in enumerate(last_maps(model.base))
        for name, module in zip(("output", last), maps, strict=True)
    ]
    base = model.base(ids).logits
    for handle in handles:
        handle.remove()
    before = (plain(ids, energy_budget=0.0).logits - base).square().mean()
    for name, rows in inputs.items():
        getattr(model.corrections, f"part_{name}").copy_(torch.stack([leading(torch.cat(x), 3) for x in rows]))
    assert (model(ids, energy_budget=0.0).logits - base).square().mean() < before
    place = model.config.table.place(f"{precision}_half".upper())
    assert model.costs.layers[0, place] * model.costs.total > plain.costs.layers[0, place] * plain.costs.total


@torch.no_grad()
def test_directions_that_do_not_help_are_zeros_and_zeros_change_nothing():
    torch.manual_seed(0)
    half = BaseStack(tiny_base().requires_grad_(False)).blocks_of("int4_half")[0].mlp_maps[-1]
    along = torch.linalg.qr(torch.randn(48, 2)).Q.T
    assert directions([half], torch.randn(40, 2) @ along, 2).abs().sum() > 1.0
    noise = torch.randn(60, 48) * torch.rand(60, 48).pow(4)
    noise[::2, half.inputs] = 0.0  # nothing is seen of them, nor was before
    assert not directions([half], noise, 2).any()
    weight = half.modules[0].weight
    plain, corrected = (half.variant.map_of_part(weight, None, half.inputs, own) for own in (None, torch.zeros(2, 48)))
    torch.testing.assert_close(corrected(noise[:, half.inputs]), plain(noise[:, half.inputs]))


@torch.no_grad()
def test_full_weights_may_go_and_narrow_ones_stay():
    plans, ids = ["4*INT8", "INT8_HALF, INT8_HALF_FFN, 2*INT8_HALF_ATTENTION / int8"], token_ids()
    fields = {"precisions": ["int8"], "narrow": ["int8_half"], "plans": plans}
    expected = wrap(tiny_base(), "plan", **fields)(ids, energy_budget=0.0)
    dropped = wrap(tiny_base(), "plan", drop_full=True, **fields)
    found = dropped(ids, energy_budget=0.0)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.execution.cost, expected.execution.cost)
    assert set(dropped.stack._heads) == {"full", "int8"}


def test_traces_and_pictures_know_them(tmp_path):
    model = narrow_model("llama", "FULL_HALF, FULL_QUARTER_FFN, FULL_HALF_ATTENTION, PROCESS")
    trace = model.generate(token_ids(1), energy_budget=0.0, max_new_tokens=4, return_dict_in_generate=True).execution
    taken = [trace.table.names[place] for place in trace.actions.unique().tolist()]
    assert len(taken) == 4 and all(name in trace.render() for name in taken)
    tokens = ["x"] * trace.cost.shape[1]
    draw_heatmap(trace, tmp_path / "map.png", tokens)
    draw_depth(trace, tmp_path / "depth.png", tokens)
    assert 'data-name="FULL_HALF"' in page(trace, tokens, 3)
    table = model.config.table
    found = [brightness(table[table.place(name)].colour) for name in ("INT8", "INT8_HALF", "INT8_QUARTER")]
    assert found == sorted(found)
