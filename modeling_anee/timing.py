"""Wall-clock: seconds of a call, cases that are run in turn, and how fast a model decodes."""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer


Key = TypeVar("Key")  # what a case is known by
Measure = TypeVar("Measure")


def now() -> float:
    """Seconds of the clock that all of this goes by."""
    return perf_counter()


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds that a call takes, until what it started on an accelerator is done."""
    _synchronize()
    begin = perf_counter()
    call()
    _synchronize()
    return perf_counter() - begin


def interleave(cases: dict[Key, Callable[[], Measure]], rounds: int) -> dict[Key, list[Measure]]:
    """What each case measures of itself in each round, run in turn, after one uncounted round."""
    measured: dict[Key, list[Measure]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            one = case()
            if number:
                measured[name].append(one)
    return measured


def ratios(reference: Sequence[float], own: Sequence[float]) -> list[float]:
    """How much faster than a reference a case is in each round, from the seconds of both."""
    return [one / other for one, other in zip(reference, own, strict=True)]


def greedy(new_tokens: int) -> dict[str, Any]:
    """Arguments under which `generate` decodes so many tokens, whatever they are."""
    return {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}


def decode_seconds(model: Any, inputs: dict[str, Tensor], new_tokens: int, **options: Any) -> float:
    """Seconds of each new token of a row but the first, which comes with the prompt.

    Args:
        model: whatever has the `generate` of transformers.
        inputs: token ids and mask, [B, T].
        new_tokens: how many are decoded, at least 2.
        options: of `generate`.
    """
    clock = TokenClock()
    model.generate(**inputs, **greedy(new_tokens), num_beams=1, num_return_sequences=1, streamer=clock, **options)
    return clock.seconds_per_token


class TokenClock(BaseStreamer):
    """Notes when new tokens come; `generate` hands them over on the CPU, so what made them is done."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        """Note the time; the first call has the prompt."""
        self._times.append(perf_counter())
        self._tokens.append(value.shape[-1] if value.dim() > 1 else 1)

    def end(self) -> None:
        """Nothing to flush."""

    @property
    def decoded(self) -> int:
        """New tokens after the first, or after those that came together with it."""
        return sum(self._tokens[2:])

    @property
    def seconds_per_token(self) -> float:
        """Between the first new token and the last."""
        return (self._times[-1] - self._times[1]) / self.decoded


def _synchronize() -> None:
    """Wait for what still runs on an accelerator when its call has returned."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
