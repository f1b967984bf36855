"""The log of a cache tells the same as lists of tokens on which the same was done."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from modeling_anee.execution_log import ExecutionLog, execution_log
from modeling_anee.trace import ExecutionTrace


LAYERS = 3
Token = tuple[tuple[int, ...], float, bool]

operations = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 4)),
    st.tuples(st.just("reorder"), st.integers(0, 2**31)),
    st.tuples(st.just("crop"), st.integers(0, 5)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("select"), st.integers(1, 2**31)),
    st.tuples(st.just("select by mask"), st.integers(1, 2**31)),
    st.tuples(st.just("read"), st.just(0)),
    st.tuples(st.just("cost since"), st.integers(0, 6)),
    st.tuples(st.just("copy"), st.just(0)),
    st.tuples(st.just("reset"), st.just(0)),
)


class ListsOfTokens:
    """What the log must tell, kept in the plainest way; `log` and this take the same operations."""

    def __init__(self, rows: int) -> None:
        self.log = ExecutionLog()
        self.rows: list[list[Token]] = [[] for _ in range(rows)]
        self.generator = torch.Generator().manual_seed(0)

    def do(self, name: str, number: int) -> None:
        count = len(self.rows)
        seeded = torch.Generator().manual_seed(number)
        if name == "append":
            trace = random_trace(count, number, self.generator)
            self.log.append(trace, max(map(len, self.rows)))
            for row, tokens in zip(self.rows, tokens_of(trace), strict=True):
                row += tokens
        elif name == "reorder":
            order = torch.randint(0, count, (count,), generator=seeded)
            self.log.reorder_cache(order)
            self.rows = [list(self.rows[i]) for i in order.tolist()]
        elif name == "crop":
            self.log.trim(max(len(self.rows[0]) - number, 0))
            self.rows = [row[: max(len(row) - number, 0)] for row in self.rows]
        elif name == "repeat" and count * number <= 6:
            self.log.batch_repeat_interleave(number)
            self.rows = [list(row) for row in self.rows for _ in range(number)]
        elif name == "select":
            index = torch.randperm(count, generator=seeded)[: 1 + number % count]
            self.log.batch_select_indices(index)
            self.rows = [list(self.rows[i]) for i in index.tolist()]
        elif name == "select by mask":
            mask = torch.tensor([i == number % count or bool(number >> i & 1) for i in range(count)])
            self.log.batch_select_indices(mask)
            self.rows = [row for row, kept in zip(self.rows, mask.tolist(), strict=True) if kept]
        elif name == "copy":
            self.log = copy.deepcopy(self.log)
        elif name == "reset":
            self.log.reset()
            self.rows = [[] for _ in self.rows]
        elif name == "read":
            self.check()
        elif name == "cost since":
            self.check_cost_since(number)

    def check(self) -> None:
        trace = self.log.trace
        if trace is None:
            assert self.rows == [[] for _ in self.rows]
        else:
            assert tokens_of(trace) == self.rows

    def check_cost_since(self, start: int) -> None:
        expected = [sum(cost for _, cost, _ in row[start:]) for row in self.rows]
        found = self.log.cost_since(start)
        assert found.dtype == torch.float64 and found.expand(len(expected)).tolist() == pytest.approx(expected)


def random_trace(rows: int, tokens: int, generator: torch.Generator) -> ExecutionTrace:
    actions = torch.randint(0, 3, (rows, tokens, LAYERS), generator=generator, dtype=torch.uint8)
    cost = torch.rand(rows, tokens, generator=generator)
    return ExecutionTrace(actions, cost, cost > 0.2, 0.1, "bytes")


def tokens_of(trace: ExecutionTrace) -> list[list[Token]]:
    rows, tokens = trace.cost.shape
    return [
        [(tuple(trace.actions[b, t].tolist()), float(trace.cost[b, t]), bool(trace.valid[b, t])) for t in range(tokens)]
        for b in range(rows)
    ]


@given(st.integers(1, 4), st.lists(operations, max_size=14))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_any_program_gives_the_trace_of_lists_of_tokens(rows, program):
    lists = ListsOfTokens(rows)
    for name, number in program:
        lists.do(name, number)
    for start in (0, 3):
        lists.check_cost_since(start)
    lists.check()
    lists.check()  # reading changes nothing


def test_reorders_leave_the_steps_as_they_were_run():
    log, generator = ExecutionLog(), torch.Generator().manual_seed(0)
    steps = [random_trace(3, 1, generator) for _ in range(4)]
    for place, step in enumerate(steps):
        log.append(step, place)
        log.reorder_cache(torch.tensor([2, 0, 0]))
        log.cost_since(2)
    assert [id(step) for step in log.steps] == [id(step) for step in steps]


def test_a_copy_goes_its_own_way():
    lists = ListsOfTokens(2)
    lists.do("append", 3)
    twin = copy.deepcopy(lists.log)
    lists.do("crop", 2)
    lists.do("append", 1)
    assert twin.trace.cost.shape == (2, 3)
    lists.check()


def test_an_empty_log_takes_every_operation():
    log = ExecutionLog()
    log.reorder_cache(torch.tensor([1, 0]))
    log.batch_repeat_interleave(2)
    log.batch_select_indices(torch.tensor([0]))
    log.trim(0)
    log.reset()
    assert log.trace is None and log.steps == []


def test_a_log_follows_a_cache_of_the_users_and_leaves_its_layers_alone():
    cache, generator = DynamicCache(), torch.Generator().manual_seed(0)
    keys = torch.rand(2, 1, 5, 4)
    for layer in range(2):
        cache.update(keys, keys, layer)
    trace = random_trace(2, 5, generator)
    log = execution_log(cache)
    assert execution_log(cache) is log and len(cache) == len(list(cache)) == 2
    assert isinstance(cache, DynamicCache) and type(cache).__name__ == "DynamicCache"
    log.append(trace, 0)
    cache.crop(-2)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert tokens_of(log.trace) == [row[:3] for row in reversed(tokens_of(trace))]
    assert cache.get_seq_length() == 3 and not cache.is_compileable
    cache.reset()
    assert log.trace is None


def test_a_copy_of_a_followed_cache_has_its_own_log_and_a_pickle_is_what_it_was():
    cache = DynamicCache()
    cache.update(torch.rand(1, 1, 3, 4), torch.rand(1, 1, 3, 4), 0)
    execution_log(cache).append(random_trace(1, 3, torch.Generator().manual_seed(0)), 0)
    twin = copy.deepcopy(cache)
    twin.crop(-1)
    assert execution_log(twin).trace.cost.shape == (1, 2) and execution_log(cache).trace.cost.shape == (1, 3)
    read = pickle.loads(pickle.dumps(cache))
    assert type(read) is DynamicCache and read.get_seq_length() == 3 and not hasattr(read, "execution_log")


def test_tokens_that_something_else_cached_are_not_counted():
    log, generator = ExecutionLog(), torch.Generator().manual_seed(0)
    step = random_trace(2, 3, generator)
    log.append(step, 10)  # ten tokens were there before
    torch.testing.assert_close(log.cost_since(11), step.cost[:, 1:].double().sum(dim=1))
    assert log.places.tolist() == [10, 11, 12]
    log.trim(12)
    assert log.trace.cost.shape == (2, 2)
    log.append(step, 11)  # a crop that nobody told of
    assert log.places.tolist() == [10, 11, 12, 13]
