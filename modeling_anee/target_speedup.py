"""A target speedup as a default budget: measured on this machine, against the model's own dense run or its plain base."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .budget import TOLERANCE
from .capacity import BUDGET, CAPACITY
from .checks import is_number, one_of, plain, whole
from .controller import Controller
from .speed_search import FoundSpeedup, budgets_between, find_speedup
from .timing import decode_seconds, interleave, ratios


REFERENCES = ("dense", "base")
PROMPT = 16  # random tokens, where there is no prompt
Prompts = Tensor | Mapping[str, Any]


def check_target(value: Any, name: str = "target") -> float:
    """Return a speedup as a float.

    Raises:
        ValueError: it is not a number from 1 on; the message names the field.
    """
    number = plain(value)
    if not is_number(number) or number < 1.0:
        raise ValueError(f"{name}={value!r} is not allowed: it must be a number that is at least 1")
    return float(number)


def set_target_speedup(
    model: Any, target: float, prompts: Prompts | None, new_tokens: int, rounds: int, reference: str
) -> FoundSpeedup:
    """Find a budget for a target and make it the model's default; `AneeGenerationMixin.set_target_speedup` has the rest."""
    target = check_target(target)
    whole("new_tokens", new_tokens, 2)
    whole("rounds", rounds, 1)
    one_of("reference", reference, REFERENCES)
    if model.controller.ceiling < 1.0:
        raise ValueError(
            f"a speedup over reference={reference!r} can't be measured: the base's full weights were dropped (drop_full=True)"
        )
    inputs = _inputs(model, prompts)
    with _random_state_kept(model.device):
        measure = speed_of(model, inputs, new_tokens, rounds, reference)
        found = find_speedup(target, budgets_between(marks_of(model.controller)), measure)
    _set_default(model, found.budget)
    return found


def _set_default(model: Any, budget: float) -> None:
    """Make a budget the default, also in the generation config where that has another, since it comes first."""
    model.config.energy_budget = budget
    for name, value in {BUDGET: budget, CAPACITY: None}.items():
        if getattr(model.generation_config, name, None) is not None:
            setattr(model.generation_config, name, value)


def speed_of(model: Any, inputs: dict[str, Tensor], new_tokens: int, rounds: int, reference: str) -> Callable[[float], float]:
    """A function from a budget to the median ratio of its decoding speed to the reference's, the two run in turn.

    The dense run is 1 by itself: it is not measured against itself.
    """
    seconds = partial(decode_seconds, inputs=inputs, new_tokens=new_tokens)
    other = partial(seconds, model.base) if reference == "base" else partial(seconds, model, energy_budget=1.0)

    def measure(budget: float) -> float:
        if budget == 1.0 and reference == "dense":
            return 1.0
        runs = interleave({"reference": other, "own": partial(seconds, model, energy_budget=budget)}, rounds)
        return statistics.median(ratios(runs["reference"], runs["own"]))

    return measure


def marks_of(controller: Controller) -> list[float]:
    """Budgets that are worth trying as they are: the lowest and the highest, and those that one plan alone fulfils."""
    highest = controller.ceiling
    plans = [budget for budget in controller.plan_budgets() if budget < highest - TOLERANCE]
    return [min(controller.floor, highest), *plans, highest]


def _inputs(model: Any, prompts: Prompts | None) -> dict[str, Tensor]:
    """Token ids int64 [B, T] and their mask on the model's device; random ones where nobody gives any.

    Raises:
        ValueError: no token ids of that shape.
    """
    if prompts is None:
        size = model.config.text_config.vocab_size
        prompts = torch.randint(size, (1, PROMPT), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    inputs = dict(prompts) if isinstance(prompts, Mapping) else {"input_ids": prompts}
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel() or ids.is_floating_point():
        shape = f"of shape {tuple(ids.shape)}, {ids.dtype}" if isinstance(ids, Tensor) else f"{prompts!r}"
        raise ValueError(f"prompts {shape} is not allowed: it must be token ids [rows, tokens], or what a tokenizer returns")
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Whatever draws numbers inside, kernels that are first measured for example, leaves the user's next ones as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
