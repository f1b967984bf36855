"""Weights in large pages: copies that are what was copied, and are let go."""

import gc
import weakref

import pytest
import torch

from modeling_anee import large_pages
from modeling_anee.large_pages import ALIGNMENT, LargePages


@pytest.mark.parametrize(
    "shape, dtype", [((3, 5), torch.int8), ((0,), torch.float32), ((7, 2, 4), torch.bfloat16), ((), torch.float32)]
)
def test_copies_are_what_was_copied_and_stay_so(shape, dtype):
    pages = LargePages()
    first = torch.randn(shape).to(dtype)
    copy = pages.copy(first)
    others = [pages.copy(torch.ones(9, 9)) for _ in range(5)]
    assert torch.equal(copy, first) and copy.dtype == dtype and copy.is_contiguous()
    assert all(one.data_ptr() % ALIGNMENT == 0 for one in others)


def test_what_is_not_contiguous_becomes_so():
    x = torch.arange(12).view(3, 4).t()
    assert torch.equal(LargePages().copy(x), x)


def test_chunks_are_let_go_with_their_last_tensor(monkeypatch):
    monkeypatch.setattr(large_pages, "CHUNK", 1024)
    made, new = [], large_pages.new_chunk
    monkeypatch.setattr(large_pages, "new_chunk", lambda size: made.append(chunk := new(size)) or chunk)
    pages = LargePages()
    kept = [pages.copy(torch.zeros(100)) for _ in range(6)]  # two in a chunk
    wide = pages.copy(torch.ones(1000))
    assert [len(chunk) for chunk in made] == [1024, 1024, 1024, 4000] and wide.sum() == 1000
    chunks = [weakref.ref(chunk) for chunk in made]
    made.clear()
    del kept[2:4]
    gc.collect()
    assert [chunk() is None for chunk in chunks] == [False, True, False, False]
