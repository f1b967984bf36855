"""Windows: each token scored once, what a tokenizer puts before a text at the beginning of each, evenly spread."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_anee.data.windows import Window, full_windows, spread, window_rows, windows


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(2, 20), st.data())
def test_overlapping_windows_score_every_token_but_the_first_once(tokens, length, data):
    stride = data.draw(st.integers(1, length))
    ids = torch.arange(tokens)
    cut = windows(ids, length, stride)
    scored = [int(token) for window in cut for token in window.ids[window.context :]]
    unscored = set(range(tokens)) - set(scored)
    assert scored == sorted(set(scored))
    assert unscored == ({0} if stride < length else {i for i in range(0, tokens, length)})
    for number, window in enumerate(cut):
        begin = number * stride
        assert torch.equal(window.ids, ids[begin : begin + length]) and 1 <= window.context < len(window.ids)
    assert all(window.context == length - stride for window in cut[1:]) or stride == length


def test_windows_do_not_overlap_by_default():
    assert [(len(w.ids), w.context) for w in windows(torch.arange(25), 10)] == [(10, 1), (10, 1), (5, 1)]
    assert [len(w.ids) for w in windows(torch.arange(21), 10)] == [10, 10]  # one token left has nothing to be scored by
    assert [len(w.ids) for w in windows(torch.arange(1025))] == [512, 512]


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 60))
def test_spread_windows_are_distinct_in_order_and_even(count, limit):
    some = spread([Window(torch.tensor([i, i]), 1) for i in range(count)], limit)
    places = [int(window.ids[0]) for window in some]
    assert len(places) == min(count, limit) and places == sorted(set(places))
    steps = [b - a for a, b in zip([-1, *places], [*places, count], strict=True)]
    assert max(steps) <= math.ceil(count / len(places)) + 1


def test_spread_without_a_limit_takes_all():
    cut = windows(torch.arange(30), 10)
    assert spread(cut, None) == cut


# What a tokenizer puts before every text


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(4, 20), st.integers(1, 2), st.data())
def test_every_window_begins_with_it_as_context_and_every_token_of_the_text_is_scored_once(tokens, length, count, data):
    stride = data.draw(st.none() | st.integers(1, length - count))
    start, ids = list(range(-count, 0)), torch.arange(tokens, dtype=torch.int32)
    cut = windows(ids, length, stride, start)
    assert [int(token) for window in cut for token in window.ids[window.context :]] == list(range(tokens))
    for window in cut:
        begin = int(window.ids[count])
        assert window.ids.tolist() == [*start, *range(begin, min(begin + length - count, tokens))]
        assert window.ids.dtype == torch.int64 and window.context >= count


def test_full_windows_are_of_equal_length_also_as_rows():
    ids = torch.arange(3, 28, dtype=torch.int32)
    for start in ([], [1]):
        cut = full_windows(ids, 10, start)
        assert [window.ids.tolist() for window in cut] == window_rows(ids, 10, start).tolist()
        assert len(cut) == 2 and {len(window.ids) for window in cut} == {10} and {window.context for window in cut} == {1}
        assert all(window.ids[: len(start)].tolist() == start for window in cut)
        assert full_windows(ids[:8], 10, start) == [] and window_rows(ids[:8], 10, start).shape == (0, 10)


def test_a_limit_takes_the_windows_that_spread_would_take():
    ids = torch.arange(100)
    for start in ([], [1]):
        some, all_of_them = windows(ids, 10, 4, start, 5), windows(ids, 10, 4, start)
        assert [w.ids.tolist() for w in some] == [w.ids.tolist() for w in spread(all_of_them, 5)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"length": 1}, "length=1 is not allowed: a window needs at least 2"),
        ({"length": 2, "start": [1, 1]}, "length=2 is not allowed: a window needs at least 3"),
        ({"length": 8, "stride": 8, "start": [1]}, "stride=8 is not allowed: it must be between 1 and .* 7"),
        ({"ids": torch.empty(0, dtype=torch.int32), "start": [1]}, "at least 2 tokens"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        windows(**({"ids": torch.arange(20)} | arguments))
