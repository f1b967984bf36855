"""How long drafting and verifying take on this machine: measured once for a base and its plans, and kept in the cache folder.

`ANEE_KERNELS=default` measures nothing: a token then takes as long as it reads bytes of weights.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .base_kernels import KERNELS_VARIABLE, machine
from .cache import AneeCache
from .compiled import library
from .draft_policy import MOST, Times
from .feed import Feed, StraightPlan
from .folders import keep, kept_file, read_kept
from .timing import interleave, seconds_of


logger = logging.get_logger("transformers.anee")  # follows the verbosity of transformers

VERIFIED = (1, 2, 4, 6, 8, 12, 16)  # tokens of a call of the full model that are measured; what lies between is interpolated
CONTEXT = 64  # tokens before them
ROUNDS = 5
DRAFTED = 4  # tokens one after the other
PER_TOKEN = 0.05  # of a call for one token, that each further one takes where nothing is measured


def times_of(model: Any, full: StraightPlan, plans: Sequence[StraightPlan], rows: int, anew: bool = False) -> list[Times]:
    """The times of each plan beside the full model, from the cache folder or, where it has none (or `anew`), measured.

    Args:
        model: whose plans these are.
        full: the whole model.
        plans: that draft.
        rows: of the batch.
        anew: measure even so.
    """
    if os.environ.get(KERNELS_VARIABLE) == "default":
        grown = [1.0 + PER_TOKEN * more for more in range(MOST + 1)]
        return [Times(grown, plan.weights_read) for plan in plans]
    file, names = kept_file("drafts", f"{machine()}.json"), [_name(model, rows, plan) for plan in (full, *plans)]
    known = {} if anew else read_kept(file)
    if not all(name in known for name in names):
        known = dict(zip(names, measure(model, full, plans, rows), strict=True))
        keep(file, known, "how long drafts take")
    verified = interpolated(known[names[0]])
    return [Times(verified, known[name][0]) for name in names[1:]]


@torch.no_grad()
def measure(model: Any, full: StraightPlan, plans: Sequence[StraightPlan], rows: int) -> list[list[float]]:
    """Seconds of the full model for each number of tokens of `VERIFIED`, then of one drafted token in each plan, in lists."""
    device, size = model.device, model.config.text_config.vocab_size
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(size, (rows, CONTEXT + max(VERIFIED)), generator=generator, device="cpu").to(device)
    feed = Feed(model.stack, AneeCache(model.stack.blocks), torch.zeros(1, 1, dtype=torch.int64, device=device))
    feed.run(ids[:, :CONTEXT], full)
    new = ids[:, CONTEXT:]
    cases: dict[Any, Any] = {count: partial(seconds_of, partial(_verify, feed, new[:, :count], full)) for count in VERIFIED}
    cases |= {plan.text: partial(seconds_of, partial(_draft, feed, new[:, :DRAFTED], plan)) for plan in plans}
    shortest = {name: min(seconds) for name, seconds in interleave(cases, ROUNDS).items()}  # what else runs only adds to it
    return [[shortest[count] for count in VERIFIED], *([shortest[plan.text] / DRAFTED] for plan in plans)]


def _verify(feed: Feed, ids: torch.Tensor, plan: StraightPlan) -> None:
    feed.run(ids, plan)
    feed.rewind(ids.shape[1])


def _draft(feed: Feed, ids: torch.Tensor, plan: StraightPlan) -> None:
    for token in ids.split(1, dim=1):
        feed.run(token, plan)
    feed.rewind(ids.shape[1])


def interpolated(seconds: Sequence[float]) -> list[float]:
    """Seconds for 1, 2, ..., `MOST` + 1 tokens, from those for `VERIFIED`; more tokens never take less time."""
    found: list[float] = []
    for tokens in range(1, MOST + 2):
        high = next(place for place, count in enumerate(VERIFIED) if count >= tokens)
        low = max(high - 1, 0)
        share = (tokens - VERIFIED[low]) / max(VERIFIED[high] - VERIFIED[low], 1)
        found.append(max(seconds[low] + share * (seconds[high] - seconds[low]), *found[-1:], 0.0))
    return found


def _name(model: Any, rows: int, plan: StraightPlan) -> str:
    """What times depend on, beside the machine."""
    config = model.config.text_config
    shape = f"{config.model_type} {config.hidden_size}x{config.num_hidden_layers}, vocabulary {config.vocab_size}"
    dtype = str(model.dtype).removeprefix("torch.")
    compiled = library()
    kernels = "torch" if compiled is None else Path(compiled._name).stem
    return f"{kernels}: {shape}, {dtype} on {model.device.type}, {rows} rows: {plan.text}"
