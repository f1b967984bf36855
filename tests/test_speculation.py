"""What is kept of a draft, as tensor functions."""

import pytest
import torch

from modeling_anee.speculation import accept, is_near_tie, largest_two


@pytest.mark.parametrize("size", [2, 64, 300, 512, 4096, 4099])
def test_the_largest_two_are_those_of_topk_and_the_first_place_is_argmax(size):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, size, generator=generator).mul(4).round()  # with ties
    place, top, second = largest_two(logits)
    two = logits.topk(2).values
    assert torch.equal(place, logits.argmax(dim=-1))
    assert torch.equal(top, two[:, 0]) and torch.equal(second, two[:, 1])


def test_what_can_not_be_chosen_is_far_away():
    logits = torch.full((1, 4096), -torch.inf)
    logits[0, 17] = 2.0
    place, top, second = largest_two(logits)
    assert place.item() == 17 and top.item() == 2.0 and second.item() < -1e30
    assert not is_near_tie(top, second)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, True), (torch.float64, False), (torch.bfloat16, True)])
def test_near_ties_are_what_a_dtype_may_round_otherwise(dtype, near):
    top = torch.tensor([20.0], dtype=dtype)
    assert is_near_tie(top, (top.double() - 1e-4).to(dtype)).item() is near
    assert not is_near_tie(top, top - 2.0)


def test_accepted_and_redrawn_tokens_together_have_the_full_models_distribution():
    torch.manual_seed(0)
    count, size = 200_000, 7
    draft, full = torch.randn(size).softmax(-1), (2 * torch.randn(size)).softmax(-1)
    drafted = torch.multinomial(draft, count, replacement=True)
    tokens, kept = accept(drafted, draft.expand(count, -1), full.expand(count, -1))
    seen = torch.bincount(tokens, minlength=size)
    assert float(((seen - full * count) ** 2 / (full * count)).sum()) < size - 1 + 4 * (2 * (size - 1)) ** 0.5
    assert torch.equal(tokens[kept], drafted[kept])
    assert float(kept.float().mean()) == pytest.approx(float(torch.minimum(draft, full).sum()), abs=0.01)


def test_a_draft_with_the_same_distribution_is_always_kept():
    same = torch.tensor([[0.25, 0.75, 0.0]]).expand(50, -1)
    tokens, kept = accept(torch.ones(50, dtype=torch.int64), same, same)
    assert kept.all() and (tokens == 1).all()
