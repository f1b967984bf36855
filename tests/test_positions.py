"""Where tokens stand: packed sequences and ready masks give what each sequence gives alone, at any budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import create_masks_for_generate

from modeling_anee.compatibility import cache_argument
from modeling_anee.positions import token_places

from .tiny import BRIDGES, CONTROLLERS, tiny_base, token_ids, wrap


CLOSE = {"atol": 2e-5, "rtol": 1e-4}
FIELDS = {"plans": ["PSFP", "PPSP", "PFPP"], **BRIDGES}


def model_of(controller: str, family: str = "llama", **fields):
    return wrap(tiny_base(family), controller, **(FIELDS if controller in ("plan", "routed") else BRIDGES), **fields)


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_packed_sequences_are_what_each_is_alone(controller, family):
    model, lengths = model_of(controller, family), (5, 1, 6)
    ids, budget = token_ids(2), 0.6
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    packed = model(ids, position_ids=positions, energy_budget=budget, use_cache=False)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = model(ids[:, part], energy_budget=budget, use_cache=False)
        assert torch.equal(packed.execution.actions[:, part], alone.execution.actions)
        torch.testing.assert_close(packed.logits[:, part], alone.logits, **CLOSE)
        start += length


def ready_mask(model, ids: torch.Tensor, mask: torch.Tensor):
    """What transformers makes of a mask [B, T] for this base: [B, 1, T, T], or a dict of them."""
    base = model.base
    embeddings = base.get_input_embeddings()(ids)
    return create_masks_for_generate(base.config, embeddings, mask, position_ids=None, **cache_argument(None))


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_ready_masks_do_what_the_plain_mask_does(controller, family):
    model, ids = model_of(controller, family), token_ids(2)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    given = {"position_ids": positions, "energy_budget": 0.6}
    plain = model(ids, attention_mask=mask, **given)
    ready = model(ids, attention_mask=ready_mask(model, ids, mask), **given)
    real = mask.bool()
    assert torch.equal(ready.execution.valid, real) and torch.equal(plain.execution.valid, real)
    assert torch.equal(ready.execution.actions[real], plain.execution.actions[real])
    torch.testing.assert_close(ready.logits[real], plain.logits[real], **CLOSE)


def test_masks_that_say_too_little_are_refused():
    ids = token_ids(1, 4)
    ready = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="needs 'full_attention'"):
        wrap(tiny_base("gemma3_text"))(ids, attention_mask={"sliding_attention": ready})
    with pytest.raises(ValueError, match="layers of the types.*sliding_attention"):
        wrap(tiny_base("gemma3_text"))(ids, attention_mask={"full_attention": ready})
    with pytest.raises(ValueError, match="share one mask"):
        wrap(tiny_base("llama"))(ids, attention_mask={"full_attention": ready})


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=3), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_a_running_sum_begins_anew_with_every_sequence(rows, seed):
    length = max(map(sum, rows))
    rows = [[*row, length - sum(row)] if sum(row) < length else row for row in rows]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    places = token_places(None, positions, 0, len(rows), length, has_cache=False)
    assert torch.equal(places.index, positions)
    values = torch.rand(positions.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sums = places.running_sum(values)
    for row, lengths in enumerate(rows):
        expected = torch.cat([part.cumsum(0) for part in values[row].split(lengths)])
        torch.testing.assert_close(sums[row], expected)
    assert (places.sequence.flatten().diff() >= 0).all() and places.sequence.unique().numel() == sum(map(len, rows))
