"""Work adds up, and hardware prices it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modeling_anee.base_model import BaseStack
from modeling_anee.costs import LayerWork
from modeling_anee.hardware import GATHERING_FLOPS, HARDWARE, Hardware, gathering_pays
from modeling_anee.work import NOTHING, Work, norm_work, work_of

from .tiny import FAMILIES, tiny_base


numbers = st.floats(0, 1e9)
works = st.builds(Work, numbers, numbers, numbers, numbers)
hardware = st.builds(Hardware, st.just("ms"), numbers, numbers, numbers, numbers)


@given(hardware, works, works)
def test_a_price_is_linear_in_work(machine, first, second):
    assert machine.price(first + second) == pytest.approx(machine.price(first) + machine.price(second))
    assert machine.price(NOTHING) == 0.0 and first + NOTHING == first


@given(works)
def test_the_two_units_are_what_they_say(work):
    assert HARDWARE["flops"].price(work) == work.flops and HARDWARE["bytes"].price(work) == work.weight_bytes
    assert work.part(1.0) == work


def test_work_of_modules_counts_each_once():
    linear, norm = nn.Linear(3, 5), nn.LayerNorm(5)
    assert work_of([linear, linear]) == Work(flops=30.0, weight_bytes=80.0, launches=1.0)
    assert norm_work([norm]) == Work(weight_bytes=40.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_are_written_for_every_token(family):
    stack = BaseStack(tiny_base(family).requires_grad_(False))
    for block in stack.blocks:
        work, size = LayerWork.of(block), 2 * block.kv_heads * block.head_size * 4
        assert work.attention.kv_bytes == work.keys_values.kv_bytes == size and work.feed_forward.kv_bytes == 0
        assert 0 < work.keys_values.flops < work.attention.flops and work.attention.launches >= 2


def test_gathering_is_asked_of_the_device():
    least = GATHERING_FLOPS["cpu"]
    assert gathering_pays(least, torch.device("cpu")) and not gathering_pays(least - 1.0, torch.device("cpu"))
    assert not gathering_pays(GATHERING_FLOPS["cuda"] - 1.0, torch.device("meta"))  # unknown: as an accelerator
