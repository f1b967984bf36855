"""The trace of the tokens in a cache, kept in the cache so that it follows whatever is done to it."""

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DummyLayer

from .trace import ExecutionTrace


class ExecutionLog(DummyLayer):
    """An extra cache layer that holds no keys, but the trace of the tokens in the cache.

    Being a layer, it follows every reorder, crop, repeat and select. Reorders are kept apart from the steps and
    applied when the trace is read, so that a finished beam can still be followed through steps that it has left.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[ExecutionTrace] = []
        self._orders: list[Tensor | None] = []  # rows taken after each step
        self._sums: dict[int, Tensor] = {}  # what `cost_since` has answered, kept up to date

    def append(self, trace: ExecutionTrace) -> None:
        """Add the trace of one forward."""
        self._sums = {start: cost + self._cost_of(trace, self._length - start) for start, cost in self._sums.items()}
        self.steps.append(trace)
        self._orders.append(None)

    def cost_since(self, start: int) -> Tensor:
        """Cost of each row's tokens from the one at `start` on, float64 [B]; the rows as they stand in the cache."""
        if start not in self._sums:
            done, cost = 0, torch.zeros(1, dtype=torch.float64)
            for step, order in zip(self.steps, self._orders, strict=True):
                cost = cost + self._cost_of(step, done - start)
                cost = cost if order is None else cost[order]
                done += step.cost.shape[1]
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
    def _length(self) -> int:
        return sum(step.cost.shape[1] for step in self.steps)

    @staticmethod
    def _cost_of(trace: ExecutionTrace, begin: int) -> Tensor:
        """Cost of the tokens of a step whose first one is at `begin`, those before 0 left out, float64 [B]."""
        return trace.cost[:, max(-begin, 0) :].sum(dim=1, dtype=torch.float64)

    @property
    def trace(self) -> ExecutionTrace | None:
        """Trace of the rows as they stand in the cache, over all steps."""
        if not self.steps:
            return None
        if len(self.steps) > 1 or self._orders[0] is not None:
            order, parts = None, []
            for step, after in zip(reversed(self.steps), reversed(self._orders), strict=True):
                order = after if order is None else order if after is None else after[order]
                parts.append(step if order is None else step.rows(order))
            self._replace(ExecutionTrace.concatenate(parts[::-1]))
        return self.steps[0]

    def reset(self) -> None:
        """Forget every step."""
        self.steps, self._orders, self._sums = [], [], {}

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        trace = self.trace
        if tokens_to_remove and trace is not None:
            self._replace(trace.tokens(None, max(trace.cost.shape[1] + tokens_to_remove, 0)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows at `beam_idx`."""
        if self.steps:
            beam_idx = beam_idx.cpu()
            last = self._orders[-1]
            self._orders[-1] = beam_idx if last is None else last[beam_idx]
            self._sums = {start: cost[beam_idx] for start, cost in self._sums.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if (trace := self.trace) is not None:
            self._replace(trace.rows(torch.arange(len(trace.cost)).repeat_interleave(repeats)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows at `indices`."""
        if (trace := self.trace) is not None:
            self._replace(trace.rows(indices.cpu()))

    def _replace(self, trace: ExecutionTrace) -> None:
        self.steps, self._orders, self._sums = [trace], [None], {}


def execution_log(cache: Cache) -> ExecutionLog:
    """The log of any cache; one is added to a cache that has none."""
    last = cache.layers[-1] if cache.layers else None
    if isinstance(last, ExecutionLog):
        return last
    cache.layers.append(log := ExecutionLog())
    return log


def account_of(cache: Cache | None) -> Tensor | float:
    """What each row in a cache has spent above its budgets, float64 [B, 1]; 0.0 where nothing is known."""
    last = cache.layers[-1] if cache is not None and cache.layers else None
    return last.account if isinstance(last, ExecutionLog) else 0.0
