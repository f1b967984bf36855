"""Lossless decoding against what else gives the base's own tokens: one process, all ways in turn for each question.

The references are the very base that is wrapped, called without us: plain `generate`, prompt lookup, and early exit of the base
as its own assistant (LayerSkip, arXiv:2404.16710), which is run for one question in five; all three are transformers' own.
Every way ends where the text does.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..draft_plans import full_plan
from ..draft_times import times_of
from ..lossless_choice import draft_texts_of, prepared
from ..modeling_anee import AneeForCausalLM
from ..timing import TokenClock, seconds_of
from .questions import Question


PLAIN, LOOKUP, EARLY, OURS, LOSSLESS = "plain generate", "prompt lookup", "early exit", "budget 1.0", "lossless"
LOOKED_UP = 10  # tokens, as transformers' documentation has it
RARELY = 5  # early exit is several times slower than plain decoding
WARMING = 4  # tokens before anything is timed


@dataclass(frozen=True)
class Answer:
    """One question, answered in every way.

    Args:
        category: of the question.
        prompt: its tokens.
        new: tokens of the answer.
        seconds: of each way, the prompt included.
        decoding: seconds of each token but the first.
        differs: places of the answer where a way first has another token than plain `generate`, by the way's name.
        margins: by how much the likeliest token is above the next there, in logits.
        drafted: tokens that were drafted.
        accepted: how many of them were kept.
        verifies: calls of the full model.
        near_ties: tokens that rounding might decide.
        work: of a new token, as a share of the whole model's.
        weights_read: bytes read for a new token, likewise.
        plan: what drafted last.
        plain: why nothing was drafted, if so.
    """

    category: str
    prompt: int
    new: int
    seconds: dict[str, float]
    decoding: dict[str, float]
    differs: dict[str, int]
    margins: dict[str, float]
    drafted: int
    accepted: int
    verifies: int
    near_ties: int
    work: float
    weights_read: float
    plan: str
    plain: str


def ways_of(model: AneeForCausalLM, new_tokens: int) -> dict[str, Callable[..., Any]]:
    """What is timed, by name: prompt and streamer -> an output with `sequences`."""
    shared = {"max_new_tokens": new_tokens, "do_sample": False, "return_dict_in_generate": True}
    base, layers = model.base, model.config.num_layers
    return {
        PLAIN: partial(base.generate, **shared),
        LOOKUP: partial(base.generate, **shared, prompt_lookup_num_tokens=LOOKED_UP),
        EARLY: partial(base.generate, **shared, assistant_early_exit=layers // 2),
        OURS: partial(model.generate, **shared, energy_budget=1.0),
        LOSSLESS: partial(model.generate, **shared, lossless=True),
    }


def answer(ways: dict[str, Callable[..., Any]], model: AneeForCausalLM, category: str, inputs: dict[str, Tensor]) -> Answer:
    """Answer a question in every way, timed."""
    seconds, decoding, found = {}, {}, {}
    for name, way in ways.items():
        clock = TokenClock()
        kept: list[Any] = []
        seconds[name] = seconds_of(partial(_keep, kept, partial(way, **inputs, streamer=clock)))
        found[name] = kept[0]
        if clock.decoded:
            decoding[name] = clock.seconds_per_token
    expected, prompt = found[PLAIN].sequences[0], inputs["input_ids"].shape[1]
    differs = {name: first_difference(expected, one.sequences[0], prompt) for name, one in found.items()}
    places = {name: place for name, place in differs.items() if place is not None}
    account = found[LOSSLESS].execution.lossless
    return Answer(
        category=category,
        prompt=prompt,
        new=len(expected) - prompt,
        seconds=seconds,
        decoding=decoding,
        differs=places,
        margins={name: margin_at(model, expected[None, : prompt + place]) for name, place in places.items()},
        drafted=account.drafted,
        accepted=account.accepted,
        verifies=account.verifies,
        near_ties=account.near_ties,
        work=account.work,
        weights_read=account.weights_read,
        plan=account.plan,
        plain=account.plain,
    )


def _keep(kept: list[Any], call: Callable[[], Any]) -> None:
    kept.append(call())


def first_difference(expected: Tensor, found: Tensor, prompt: int) -> int | None:
    """The first place after a prompt where token ids [T] differ, None where they are the same."""
    if torch.equal(expected, found):
        return None
    both = min(len(expected), len(found))
    other = (expected[prompt:both] != found[prompt:both]).nonzero()
    return int(other[0]) if len(other) else both - prompt


@torch.no_grad()
def margin_at(model: AneeForCausalLM, ids: Tensor) -> float:
    """By how much the base finds one token likelier than all others after token ids [1, T], in logits."""
    two = model.base(ids, logits_to_keep=1).logits[0, -1].topk(2).values
    return float(two[0] - two[1])


def benchmark_lossless(
    model: AneeForCausalLM, tokenizer: Any, questions: Sequence[Question], new_tokens: int, progress: Callable[[int], Any]
) -> dict[str, Any]:
    """All figures, ready for JSON.

    Args:
        model: an artifact, or a wrapped base.
        tokenizer: of the base.
        questions: what is asked, at least one.
        new_tokens: of an answer at most, at least 2.
        progress: is told of every question that is done.
    """
    plans = prepared(model, draft_texts_of(model))
    times = times_of(model, full_plan(model), plans, rows=1, anew=True)
    prompts = [encoded(tokenizer, question.text, model.device) for question in questions]
    left_out = warm_up(ways_of(model, WARMING), prompts[0])
    ways, answers = {name: way for name, way in ways_of(model, new_tokens).items() if name not in left_out}, []
    for number, (question, inputs) in enumerate(zip(questions, prompts, strict=True)):
        own = ways if number % RARELY == 0 else {name: way for name, way in ways.items() if name != EARLY}
        answers.append(answer(own, model, question.category, inputs))
        progress(1)
    return {
        "new_tokens": new_tokens,
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "milliseconds": {"full": [1e3 * one for one in times[0].full]}
        | {plan.text: 1e3 * own.draft for plan, own in zip(plans, times, strict=True)},
        "left_out": left_out,
        "answers": [asdict(one) for one in answers],
        "rows": rows_of(answers),
    }


def warm_up(ways: dict[str, Callable[..., Any]], inputs: dict[str, Tensor]) -> dict[str, str]:
    """Run every way once; why those of transformers that can't be run with this base can't."""
    left_out = {}
    for name, way in ways.items():
        try:
            way(**inputs, streamer=TokenClock())
        except Exception as error:
            if name not in (LOOKUP, EARLY):
                raise
            left_out[name] = f"{type(error).__name__}: {error}"
    return left_out


def encoded(tokenizer: Any, text: str, device: torch.device) -> dict[str, Tensor]:
    """A question's token ids and mask [1, T], in the chat template if there is one."""
    if tokenizer.chat_template is None:
        inputs = tokenizer(text, return_tensors="pt")
    else:
        messages = [{"role": "user", "content": text}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    return {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}


def rows_of(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """For all questions, then for each category: how much faster each way is than plain `generate`, medians, and the drafts."""
    by_category: dict[str, list[Answer]] = {"all": list(answers)}
    for one in answers:
        by_category.setdefault(one.category, []).append(one)
    return [{"category": name, **_row(own)} for name, own in by_category.items()]


def _row(answers: Sequence[Answer]) -> dict[str, Any]:
    drafted, accepted, verifies = (sum(getattr(one, name) for one in answers) for name in ("drafted", "accepted", "verifies"))
    return {
        "questions": len(answers),
        "identical": sum(LOSSLESS not in one.differs for one in answers),
        "faster": {name: _median(answers, "seconds", name) for name in (LOOKUP, EARLY, OURS, LOSSLESS)},
        "decoding_faster": {name: _median(answers, "decoding", name) for name in (LOOKUP, EARLY, OURS, LOSSLESS)},
        "acceptance": accepted / drafted if drafted else None,
        "tokens_per_verify": sum(one.new - 1 for one in answers) / verifies if verifies else None,
        "weights_read": statistics.mean(one.weights_read for one in answers),
    }


def _median(answers: Sequence[Answer], what: str, way: str) -> float | None:
    """Median of how many times faster a way is than plain `generate`, over the questions that it was run for."""
    figures = [getattr(one, what) for one in answers]
    found = [one[PLAIN] / one[way] for one in figures if way in one and one[way]]
    return statistics.median(found) if found else None
