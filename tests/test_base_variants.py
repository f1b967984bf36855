"""A variant that is added by one registration only is known to everything: costs, traces, pictures, plans, configuration."""

import pytest
import torch
import torch.nn.functional as F

from modeling_anee import AneeForCausalLM
from modeling_anee import base_variants as variants
from modeling_anee.actions import DEFAULT_TABLE, FULL, NONE, PROCESS, ActionTable
from modeling_anee.base_variants import Variant, register_variant, variant_named
from modeling_anee.pictures.depth import draw_depth
from modeling_anee.pictures.heatmap import draw_heatmap
from modeling_anee.pictures.page import page

from .tiny import BRIDGES, LAYERS, tiny_base, token_ids, wrap


ROWS = [
    *DEFAULT_TABLE.stored(),
    {"name": "HALF", "attention": "half", "feed_forward": "half"},
    {"name": "HALF_FFN", "attention": FULL, "feed_forward": "half"},
    {"name": "HALF_ATTENTION", "attention": "half", "feed_forward": NONE},
]
PLANS = [
    ["PROCESS", "HALF", "HALF_FFN", "PROCESS"],
    ["HALF", "HALF_ATTENTION", "HALF", "PROCESS"],
    "PROCESS, SKIP, HALF_ATTENTION, HALF",
    "HALF, 3*EXIT",
]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


class HalfLinear:
    """Weights in bfloat16, sums in float32."""

    def __init__(self, weight, bias):
        self.weight, self.bias = weight.bfloat16(), bias

    @property
    def weight_bytes(self):
        return self.weight.nbytes

    def rows(self, start, stop):
        return HalfLinear(self.weight[start:stop], None if self.bias is None else self.bias[start:stop])

    def __call__(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias)


@pytest.fixture(autouse=True)
def half(monkeypatch):
    monkeypatch.setattr(variants, "VARIANTS", dict(variants.VARIANTS))
    register_variant(Variant("half", HalfLinear))


def model_of(family: str = "llama", **fields) -> AneeForCausalLM:
    return wrap(tiny_base(family), actions=ROWS, plans=PLANS, **BRIDGES, **fields)


def test_costs_know_it():
    model = model_of()
    table, layers = model.config.table, model.costs.layers
    linear = sum(p.numel() for p in model.base.model.layers[0].parameters() if p.dim() == 2) * LAYERS
    process, half = (float(layers[:, table.place(name)].sum()) * model.costs.total for name in ("PROCESS", "HALF"))
    assert process - half == pytest.approx(2 * linear)  # two bytes less for each weight
    assert layers.shape == (LAYERS, len(ROWS))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3", "olmo2", "cohere"])
@pytest.mark.parametrize("budget", [0.0, 0.35, 0.5, 0.7, 0.9])
def test_it_runs_and_scoring_is_decoding(family, budget):
    model, ids = model_of(family, budget_mode="average"), token_ids(2, 10)
    whole = model(ids, energy_budget=budget, use_cache=False)
    parts, cache = [], None
    for part in ids.split((4, 1, 5), dim=1):
        parts.append(model(part, cache=cache, energy_budget=budget, use_cache=True))
        cache = parts[-1].cache
    torch.testing.assert_close(torch.cat([part.logits for part in parts], dim=1), whole.logits, **CLOSE)
    alone = model(ids[1:], energy_budget=budget)
    torch.testing.assert_close(alone.logits, whole.logits[1:], **CLOSE)
    expected = model.costs.of_plans(whole.execution.actions).float()
    torch.testing.assert_close(whole.execution.cost, expected)


def test_all_of_it_is_the_base_with_rounded_weights():
    model, ids = wrap(tiny_base(), actions=ROWS, plans=["4*HALF"], keep_first_tokens=0), token_ids()
    rounded = tiny_base()
    with torch.no_grad():
        for parameter in rounded.model.layers.parameters():
            if parameter.dim() == 2:
                parameter.copy_(parameter.bfloat16().float())
    output = model(ids, energy_budget=0.0)
    torch.testing.assert_close(output.logits, rounded(ids).logits, **CLOSE)
    assert (output.execution.actions == model.config.table.place("HALF")).all()
    torch.testing.assert_close(model(ids, energy_budget=1.0).logits, model.base(ids).logits, **CLOSE)


def test_traces_and_pictures_know_it(tmp_path):
    model = model_of()
    trace = model.generate(token_ids(1), energy_budget=0.6, max_new_tokens=4, return_dict_in_generate=True).execution
    assert trace.table == model.config.table
    taken = [trace.table.names[place] for place in trace.actions.unique().tolist()]
    assert "HALF" in taken and all(name in trace.render() for name in taken)
    assert float(trace.layer_share["HALF"].sum()) > 0
    tokens = ["x"] * trace.cost.shape[1]
    draw_heatmap(trace, tmp_path / "map.png", tokens)
    draw_depth(trace, tmp_path / "depth.png", tokens)
    assert 'data-name="HALF"' in page(trace, tokens, 3)


def test_an_artifact_stores_the_table(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    model = AneeForCausalLM.from_base(tmp_path / "base", controller="learned", actions=ROWS, plans=PLANS)
    assert model.controller.policies[0][-1].out_features % len(ROWS) == 0
    model.save_pretrained(tmp_path / "artifact")
    loaded = AneeForCausalLM.from_pretrained(tmp_path / "artifact")
    assert loaded.config.table == ActionTable.of(ROWS) and loaded.config.plans == model.config.plans
    ids = token_ids()
    assert torch.equal(loaded(ids, energy_budget=0.5).logits, model(ids, energy_budget=0.5).logits)


def test_a_base_that_was_changed_is_prepared_anew():
    model, ids = model_of(), token_ids()
    before = model(ids, energy_budget=0.5).logits
    with torch.no_grad():
        model.base.model.layers[1].mlp.down_proj = torch.nn.Linear(48, 32, bias=False).requires_grad_(False)
    assert not torch.allclose(model(ids, energy_budget=0.5).logits, before)


def test_what_nobody_registered_is_an_error():
    rows = [*DEFAULT_TABLE.stored(), {"name": "X", "attention": "int3", "feed_forward": "full"}]
    with pytest.raises(ValueError, match="variant 'int3' is not allowed: it must be one of full, int8, int4, .*, half, none"):
        wrap(tiny_base(), actions=rows)
    with pytest.raises(ValueError, match="variant name 'half' is not allowed"):
        register_variant(Variant("half", HalfLinear))
    assert variant_named("half").name == "half" and DEFAULT_TABLE[PROCESS].attention == FULL


def test_a_feed_forward_that_is_not_gated_runs_in_a_copy_that_calls_the_variants_maps():
    model = model_of("gpt2")
    block, calls = model.stack.blocks_of("half")[0], []
    for linear in (model.base.transformer.h[0].mlp.c_fc, model.base.transformer.h[0].mlp.c_proj):
        linear.register_forward_hook(lambda *args: calls.append(args))
    x = torch.randn(1, 3, 32)
    with torch.no_grad():
        close = torch.allclose(block.feed_forward(x), model.stack.blocks[0].feed_forward(x), atol=0.05)
    assert close and len(block.mlp_maps) == 2 and len(calls) == 2  # the base's own, once


def test_a_feed_forward_without_linear_maps_that_may_be_read_says_so():
    base = tiny_base("gpt2")
    base.transformer.h[1].mlp.requires_grad_(False)
    for name in ("c_fc", "c_proj"):
        getattr(base.transformer.h[1].mlp, name).register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ValueError, match="variant 'half' is not possible for the feed-forward of a gpt2 base"):
        wrap(base, actions=ROWS)
