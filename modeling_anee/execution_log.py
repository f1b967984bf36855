"""The trace of the tokens in a cache, kept beside the cache so that it follows whatever is done to it."""

import copy
from dataclasses import replace
from functools import cache as memoize
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from .trace import ExecutionTrace


class ExecutionLog:
    """Traces of the forwards that filled a cache, and at which of its tokens each of them began.

    Tokens that something else has put there are not known. Reorders are kept apart from the steps and applied when the trace is
    read, so that a finished beam can still be followed through steps that it has left.
    """

    def __init__(self) -> None:
        self.steps: list[ExecutionTrace] = []
        self._starts: list[int] = []  # place in the cache of each step's first token
        self._orders: list[Tensor | None] = []  # rows taken after each step
        self._sums: dict[int, Tensor] = {}  # what `cost_since` has answered, kept up to date
        self._discarded: Tensor | None = None  # cost of each row's tokens that are not in the cache any more, float64 [B]

    def spend(self, cost: Tensor | float) -> None:
        """Note what each row, float64 [B], has spent on tokens that are not in the cache."""
        if self.steps:
            before = self._discarded
            if before is None or len(before) != self._rows:  # emptied, and begun again with other rows
                before = torch.zeros(self._rows, dtype=torch.float64, device="cpu")
            self._discarded = before + cost

    def append(self, trace: ExecutionTrace, start: int) -> None:
        """Add the trace of one forward whose first token is at `start` in the cache."""
        self.trim(start)
        self._sums = {since: cost + _cost(trace, since - start) for since, cost in self._sums.items()}
        self.steps.append(trace)
        self._starts.append(start)
        self._orders.append(None)

    def cost_since(self, start: int) -> Tensor:
        """Cost of each row's tokens from the one at `start` in the cache on, float64 [B]; the rows as they stand there."""
        if start not in self._sums:
            cost = torch.zeros(1, dtype=torch.float64, device="cpu")
            for step, begin, order in zip(self.steps, self._starts, self._orders, strict=True):
                cost = cost + _cost(step, start - begin)
                cost = cost if order is None else cost[order]
            self._sums[start] = cost
        return self._sums[start]

    @property
    def account(self) -> Tensor | float:
        """What each row has spent above its budgets, as it stands in the cache, float64 [B, 1]; 0.0 where none was kept."""
        if not self.steps or self.steps[-1].account is None or not self.steps[-1].account.shape[1]:
            return 0.0
        last, order = self.steps[-1].account[:, -1:], self._orders[-1]
        return last if order is None else last[order]

    @property
    def places(self) -> Tensor:
        """Where the tokens of `trace` are in the cache, int64 [T]."""
        parts = zip(self.steps, self._starts, strict=True)
        spans = [torch.arange(start, start + step.cost.shape[1], device="cpu") for step, start in parts]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64, device="cpu")

    @property
    def trace(self) -> ExecutionTrace | None:
        """Trace of the rows as they stand in the cache, over all steps; None before the first."""
        return self.whole if self.steps else None

    @property
    def whole(self) -> ExecutionTrace:
        """The same where there is a step."""
        steps = self._settled()
        whole = ExecutionTrace.concatenate(steps) if len(steps) > 1 else steps[0]
        known = self._discarded is not None and len(self._discarded) == len(whole.cost)
        return replace(whole, discarded=self._discarded) if known else whole

    def reset(self) -> None:
        """Forget every step."""
        self.steps, self._starts, self._orders, self._sums, self._discarded = [], [], [], {}, None

    def trim(self, length: int) -> None:
        """Forget the tokens from the one at `length` in the cache on, but not what they cost."""
        if not self.steps or self._starts[-1] + self.steps[-1].cost.shape[1] <= length:
            return
        self.spend(self.cost_since(length))
        left = [
            (step if begin + step.cost.shape[1] <= length else step.tokens(None, length - begin), begin)
            for step, begin in zip(self._settled(), self._starts, strict=True)
            if begin < length
        ]
        self._replace([step for step, _ in left], [begin for _, begin in left])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows at `beam_idx`."""
        if self.steps:
            beam_idx = beam_idx.cpu()
            last = self._orders[-1]
            self._orders[-1] = beam_idx if last is None else last[beam_idx]
            self._sums = {start: cost[beam_idx] for start, cost in self._sums.items()}
            self._discarded = None if self._discarded is None else self._discarded[beam_idx]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.steps:
            self.batch_select_indices(torch.arange(self._rows, device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows at `indices` (positions or a mask)."""
        self._discarded = None if self._discarded is None else self._discarded[indices.cpu()]
        self._replace([step.rows(indices.cpu()) for step in self._settled()], self._starts)

    @property
    def _rows(self) -> int:
        order = self._orders[-1]
        return len(self.steps[-1].cost if order is None else order)

    def _settled(self) -> list[ExecutionTrace]:
        """The steps with their rows as they stand in the cache."""
        order, settled = None, []
        for step, after in zip(reversed(self.steps), reversed(self._orders), strict=True):
            order = after if order is None else order if after is None else after[order]
            settled.append(step if order is None else step.rows(order))
        return settled[::-1]

    def _replace(self, steps: list[ExecutionTrace], starts: list[int]) -> None:
        self.steps, self._starts, self._orders, self._sums = steps, starts, [None] * len(steps), {}


def _cost(trace: ExecutionTrace, begin: int) -> Tensor:
    """Cost of each row's tokens of one forward, those before `begin` left out, float64 [B]."""
    return trace.cost[:, max(begin, 0) :].sum(dim=1, dtype=torch.float64)


if TYPE_CHECKING:
    _Followed = Cache
else:
    _Followed = object


class LoggedCache(_Followed):
    """Mixed into the class of a cache: an `ExecutionLog` that follows every reorder, crop, repeat and select."""

    execution_log: ExecutionLog

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self.execution_log.reset()

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Forget the last tokens."""
        super().crop(*args, **kwargs)
        self.execution_log.trim(int(self.get_seq_length()))

    def reorder_cache(self, beam_idx: Any) -> None:
        """Take the rows at `beam_idx`."""
        super().reorder_cache(beam_idx)
        self.execution_log.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.execution_log.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows at `indices`."""
        super().batch_select_indices(indices)
        self.execution_log.batch_select_indices(indices)


class _FollowedCache(LoggedCache):
    """The same for a cache of the user's, whose own class comes after this one."""

    _plain: type[Cache]

    def __deepcopy__(self, memo: dict[int, Any]) -> "_FollowedCache":
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as what it was, so that whoever reads it needs nothing of ours."""
        return object.__new__, (self._plain,), {name: x for name, x in self.__dict__.items() if name != "execution_log"}


@memoize
def _followed(kind: Any) -> Any:
    return type(kind.__name__, (_FollowedCache, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__, "_plain": kind})


def execution_log(cache: Cache) -> ExecutionLog:
    """The log of any cache. A cache without one gets it, and a class that makes it follow the cache; its layers stay."""
    if not isinstance(cache, LoggedCache):
        kind: Any = type(cache)
        cache.__class__ = _followed(kind)
        cache.execution_log = ExecutionLog()  # type: ignore[attr-defined]
    return cache.execution_log  # type: ignore[attr-defined]


def account_of(cache: Cache | None) -> Tensor | float:
    """What each row in a cache has spent above its budgets, float64 [B, 1]; 0.0 where nothing is known."""
    return cache.execution_log.account if isinstance(cache, LoggedCache) else 0.0
