"""Numbers and drawings of a trace, compared with loops over its tokens."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_anee.actions import DEFAULT_TABLE, EXIT, PROCESS, SKIP, SKIP_FFN
from modeling_anee.trace import ExecutionTrace


DEAREST_FIRST = (PROCESS, SKIP_FFN, SKIP, EXIT)
RUNNING = (PROCESS, SKIP_FFN)  # a layer that runs, if not all of it


def random_trace(rows: int, tokens: int, layers: int, seed: int) -> ExecutionTrace:
    generator = torch.Generator().manual_seed(seed)
    actions = torch.randint(0, len(DEFAULT_TABLE), (rows, tokens, layers), generator=generator, dtype=torch.uint8)
    valid = torch.rand(rows, tokens, generator=generator) < 0.8
    cost = torch.rand(rows, tokens, generator=generator) * valid
    return ExecutionTrace(actions, cost, valid, floor=0.25, unit="bytes")


def one_row(columns: list[list[int]], valid: list[bool] | None = None) -> ExecutionTrace:
    """A trace of one row from the actions of each token."""
    actions = torch.tensor([columns], dtype=torch.uint8)
    mask = torch.ones(1, len(columns), dtype=torch.bool) if valid is None else torch.tensor([valid])
    return ExecutionTrace(actions, mask.float(), mask, 0.25, "flops")


def same(first: ExecutionTrace, second: ExecutionTrace) -> bool:
    parts = all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("actions", "cost", "valid"))
    return parts and (first.floor, first.unit) == (second.floor, second.unit)


traces = st.builds(random_trace, st.integers(1, 4), st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**31))
relaxed = settings(deadline=None, derandomize=True, max_examples=50)


@given(traces)
@relaxed
def test_means_and_depths_are_those_of_the_real_tokens(trace):
    rows, tokens, _ = trace.actions.shape
    real = [[t for t in range(tokens) if trace.valid[b, t]] for b in range(rows)]
    costs = [[float(trace.cost[b, t]) for t in real[b]] for b in range(rows)]
    count = sum(map(len, real))
    assert trace.mean_cost == pytest.approx(sum(map(sum, costs)) / max(count, 1))
    assert trace.row_cost.tolist() == pytest.approx([sum(row) / max(len(row), 1) for row in costs])
    for b in range(rows):
        for t in range(tokens):
            expected = sum(map(trace.actions[b, t].tolist().count, RUNNING)) if t in real[b] else 0
            assert int(trace.depth[b, t]) == expected
    if count:
        share = trace.layer_share
        torch.testing.assert_close(sum(share.values()), torch.ones(trace.actions.shape[2]))
        taken = [trace.actions[b, t].tolist() for b in range(rows) for t in real[b]]
        for place, action in enumerate(DEFAULT_TABLE):
            expected = [sum(token[layer] == place for token in taken) / count for layer in range(len(taken[0]))]
            assert share[action.name].tolist() == pytest.approx(expected)


@given(traces, st.data())
@relaxed
def test_cutting_and_joining_in_time_changes_nothing(trace, data):
    tokens = trace.cost.shape[1]
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=4)))
    parts = [trace.tokens(a, b) for a, b in zip([0, *cuts], [*cuts, tokens], strict=True)]
    assert same(ExecutionTrace.concatenate(parts), trace)


@given(traces, st.data())
@relaxed
def test_rows_are_taken_in_order(trace, data):
    index = data.draw(st.lists(st.integers(0, len(trace.cost) - 1), min_size=1, max_size=6))
    taken = trace.rows(torch.tensor(index))
    for new, old in enumerate(index):
        assert same(taken.rows(torch.tensor([new])), trace.rows(torch.tensor([old])))


def test_summary_says_what_was_spent():
    trace = one_row([[PROCESS] * 4, [PROCESS, SKIP, SKIP, EXIT], [SKIP] * 4])
    trace = ExecutionTrace(trace.actions, torch.tensor([[1.0, 0.4, 0.1]]), trace.valid, 0.25, "flops")
    assert trace.summary() == (
        "3 tokens, mean cost 0.500 of the whole model (unit flops, floor 0.250), mean depth 1.7 of 4 layers"
    )


def test_heads_that_were_not_full_are_told():
    table = DEFAULT_TABLE.with_precisions(["int8", "int4"])
    trace = one_row([[PROCESS, table.place("INT8")], [table.place("INT4"), table.place("INT8")], [SKIP] * 2, [PROCESS] * 2])
    full, int4, int8 = (table.heads.index(name) for name in ("full", "int4", "int8"))
    for head, valid, told in (
        (None, [True] * 4, ""),
        ([full] * 4, [True] * 4, ""),
        ([full, int8, int8, int8], [True] * 4, "head int8 for 75% of the tokens"),
        ([int4, full, int4, int8], [True, True, True, False], "head int4 for 67% of the tokens"),
        ([int4, int8, full, full], [True] * 4, "head int4 for 25%, int8 for 25% of the tokens"),
    ):
        own = replace(trace, table=table, head=None if head is None else torch.tensor([head], dtype=torch.uint8))
        own = own.keep(torch.tensor([valid]))
        end, lines = own.summary().rpartition("layers")[2], own.render().splitlines()
        assert end == (told and f", {told}") and (told in lines if told else "head" not in own.render())
        assert sum(own.head_share.values()) == pytest.approx(1.0)
    assert lines[-1] == "'█' PROCESS  '▓' INT8  '▒' INT4  '·' SKIP"  # dearest first
    assert "head int8 for 50%" in own.tokens(1, 3).render() and "head int8 for 33%" in own.render(width=3)


def test_an_empty_trace_can_be_summarised_and_drawn():
    empty = random_trace(2, 5, 3, 0).tokens(0, 0)
    assert empty.mean_cost == 0.0 and empty.row_cost.tolist() == [0.0, 0.0]
    assert empty.summary().startswith("0 tokens, mean cost 0.000")
    padding = one_row([[PROCESS] * 3] * 2, valid=[False, False])
    assert "0 tokens" in padding.summary() and len(padding.render().splitlines()) == 3 + 1


@given(traces, st.integers(1, 12))
@relaxed
def test_the_drawing_has_every_action_of_the_last_tokens(trace, width):
    lines = trace.render(row=0, width=width).splitlines()
    tokens = [t for t in range(trace.cost.shape[1]) if trace.valid[0, t]][-width:]
    layers = trace.actions.shape[2]
    assert len(lines) == layers + 1 + bool(tokens)
    for line, layer in zip(lines, reversed(range(layers)), strict=False):
        number, drawn, share = line.split("|")
        taken = trace.actions[0, tokens, layer].tolist()
        assert int(number) == layer and drawn == "".join(DEFAULT_TABLE[value].symbol for value in taken)
        if tokens:
            assert share.strip() == f"{sum(map(taken.count, RUNNING)) / len(taken):.0%}"
    if tokens:
        taken = trace.actions[0, tokens].unique().tolist()
        legend = [f"{DEFAULT_TABLE[place].symbol!r} {DEFAULT_TABLE[place].name}" for place in DEAREST_FIRST if place in taken]
        assert lines[-1] == "  ".join(legend)


@pytest.mark.parametrize("layers", [1, 3, 10, 30])
def test_depths_are_drawn_in_whole_tenths(layers):
    columns = [[RUNNING[count % 2]] * count + [SKIP] * (layers - count) for count in range(layers + 1)]
    drawn = one_row(columns).render().splitlines()[-2].split("|")[1]
    assert drawn == "".join(str(min(10 * count // layers, 9)) for count in range(layers + 1))
