"""The cache against a plain one that is given the same keys and values at once, under random programs."""

import copy
import functools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from modeling_anee.base_model import BaseStack
from modeling_anee.cache import MIN_CAPACITY, AneeCache, AneeCacheLayer

from .tiny import FAMILIES, LAYERS, tiny_base, token_ids, wrap


HIDDEN = 32
seeds = st.integers(0, 2**31)
operations = st.one_of(
    st.tuples(st.sampled_from(["update", "defer", "defer"]), st.integers(1, 5)),
    st.tuples(st.just("update"), st.just(MIN_CAPACITY - 1)),
    st.tuples(st.just("crop"), st.integers(0, 9)),
    st.tuples(st.sampled_from(["reorder", "select", "select by mask"]), seeds),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.sampled_from(["go on with a copy", "leave a copy", "read", "reset"]), st.just(0)),
)
program = st.lists(operations, min_size=1, max_size=14)


@functools.cache
def stack_of(family: str) -> BaseStack:
    return BaseStack(tiny_base(family).requires_grad_(False))


class CountingBlock:
    """Stands in for a block: keys are the hidden states, values their doubles; counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def in_variant(self, variant):
        return self

    def keys_values(self, hidden, rotation):
        self.asked.append(hidden.shape[1])
        return torch.stack((hidden, 2 * hidden), dim=1)

    def __deepcopy__(self, memo):
        raise AssertionError("a copy of a cache must share the model's weights")


class Twins:
    """A layer under test and a `DynamicLayer` that is written at once; both take the same operations."""

    def __init__(self, family: str, rows: int, shared_positions: bool) -> None:
        self.stack, self.rows, self.shared_positions = stack_of(family), rows, shared_positions
        self.block = self.stack.blocks[1]
        self.layer, self.reference = AneeCacheLayer(self.block), DynamicLayer()
        self.left_behind: list[tuple[AneeCacheLayer, DynamicLayer]] = []
        self.generator = torch.Generator().manual_seed(0)

    def do(self, name: str, number: int) -> None:
        getattr(self, name.replace(" ", "_"))(number)
        assert self.layer.get_seq_length() == self.reference.get_seq_length()
        assert self.layer.get_mask_sizes(3) == self.reference.get_mask_sizes(3)
        assert self.layer.is_initialized == (self.reference.get_seq_length() > 0)

    def update(self, tokens: int) -> None:
        hidden, rotation = self.tokens(tokens)
        found = self.layer.update(*self.block.keys_values(hidden, rotation).chunk(2, dim=1))
        same(found, self.reference.update(*self.block.keys_values(hidden, rotation).chunk(2, dim=1)))

    def defer(self, tokens: int) -> None:
        hidden, rotation = self.tokens(tokens)
        self.layer.defer(hidden, rotation)
        self.reference.update(*self.block.keys_values(hidden, rotation).chunk(2, dim=1))

    def crop(self, tokens: int) -> None:
        self.layer.crop(-tokens)
        self.reference.crop(-tokens)
        if self.reference.get_seq_length() == 0:
            self.reset(0)

    def reorder(self, seed: int) -> None:
        order = torch.randint(0, self.rows, (self.rows,), generator=torch.Generator().manual_seed(seed))
        for layer in (self.layer, self.reference):
            layer.reorder_cache(order)

    def repeat(self, repeats: int) -> None:
        if self.rows * repeats <= 6:
            self.rows *= repeats
            for layer in (self.layer, self.reference):
                layer.batch_repeat_interleave(repeats)

    def select(self, seed: int) -> None:
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed))
        self.take(order[: 1 + seed % self.rows])

    def select_by_mask(self, seed: int) -> None:
        self.take(torch.tensor([row == seed % self.rows or bool(seed >> row & 1) for row in range(self.rows)]))

    def take(self, index: torch.Tensor) -> None:
        self.rows = int(index.sum()) if index.dtype == torch.bool else len(index)
        for layer in (self.layer, self.reference):
            layer.batch_select_indices(index)

    def reset(self, _: int) -> None:
        self.layer.reset()
        self.reference.reset()

    def go_on_with_a_copy(self, _: int) -> None:
        self.left_behind.append((self.layer, copy.deepcopy(self.reference)))
        self.layer = copy.deepcopy(self.layer)

    def leave_a_copy(self, _: int) -> None:
        self.left_behind.append((copy.deepcopy(self.layer), copy.deepcopy(self.reference)))

    def read(self, _: int) -> None:
        check(self.layer, self.reference)

    def tokens(self, count: int):
        """New hidden states and the rotation of their positions, of all rows together or of each."""
        hidden = torch.randn(self.rows, count, HIDDEN, generator=self.generator)
        start = self.reference.get_seq_length()
        positions = torch.arange(start, start + count).unsqueeze(0)
        if not self.shared_positions:
            positions = positions + torch.arange(self.rows).unsqueeze(1)
        return hidden, self.stack.rotation(hidden, positions)

    def check(self) -> None:
        for layer, reference in [*self.left_behind, (self.layer, self.reference)]:
            check(layer, reference)


def check(layer: AneeCacheLayer, reference: DynamicLayer) -> None:
    if reference.get_seq_length():
        same((layer.keys, layer.values), (reference.keys, reference.values))
    else:
        assert layer.get_seq_length() == 0 and (layer.keys is None or layer.keys.shape[2] == 0)


def same(found: tuple, expected: tuple) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@given(rows=st.integers(1, 3), shared_positions=st.booleans(), program=program)
@settings(deadline=None, derandomize=True, max_examples=80)
@torch.no_grad()
def test_any_program_equals_writing_at_once(family, rows, shared_positions, program):
    twins = Twins(family, rows, shared_positions)
    for name, number in program:
        twins.do(name, number)
    twins.check()


def filled(tokens: int, rows: int = 2) -> tuple[AneeCacheLayer, CountingBlock]:
    block = CountingBlock()
    layer = AneeCacheLayer(block)
    if tokens:
        keys = torch.randn(rows, 1, tokens, 4)
        layer.update(keys, 2 * keys)
    return layer, block


def test_pending_tokens_are_computed_together_when_needed_and_once():
    layer, block = filled(0)
    for count in (3, 1, 1):
        layer.defer(torch.randn(2, count, 4), None)
    assert layer.get_seq_length() == 5 and block.asked == []
    layer.update(torch.randn(2, 1, 1, 4), torch.randn(2, 1, 1, 4))
    assert block.asked == [5]
    assert layer.keys.shape == layer.values.shape == (2, 1, 6, 4) and block.asked == [5]


def test_a_layer_that_nobody_uses_again_computes_nothing():
    layer, block = filled(4)
    layer.defer(torch.randn(2, 3, 4), None)
    layer.crop(-2)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))
    assert layer.get_seq_length() == 5 and block.asked == []
    layer.crop(-1)
    assert layer.keys.shape[2] == 4 and block.asked == []


@pytest.mark.parametrize("tokens", [1, 3])
def test_storage_grows_by_doubling(tokens):
    layer, _ = filled(0)
    places, steps = [], 1000 // tokens
    for _ in range(steps):
        new = torch.randn(2, 1, tokens, 4)
        keys, values = layer.update(new, 2 * new)
        if not places or places[-1] != (keys.data_ptr(), values.data_ptr()):
            places.append((keys.data_ptr(), values.data_ptr()))
        length = layer.get_seq_length()
        assert keys.untyped_storage().nbytes() <= 2 * 2 * 4 * 4 * max(2 * length, MIN_CAPACITY)
    assert len(places) <= 1 + math.ceil(math.log2(steps * tokens / MIN_CAPACITY))


def test_nothing_is_moved_by_a_crop():
    layer, _ = filled(40)
    place = layer.keys.data_ptr()
    for _ in range(20):
        layer.crop(-5)
        new = torch.randn(2, 1, 5, 4)
        layer.update(new, new)
    assert layer.keys.data_ptr() == place


def test_a_copy_shares_the_weights_and_copies_the_data():
    layer, block = filled(3)
    layer.defer(torch.randn(2, 2, 4), None)
    twin = copy.deepcopy(layer)
    assert twin.keys.shape == (2, 1, 5, 4) and block.asked == [2]
    assert layer.keys.shape == (2, 1, 5, 4) and block.asked == [2, 2]
    assert twin.keys.data_ptr() != layer.keys.data_ptr() and torch.equal(twin.keys, layer.keys)


@pytest.mark.parametrize("original_goes_on", [True, False])
def test_crop_then_append_leaves_the_other_copy_alone(original_goes_on):
    layer, _ = filled(6)
    before = layer.keys.clone()
    twin = copy.deepcopy(layer)
    changed, untouched = (layer, twin) if original_goes_on else (twin, layer)
    changed.crop(-3)
    new = torch.randn(2, 1, 3, 4)
    changed.update(new, new)
    assert torch.equal(untouched.keys, before) and torch.equal(untouched.values, 2 * before)


def test_reset_releases_the_storage_and_takes_other_rows():
    layer, _ = filled(5)
    layer.reset()
    assert layer.keys is None and layer.values is None and layer.get_seq_length() == 0
    new = torch.randn(3, 1, 2, 4)
    layer.update(new, new)
    assert torch.equal(layer.keys, new)


def test_a_cache_filled_in_inference_mode_can_go_on_outside():
    layer, _ = filled(0)
    with torch.inference_mode():
        first = torch.randn(2, 1, 3, 4)
        layer.update(first, first)
        layer.reorder_cache(torch.tensor([1, 0]))
        layer.defer(torch.randn(2, 2, 4), None)
    place = None
    for _ in range(3):
        new = torch.randn(2, 1, 1, 4)
        layer.update(new, new)
        assert place in (None, layer.keys.data_ptr())  # moved out of inference mode once, not at every step
        place = layer.keys.data_ptr()
    assert torch.equal(layer.keys[:, :, :3], first[[1, 0]]) and layer.get_seq_length() == 8


def test_what_is_not_possible_is_refused():
    layer, _ = filled(3)
    with pytest.raises(ValueError, match="tokens_to_remove=2 is not allowed"):
        layer.crop(2)
    with pytest.raises(NotImplementedError, match="does not offload"):
        layer.offload()


def test_a_cache_has_a_layer_per_block_and_passes_everything_on():
    stack = stack_of("llama")
    cache = AneeCache(stack.blocks)
    assert len(cache) == len(list(cache)) == LAYERS and cache.get_seq_length() == 0
    assert not cache.is_compileable and not any(cache.is_sliding)
    hidden = torch.randn(2, 5, HIDDEN)
    rotation = stack.rotation(hidden, torch.arange(5).unsqueeze(0))
    with torch.no_grad():
        for index, block in enumerate(stack.blocks):
            if index % 2:
                cache.layers[index].defer(hidden, rotation)
            else:
                cache.update(*block.keys_values(hidden, rotation).chunk(2, dim=1), index)
        cache.crop(-2)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
        cache.batch_select_indices(torch.tensor([0]))
        for index, block in enumerate(stack.blocks):
            assert cache.get_seq_length(index) == 3 and cache.get_mask_sizes(2, index) == (5, 0)
            keys, values = block.keys_values(hidden, rotation).chunk(2, dim=1)
            same((cache.layers[index].keys, cache.layers[index].values), (keys[1:, :, :3], values[1:, :, :3]))
    cache.reset()
    assert [layer.get_seq_length() for layer in cache.layers] == [0] * LAYERS


def test_a_pickled_cache_holds_keys_and_values_and_nothing_of_the_base():
    model, ids = wrap(**{"plans": ["PSSP"]}), token_ids()
    whole = model(ids, energy_budget=0.0).logits
    cache = model(ids[:, :-2], energy_budget=0.0).cache  # two layers have pending tokens
    data = pickle.dumps(cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert len(data) < held + 16_000
    read = pickle.loads(data)
    torch.testing.assert_close(model(ids[:, -2:], cache=read, energy_budget=0.0).logits, whole[:, -2:])
    assert read.execution_log.trace.cost.shape[1] == ids.shape[1]


def test_a_backward_goes_through_several_cached_steps():
    model, ids = wrap(controller="plan", plans=["PSFP"], bridge_rank=4, ffn_bridge_rank=4), token_ids()
    parameters = [p for p in model.bridges.parameters()]

    def gradients(logits):
        return torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)

    whole = gradients(model(ids, energy_budget=0.0, use_cache=False).logits)
    cache, parts = None, []
    for part in ids.split((5, 1, 6), dim=1):
        output = model(part, cache=cache, energy_budget=0.0, use_cache=True)
        cache = output.cache
        parts.append(output.logits)
    for found, expected in zip(gradients(torch.cat(parts, dim=1)), whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
