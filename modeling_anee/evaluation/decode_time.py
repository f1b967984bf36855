"""Milliseconds of a token that is decoded at batch 1: all ways to spend a budget on the same tokens, in turn, medians.

A text's own tokens are fed one after the other, so every way runs the same ones, whatever it would have said itself. They come
from as many windows as possible, since a router spends more on one stretch of a text than on another.
"""

import math
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
    """How much is timed.

    Args:
        tokens: of a round, at least.
        repeats: rounds.
        context: tokens of a window before those that are timed.
    """

    tokens: int = 24
    repeats: int = 3
    context: int = 32

    def places(self, windows: int) -> range:
        """Where in each of the windows that are taken those are that are timed."""
        return range(self.context, self.context + math.ceil(self.tokens / min(windows, self.tokens)))


@torch.no_grad()
def decode_times(feeds: dict[Key, list[Feed]], timing: Timing) -> dict[Key, float]:
    """Milliseconds of a token, the median over the rounds, of everything that is fed; after one round that is not counted."""
    cases: dict[Key, Callable[[], float]] = {}
    count = 0
    for key, own in feeds.items():
        places = timing.places(len(own))
        caches = [feed(slice(0, places.start), None) for feed in own]
        cases[key] = partial(seconds_of, partial(_decode, own, caches, places))
        count = len(own) * len(places)
    seconds = interleave(cases, timing.repeats)
    return {key: statistics.median(own) * 1e3 / count for key, own in seconds.items()}


def _decode(feeds: list[Feed], caches: list[AneeCache], places: range) -> None:
    """Run tokens of each window one by one, and forget them."""
    for feed, cache in zip(feeds, caches, strict=True):
        for place in places:
            feed(slice(place, place + 1), cache)
        cache.crop(-len(places))


@torch.no_grad()
def feeds_of(
    models: dict[str, AneeForCausalLM],
    budgets: Sequence[float],
    uniform: Sequence[Uniform],
    windows: Sequence[Window],
    timing: Timing,
) -> dict[tuple[str, float], list[Feed]]:
    """What feeds the first tokens of windows, by the name and the budget that a row of `comparison.compare` has."""
    first = next(iter(models.values()))
    texts = texts_of(windows, timing, first.device)
    feeds = {("base", 1.0): [feed_of(first, ids, 1.0) for ids in texts]}
    feeds |= {(one.name, one.cost): [feed_of(one.model, ids, one.budget) for ids in texts] for one in uniform}
    listed = controls(first)
    for budget in budgets:
        feeds |= {(one.name, budget): [feed_of_control(first, one, ids, budget) for ids in texts] for one in listed}
        feeds |= {(name, budget): [feed_of(model, ids, budget) for ids in texts] for name, model in models.items()}
    return feeds


def texts_of(windows: Sequence[Window], timing: Timing, device: torch.device) -> list[Tensor]:
    """The beginnings of some of the windows that hold all that is timed, int64 [1, T] each."""
    chosen = windows[:: math.ceil(len(windows) / timing.tokens)]
    stop = timing.places(len(chosen)).stop
    return [window.ids[:stop].unsqueeze(0).to(device) for window in chosen]


def times_at(model: AneeForCausalLM, budgets: Sequence[float], windows: Sequence[Window], timing: Timing) -> dict[float, float]:
    """Milliseconds of a token of a model by its budget."""
    texts = texts_of(windows, timing, model.device)
    return decode_times({budget: [feed_of(model, ids, budget) for ids in texts] for budget in budgets}, timing)


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
