"""What a running `generate` knows: the budgets of its rows, where the prompt ends, which rows have ended.

It is kept beside the model's keyword arguments, not among them. So whatever calls the model inside `generate` runs at the
budget of the generation: the decoding loop, a logits processor with a forward of its own, a wrapper such as PEFT's.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StoppingCriteriaList

from .budget import budget_tensor, moved_budget
from .budget_following import Following
from .execution_log import execution_log
from .lossless_account import LosslessAccount
from .timing import now
from .trace import ExecutionTrace


NEVER = torch.iinfo(torch.int64).max


@dataclass
class GenerationState:
    """State of one call of `generate`.

    Args:
        model: whose call it is.
        given: what was asked for: values of `energy_budget`, `prompt_energy_budget` and `budget_feedback` by name.
        capacity: what was asked for instead of an `energy_budget`.
        budget: budget of each row's new tokens, float64 [B], on the CPU.
        prompt_budget: the same for tokens of the prompt; None: as for new ones.
        feedback: by how much of what was under- or overspent the next budget is moved, float64 [B]; None: not at all.
        prompt_length: tokens of the prompt, padding included.
        embedded: how many of them were given as embeddings alone, without token ids.
        steps: traces of the forwards, where there is no cache that keeps them.
        prepared: whether the base was looked at, see `AneePreTrainedModel.prepare`.
        lengths: of each row's token ids when the row had ended, int64 [B]; `NEVER` before.
        lossless: what becomes of drafts, where they were asked for.
        source: what is asked for each token's budget, if anything is.
        following: the same while the generation runs.
        begun: when it began.
    """

    model: Any
    given: dict[str, Any] = field(default_factory=dict)
    capacity: Any = None
    budget: Tensor | None = None
    prompt_budget: Tensor | None = None
    feedback: Tensor | None = None
    prompt_length: int = 0
    embedded: int = 0
    steps: list[ExecutionTrace] = field(default_factory=list)
    prepared: bool = False
    lengths: Tensor | None = None
    lossless: LosslessAccount | None = None
    source: Any = None
    following: Following | None = None
    begun: float = field(default_factory=now)

    @property
    def prompt_ids(self) -> int:
        """Tokens of the prompt that have ids."""
        return self.prompt_length - self.embedded

    def expand(self, times: int) -> None:
        """Repeat every row: beams, or several sequences for one prompt."""
        for name in ("budget", "prompt_budget", "feedback"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.repeat_interleave(times))

    def budgets(self, rows: int, tokens: int, past: int, cache: Cache | None) -> Tensor:
        """Budgets of the new tokens of a forward, float64 [B] or, where those of prompt and new tokens differ, [B, T].

        Raises:
            ValueError: feedback or a source without a cache, other rows than those of the generation while their budgets
                differ, or a source that says something else than budgets.
        """
        assert self.budget is not None
        budget = self._of_rows(self.budget, rows) if self.following is None else self._followed(self.following, rows, cache)
        if self.feedback is not None:
            if cache is None:
                raise ValueError("budget_feedback is not possible with use_cache=False: the cache has the costs of the tokens")
            if past >= self.prompt_length:
                cost = execution_log(cache).cost_since(self.prompt_length)
                budget = moved_budget(budget, self._of_rows(self.feedback, rows), cost, past - self.prompt_length)
        if self.prompt_budget is None or past >= self.prompt_length:
            return budget
        in_prompt = torch.arange(past, past + tokens, device="cpu") < self.prompt_length
        return torch.where(in_prompt, self._of_rows(self.prompt_budget, rows)[:, None], budget[:, None])

    def _followed(self, following: Following, rows: int, cache: Cache | None) -> Tensor:
        """What the source says, float64 [B]."""
        if cache is None:
            raise ValueError(
                f"energy_budget={self.source!r} is not possible with use_cache=False: the cache has the costs of the tokens"
            )
        budget = budget_tensor(following.budget(cache), rows, f"energy_budget of {self.source!r}")
        if budget.dim() > 1:
            raise ValueError(f"energy_budget of {self.source!r} has a value for each token: it must be one for each row")
        following.said(float(budget.mean()))
        return budget

    @staticmethod
    def _of_rows(values: Tensor, rows: int) -> Tensor:
        if len(values) == rows:
            return values
        if bool((values != values[0]).any()):
            raise ValueError(
                f"a forward of {rows} rows inside a generation of {len(values)} rows is not possible while their budgets "
                f"differ: {values.tolist()}"
            )
        return values[:1].expand(rows)

    def without_ended(self, trace: ExecutionTrace, places: Tensor) -> ExecutionTrace:
        """A trace with what ran for a row after its last token as padding.

        Args:
            trace: of the tokens in the cache.
            places: where they are there, int64 [T].
        """
        if self.lengths is None or len(self.lengths) != len(trace.cost):
            return trace
        last = self.lengths - 1 + self.embedded  # the row's last token needs no forward
        kept = places < last.unsqueeze(1)
        return trace if bool(kept.all()) else trace.keep(kept)


_running: contextvars.ContextVar[GenerationState | None] = contextvars.ContextVar("anee_generation", default=None)


@contextlib.contextmanager
def running(state: GenerationState) -> Iterator[None]:
    """Inside, forwards of the model belong to a generation."""
    token = _running.set(state)
    try:
        yield
    finally:
        _running.reset(token)
        if state.following is not None:
            state.following.end()


def generation_of(model: Any) -> GenerationState | None:
    """The innermost running generation, if it is this model's."""
    state = _running.get()
    return state if state is not None and state.model is model else None


class NotingCriteria(StoppingCriteriaList):
    """Stopping criteria that note at which length each row ended, and tell a source of budgets that a step is over."""

    def __init__(self, criteria: StoppingCriteriaList, state: GenerationState) -> None:
        super().__init__(criteria)
        self._state = state

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Whether each row is done, bool [B]."""
        done: Any = super().__call__(input_ids, scores, **kwargs)
        lengths = self._state.lengths
        if lengths is None or len(lengths) != len(done):
            lengths = torch.full((len(done),), NEVER, device="cpu")
        self._state.lengths = torch.where((lengths == NEVER) & done.cpu(), input_ids.shape[1], lengths)
        if self._state.following is not None:
            self._state.following.passed(input_ids.shape[1] - self._state.prompt_ids)
        return done
