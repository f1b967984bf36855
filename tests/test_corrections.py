"""Corrections: exact along their directions, alike for one row and many, kept in an artifact, found by a stage."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_anee.base_int4 import Int4Linear
from modeling_anee.corrections import CorrectedLinear, Corrections
from modeling_anee.training.fit import fit
from modeling_anee.training.recipe import Recipe
from modeling_anee.training.stages.corrections import leading

from .tiny import CONFIGS, LAYERS, tiny_base, token_ids, wrap
from .workshop import make_workshop, recipe_fields


RANK = 3


def directions_of(inputs: int, rank: int = RANK) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(inputs, rank, generator=generator)).Q.T.contiguous()


def corrected(outputs=48, inputs=64, bias=None):
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    return weight, CorrectedLinear.of(Int4Linear(weight, bias), weight, directions_of(inputs))


def filled(model):
    """The model with directions in its corrections."""
    for name, own in model.corrections.named_buffers():
        rows = directions_of(own.shape[-1], own.shape[-2])
        own.copy_(rows if name == "head" else rows.expand_as(own))
    return model


def shapes_of(model, rank=RANK) -> dict[str, list[int]]:
    maps = model.stack.blocks_of("int4")[0].linear | {"head": model.stack.head_map("int4")}
    inputs = {name: one.modules[0].weight.shape[0 if hasattr(one.modules[0], "nf") else -1] for name, one in maps.items()}
    return {name: [rank, size] if name == "head" else [LAYERS, rank, size] for name, size in inputs.items()}


def model_of(family="llama", **fields):
    """A base in 4 bits with corrections."""
    fields = {"controller": "plan", "precisions": ["int8", "int4"], "plans": [f"{LAYERS}*INT4 / int4"]} | fields
    shapes = shapes_of(wrap(tiny_base(family), **fields))
    return filled(wrap(tiny_base(family), corrections=shapes, **fields))


@torch.no_grad()
def test_nothing_is_lost_along_the_directions():
    weight, map_ = corrected()
    x = torch.randn(20, RANK) @ directions_of(64)
    exact, rounded = x @ weight.T, map_.rounded(x)
    assert (map_(x) - exact).abs().max() < 2e-2 < (rounded - exact).abs().max()


@torch.no_grad()
@pytest.mark.parametrize("bias", [None, torch.ones(48)])
def test_one_row_is_run_as_many_are_and_parts_as_the_whole(bias):
    _, map_ = corrected(bias=bias)
    x = torch.randn(40, 64)
    whole = map_(x)
    torch.testing.assert_close(map_.row(x[0]), whole[0], rtol=0.02, atol=0.05)  # the kernel of few rows rounds to bfloat16
    torch.testing.assert_close(map_.rows(16, 32)(x), whole[:, 16:32])
    assert map_.weight_bytes == map_.rounded.weight_bytes + RANK * (48 + 4 * 64)
    assert map_.extra_flops == 2 * RANK * (48 + 64)


@pytest.mark.parametrize("family", sorted(CONFIGS))
@torch.no_grad()
def test_corrections_bring_the_logits_of_4_bits_nearer_to_the_base_in_every_family(family):
    model = model_of(family)
    ids = token_ids(2, 24)
    shapes = model.config.corrections
    inputs: dict[str, list] = {name: [[] for _ in range(LAYERS)] for name in shapes if name != "head"}
    handles = [
        one.modules[0].register_forward_pre_hook(lambda _, given, own=inputs[name][layer]: own.append(given[0].flatten(0, -2)))
        for layer, block in enumerate(model.stack.blocks_of("int4"))
        for name, one in block.linear.items()
    ]
    base = model.base(ids).logits
    for handle in handles:
        handle.remove()
    for own in model.corrections.buffers():
        own.zero_()
    before = (model(ids, energy_budget=0.0).logits - base).square().mean()
    for name, rows in inputs.items():
        getattr(model.corrections, name).copy_(torch.stack([leading(torch.cat(x), RANK) for x in rows]))
    after = (model(ids, energy_budget=0.0).logits - base).square().mean()
    assert after < before
    torch.testing.assert_close(model(ids, energy_budget=1.0).logits, base)


@torch.no_grad()
def test_feeding_token_by_token_gives_the_logits_of_one_forward():
    model, ids = model_of(), token_ids(1, 8)
    whole, cache, parts = model(ids, energy_budget=0.0).logits, None, []
    for position in range(ids.shape[1]):
        output = model(ids[:, position : position + 1], cache=cache, use_cache=True, energy_budget=0.0)
        cache, parts = output.cache, [*parts, output.logits]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_what_corrections_read_is_in_the_cost():
    model, plain = (
        model_of(),
        wrap(tiny_base(), controller="plan", precisions=["int8", "int4"], plans=[f"{LAYERS}*INT4 / int4"]),
    )
    int4 = model.config.table.place("INT4")
    extra = (model.costs.layers[0, int4] * model.costs.total) - (plain.costs.layers[0, int4] * plain.costs.total)
    block = model.stack.blocks_of("int4")[0]
    read = sum(one._whole.directions.nbytes + one._whole.lost.nbytes for one in block.linear.values())
    assert abs(float(extra) - read) < 1e-3 * read
    assert model.costs.layers[0, 0] * model.costs.total == plain.costs.layers[0, 0] * plain.costs.total


@torch.no_grad()
def test_an_artifact_keeps_the_directions_and_nothing_of_the_base(tmp_path):
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    fields = {"controller": "plan", "precisions": ["int8", "int4"], "plans": [f"{LAYERS}*INT4 / int4"]}
    shapes = shapes_of(wrap(base, **fields))
    model = filled(wrap(base, corrections=shapes, base_model_name_or_path=str(tmp_path / "base"), **fields))
    ids = token_ids(2, 5)
    expected = model(ids, energy_budget=0.0).logits
    model.save_pretrained(tmp_path / "artifact")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact", dtype="float32")
    assert torch.equal(loaded(ids, energy_budget=0.0).logits, expected)
    assert {name for name in model._own_state() if name.startswith("corrections.")} == {
        f"corrections.{name}" for name in shapes
    }


@pytest.mark.parametrize("shape", [(40, 8), (8, 40)])
def test_leading_directions_keep_most_of_the_rows(shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    found = leading(x, RANK)
    torch.testing.assert_close(found @ found.T, torch.eye(RANK), rtol=1e-4, atol=1e-4)
    values = torch.linalg.svdvals(x)
    torch.testing.assert_close((x @ found.T).square().sum(), values[:RANK].square().sum(), rtol=1e-4, atol=1e-4)


def test_the_stage_finds_directions_that_the_artifact_has(tmp_path):
    make_workshop(tmp_path)
    sources = {part: [{"file": "text.txt", "tokens": 200}] for part in ("train", "choose")}
    stages = {"corrections": {"windows": 3, "rank": 2, "head_rank": 1}, "plans": {"windows": 1, "lowest_budget": 0.0}}
    anee = {"controller": "plan", "precisions": ["int8", "int4"], "controller_actions": ["INT8", "INT4"]}
    fields = recipe_fields(tmp_path, length=16, text=sources, anee=anee, stages=stages)
    fit(Recipe.model_validate(fields), tmp_path / "run", tmp_path / "data")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "artifact", dtype="float32")
    assert model.corrections.of_head().shape[0] == 1 and len(model.config.corrections) == 5
    for own in model.corrections.buffers():
        gram = own @ own.mT
        torch.testing.assert_close(gram, torch.eye(gram.shape[-1]).expand_as(gram), rtol=1e-3, atol=1e-3)


def test_the_stage_needs_4_bits(tmp_path):
    make_workshop(tmp_path)
    sources = {"train": [{"file": "text.txt", "tokens": 100}]}
    fields = recipe_fields(
        tmp_path, length=16, text=sources, anee={"controller": "plan"}, stages={"corrections": {"windows": 2}}
    )
    with pytest.raises(ValueError, match=r"stages.corrections needs 'int4'"):
        fit(Recipe.model_validate(fields), tmp_path / "run", tmp_path / "data")


def test_corrections_of_given_directions_have_their_shapes():
    made = Corrections.of({"qkv": torch.zeros(2, 1, 4), "head": torch.zeros(3, 4)})
    assert made.shapes == {"qkv": [2, 1, 4], "head": [3, 4]} and set(made.of_layer(1)) == {"qkv"}
    assert Corrections.of({}).of_head() is None
