"""Milliseconds of a token that is decoded at batch 1: all ways to spend a budget on the same tokens, in turn, medians.

A text's own tokens are fed one after the other, so every way runs the same ones, whatever it would have said itself.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..cache import AneeCache
from ..data.windows import Window
from ..modeling_anee import AneeForCausalLM
from ..timing import Key, interleave, seconds_of
from .controls import Control, controls
from .uniform import Uniform


# Runs some of a text's tokens, those before them being in a cache, and gives it; None: there are none before them.
Feed = Callable[[slice, AneeCache | None], AneeCache]


@dataclass(frozen=True)
class Timing:
    """How long is timed: `tokens` in a row, after as many that are not, in each of `repeats` rounds."""

    tokens: int = 24
    repeats: int = 3


@torch.no_grad()
def decode_times(feeds: dict[Key, Feed], timing: Timing) -> dict[Key, float]:
    """Milliseconds of a token, the median over the rounds, of everything that is fed; after one round that is not counted."""
    start, stop = timing.tokens, 2 * timing.tokens
    cases: dict[Key, Callable[[], float]] = {}
    for key, feed in feeds.items():
        cache = feed(slice(0, start), None)
        cases[key] = partial(seconds_of, partial(_decode, feed, cache, start, stop))
    seconds = interleave(cases, timing.repeats)
    return {key: statistics.median(own) * 1e3 / timing.tokens for key, own in seconds.items()}


def _decode(feed: Feed, cache: AneeCache, start: int, stop: int) -> None:
    """Run tokens one by one, and forget them."""
    for place in range(start, stop):
        feed(slice(place, place + 1), cache)
    cache.crop(start - stop)


@torch.no_grad()
def feeds_of(
    models: dict[str, AneeForCausalLM], budgets: Sequence[float], uniform: Sequence[Uniform], window: Window, timing: Timing
) -> dict[tuple[str, float], Feed]:
    """What feeds a window's first tokens, by the name and the budget that a row of `comparison.compare` has."""
    first = next(iter(models.values()))
    ids = window.ids[: 2 * timing.tokens].unsqueeze(0).to(first.device)
    feeds: dict[tuple[str, float], Feed] = {("base", 1.0): feed_of(first, ids, 1.0)}
    feeds |= {(one.name, one.cost): feed_of(one.model, ids, one.budget) for one in uniform}
    listed = controls(first)
    for budget in budgets:
        feeds |= {(control.name, budget): feed_of_control(first, control, ids, budget) for control in listed}
        feeds |= {(name, budget): feed_of(model, ids, budget) for name, model in models.items()}
    return feeds


def feed_of(model: AneeForCausalLM, ids: Tensor, budget: float) -> Feed:
    """A model at a budget, deciding itself; ids int64 [1, T]."""

    def feed(places: slice, cache: AneeCache | None) -> AneeCache:
        return model(ids[:, places], cache=cache, energy_budget=budget, use_cache=True, logits_to_keep=1).cache

    return feed


def feed_of_control(model: AneeForCausalLM, control: Control, ids: Tensor, budget: float) -> Feed:
    """What a control decides for ids int64 [1, T] at once; deciding takes no time."""
    _, actions, head = control.run(ids, budget)

    def feed(places: slice, cache: AneeCache | None) -> AneeCache:
        model.prepare()
        if cache is None:
            cache = AneeCache(model.stack.blocks)
        hidden, step = model.begin(input_ids=ids[:, places], cache=cache, energy_budget=0.0)
        hidden, _ = control.executor_of(model).run(hidden, step, given=actions[:, places])
        model.head_logits(model.stack.final_norm(hidden[:, -1:]), None if head is None else head[:, places][:, -1:])
        return cache

    return feed
