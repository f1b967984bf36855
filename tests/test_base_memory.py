"""Bytes in memory: everything once, nothing that was dropped."""

import pytest
import torch

from modeling_anee.base_memory import as_text
from modeling_anee.evaluation import memory

from .tiny import BRIDGES, FAMILIES, LAYERS, tiny_base, token_ids, wrap


def bytes_of(module) -> int:
    return sum(tensor.nbytes for tensor in {id(one): one for one in (*module.parameters(), *module.buffers())}.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_counts_once(family):
    model = wrap(tiny_base(family), **BRIDGES)
    held = model.held_bytes
    assert sum(held.values()) == bytes_of(model) and held["embeddings"] == bytes_of(model.base.get_input_embeddings())
    assert set(held) == {"embeddings", "base", "own"} and held["own"] == bytes_of(model.controller) + bytes_of(model.bridges)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_variants_come_on_top_or_instead(family):
    plans = [f"{LAYERS}*INT8 / int8"]
    whole, model = (wrap(tiny_base(family), precisions=["int8"], plans=plans, drop_full=drop) for drop in (False, True))
    held, left = whole.held_bytes, model.held_bytes
    assert held["int8"] == left["int8"] and held["embeddings"] == left["embeddings"]
    linear = sum(one.modules[0].weight.nbytes for one in model.stack.blocks_of("int8")[0].linear.values())
    assert held["base"] - left["base"] >= LAYERS * linear and 0 < left["int8"] < held["base"] / 2
    model(token_ids(), energy_budget=0.0)
    assert model.held_bytes == left
    text = as_text(left)
    assert text.startswith(f"{sum(left.values()) / 2**20:.1f} MiB of weights in memory: ") and "int8" in text


@torch.no_grad()
def test_what_many_rows_need_of_4_bits_counts_once_it_is_there_and_never_in_a_small_one():
    fields = {"precisions": ["int4"], "plans": [f"{LAYERS}*INT4 / int4"]}
    whole, small = (wrap(tiny_base(), drop_full=drop, **fields) for drop in (False, True))
    before, of_small = whole.held_bytes["int4"], small.held_bytes["int4"]
    for model in (whole, small):
        model(token_ids(1, 60), energy_budget=0.0)
    assert of_small < before < whole.held_bytes["int4"]


def test_what_a_process_prints_is_read():
    assert memory.read("some text\n90 70 20\n") == memory.Memory(peak=90, end=70, model=50)
    assert memory.resident() > 1 << 20
