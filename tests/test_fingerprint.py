"""A fingerprint knows the same weights again in another dtype, and tells other weights apart."""

import re
import time

import pytest
import torch
from torch import nn

from modeling_anee.fingerprint import difference, fingerprint, same_base, short

from .tiny import FAMILIES, tiny_base, token_ids, wrap


def fine_tuned(base, steps: int = 3):
    """The base after a few steps of ordinary training."""
    optimiser = torch.optim.AdamW(base.parameters(), lr=1e-3)
    for _ in range(steps):
        base(token_ids(), labels=token_ids()).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return base


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_weights_have_the_same_fingerprint(family):
    assert fingerprint(tiny_base(family)) == fingerprint(tiny_base(family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,), (torch.float16,), (torch.float64,), (torch.float16, torch.bfloat16)])
def test_a_cast_has_the_same_weights(family, dtypes):
    original, base = fingerprint(tiny_base(family)), tiny_base(family)
    for dtype in dtypes:
        base.to(dtype)
        assert same_base(original, fingerprint(base)) and same_base(fingerprint(base), original)


def test_weights_too_small_for_half_precision_are_the_same_too():
    base = tiny_base()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1e-7)
    assert same_base(fingerprint(base), fingerprint(base.to(torch.float16)))


@pytest.mark.parametrize("family", FAMILIES)
def test_other_weights_differ(family):
    first, second = fingerprint(tiny_base(family)), fingerprint(tiny_base(family, seed=1))
    assert not same_base(first, second) and first.split("-")[0] == second.split("-")[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fine_tuned_copy_differs(family):
    assert not same_base(fingerprint(tiny_base(family)), fingerprint(fine_tuned(tiny_base(family))))


def test_one_changed_matrix_of_the_sampled_ones_is_enough():
    base = tiny_base()
    before = fingerprint(base)
    with torch.no_grad():
        base.model.embed_tokens.weight.add_(1.0)
    assert not same_base(before, fingerprint(base))


def test_another_architecture_differs():
    prints = {family: fingerprint(tiny_base(family)) for family in FAMILIES}
    assert len({text.split("-")[0] for text in prints.values()}) == len(FAMILIES)
    assert not any(same_base(prints[a], prints[b]) for a in FAMILIES for b in FAMILIES if a != b)


def test_another_shape_differs():
    class Model(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, 4)

    assert not same_base(fingerprint(Model(4)), fingerprint(Model(5)))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_changes_nothing_and_wrapping_does_not_change_it(family):
    base = tiny_base(family)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    text = fingerprint(base)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert all(parameter.requires_grad for parameter in base.parameters())
    model = wrap(base)
    model(token_ids(), energy_budget=0.5)
    assert fingerprint(model.base) == text == model.config.base_fingerprint


def test_meta_tensors_compare_by_shape_alone():
    base = tiny_base()
    text, meta = fingerprint(base), fingerprint(tiny_base().to("meta"))
    assert set(meta.split("-")[1].split("none")) == {""} and len(meta) == len(text)
    assert same_base(text, meta) and same_base(meta, text)
    assert not same_base(fingerprint(tiny_base("gpt2")), meta)


def test_partly_meta_tensors_compare_by_the_rest():
    base, other = tiny_base(), tiny_base(seed=1)
    other.model.embed_tokens.to("meta")
    assert "none" in fingerprint(other) and not same_base(fingerprint(base), fingerprint(other))


def test_an_unknown_fingerprint_matches_any():
    text = fingerprint(tiny_base())
    assert same_base("", text) and same_base(text, "")


def test_a_transposed_weight_is_read_at_the_same_places():
    base, text = tiny_base(), fingerprint(tiny_base())
    for module in base.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().t().contiguous().t())
    assert fingerprint(base) == text


def test_a_base_without_matrices_has_one():
    assert fingerprint(nn.LayerNorm(4)) == fingerprint(nn.LayerNorm(4)) != fingerprint(nn.LayerNorm(5))


def test_it_is_fast():
    with torch.device("meta"):
        base = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(48))
    base.to_empty(device="cpu")  # 200 MB
    begin = time.perf_counter()
    fingerprint(base)
    assert time.perf_counter() - begin < 0.5


def test_two_bases_can_be_told_apart_by_people():
    one, other, third = fingerprint(tiny_base()), fingerprint(tiny_base(seed=5)), fingerprint(tiny_base("gpt2"))
    assert short(one) == short(one) != short(other) and len(short(one)) == 17
    assert short(one)[:8] == short(other)[:8] == one[:8] != short(third)[:8]
    assert re.fullmatch(r"[1-9]\d* of \d+ sampled weights differ", difference(one, other))
    assert difference(one, third) == "names or shapes of weights differ"
