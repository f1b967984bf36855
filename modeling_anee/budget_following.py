"""A budget source in one generation: asked once before each token, told what the tokens before took and cost."""

from typing import Any

import torch
from transformers import Cache

from .budget_sources import Ask, Passed, Progress
from .execution_log import execution_log
from .thread_choice import ThreadChoice
from .timing import now


class Following:
    """Asks a source, once for each step of a generation, however many forwards this has.

    Args:
        ask: the source, or what it begins a generation with.
        begun: when the generation began.
        budget: of the model, before the source has said anything.
        prompt_length: tokens of the prompt in the cache.
        floor: the lowest mean cost that the model can reach.
        choice: the number of threads, where it may change.

    Attributes:
        limit: new tokens that a row has at the end, at most; known once stopping criteria are.
    """

    def __init__(
        self,
        ask: Ask,
        begun: float,
        budget: float,
        prompt_length: int,
        floor: float,
        choice: ThreadChoice | None = None,
    ) -> None:
        self.limit, self._choice = 0, choice
        self._ask, self._begun, self._prompt_length, self._floor = ask, begun, prompt_length, floor
        self._answer: Any = None
        self._mean = budget
        self._tokens, self._noted = 0, 0
        self._work = 0.0
        self._ended = self._first = begun  # the last step, and the one that ran the prompt
        self._started = begun
        self._history: list[Passed] = []

    def budget(self, cache: Cache) -> Any:
        """What the source says of the next token."""
        if self._answer is None:
            self._note(cache)
            progress = self._progress()
            if self._choice is not None and self._history:
                self._choice.passed(self._history[-1].pace, progress.left)
            self._answer = self._ask(progress)
        return self._answer

    def said(self, mean: float) -> None:
        """Its answer was taken as numbers, of this mean."""
        self._mean = mean

    def passed(self, tokens: int) -> None:
        """A step is over, after so many new tokens of a row."""
        self._ended, self._answer = now(), None
        if self._tokens == 0:
            self._first = self._ended
        self._tokens = tokens

    def end(self) -> None:
        """The generation is over."""
        if self._choice is not None:
            self._choice.end()

    def _note(self, cache: Cache) -> None:
        """Add what the last step did to the history."""
        work = float(execution_log(cache).cost_since(self._prompt_length).mean())
        tokens = self._tokens - self._noted
        if self._noted and tokens > 0:
            cost, seconds = max(work - self._work, 0.0) / tokens, (self._ended - self._started) / tokens
            self._history.append(Passed(tokens, self._mean, cost, seconds, torch.get_num_threads()))
        self._noted, self._work, self._started = self._tokens, work, self._ended

    def _progress(self) -> Progress:
        return Progress(
            seconds=now() - self._begun,
            prompt_seconds=self._first - self._begun,
            tokens=self._tokens,
            limit=self.limit,
            budget=self._mean,
            work=self._work,
            floor=self._floor,
            history=self._history,
        )
