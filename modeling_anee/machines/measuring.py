"""Measuring a profile: linear maps of every variant as they run one after the other in the model, and what is around them.

A map's weights come from memory, as they do in the model, since those of all others were read in between. What layers take
besides is what a forward takes in which all layers run, less its maps; and what a token takes whatever runs is what is left
of a forward without any layer. The mean of some rounds but the slowest counts: pauses that a machine makes now and then
are a part of what a token takes, and the shortest round of a short call has none.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base_kernels import machine
from ..base_model import BaseStack
from ..modeling_anee import AneeForCausalLM
from ..timing import Key, decode_seconds, interleave, seconds_of
from .profile import FORMAT, DecodeTimes, MapTimes, Profile, PromptTimes
from .strict import cost_of, strict_plans
from .workload import Counter, Kernel, attention_kernels, feed_forward_kernels


VARIANTS = ("full", "int8", "int4")
LEFT_OUT = "none"
READ = 1 << 28  # bytes of which the reading is timed
GATHERED = 64  # tokens


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Args:
        rows: of linear maps.
        head_rows: of the head, the first of those.
        batches: of decoding.
        prompts: tokens of prompts.
        contexts: tokens before those that are decoded: a few, and many.
        tokens: that a round decodes.
        rounds: of everything.
    """

    rows: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    head_rows: Sequence[int] = (1, 2, 4, 8, 16, 32)
    batches: Sequence[int] = (1, 2, 4, 8)
    prompts: Sequence[int] = (16, 64, 256, 512)
    contexts: tuple[int, int] = (32, 384)
    tokens: int = 8
    rounds: int = 5

    def within(self, positions: int) -> "Effort":
        """The same for a base that knows so many positions."""
        room = max(positions - self.tokens, 2)
        few, many = (min(context, room) for context in self.contexts)
        prompts = [tokens for tokens in self.prompts if tokens <= positions] or [positions]
        return replace(self, prompts=prompts, contexts=(min(few, many - 1), many))

    @property
    def steps(self) -> int:
        """How often `advance` is called."""
        return len(VARIANTS) * len(self.rows) + len(self.batches) + len(self.prompts) + 2


def effort_for(model: AneeForCausalLM, effort: Effort = Effort()) -> Effort:
    """How much can be measured of a model."""
    return effort.within(positions_of(model))


def positions_of(model: AneeForCausalLM) -> int:
    """How many tokens a base can tell the places of."""
    return getattr(model.config.text_config, "max_position_embeddings", None) or sys.maxsize


def measure(model: AneeForCausalLM, advance: Callable[[int], Any], effort: Effort) -> Profile:
    """The profile of the machine that a model is on, for its base.

    Args:
        model: whatever its controller.
        advance: is told of every step.
        effort: how much is measured, within the positions that the base knows.
    """
    plans = Plans.over(model)
    advance(1)
    begin = time.monotonic()
    with torch.random.fork_rng([] if model.device.type != "cuda" else [model.device]), torch.inference_mode():
        bandwidth, launch, gathering = _bandwidth(model.device), _launch(model.device), _gathering(model)
        advance(1)
        maps = [one for variant in VARIANTS for one in time_maps(plans.model.stack, variant, effort, advance)]
        rest = Rest(plans, maps, effort)
        prompts = [_told(advance, rest.prompt, tokens) for tokens in effort.prompts]
        decode = [_told(advance, rest.decode, batch) for batch in effort.batches]
    config = model.config.text_config
    return Profile(
        format=FORMAT,
        machine=machine_name(model.device),
        base=f"{config.model_type} {config.hidden_size}x{config.num_hidden_layers}, {model.dtype}".replace("torch.", ""),
        kv_bytes=float(plans.model.stack.blocks[0].kv_bytes),
        made=datetime.now(UTC).date().isoformat(),
        seconds=round(time.monotonic() - begin, 1),
        bandwidth=max([bandwidth, *(one.weight_bytes / one.ms[0] for one in maps)]),
        launch_ms=launch,
        gathering_ms=gathering,
        maps=maps,
        decode=decode,
        prompts=prompts,
    )


def machine_name(device: torch.device) -> str:
    """What figures hold for."""
    return machine() if device.type == "cpu" else f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"


def _told(advance: Callable[[int], Any], function: Callable[..., Any], *args: Any) -> Any:
    made = function(*args)
    advance(1)
    return made


@dataclass(frozen=True)
class Plans:
    """A base under plans in which all layers are alike.

    Args:
        model: `plan`, strict: each budget is that of one plan.
        budgets: by variant of all layers, and `none` for no layer at all.
    """

    model: AneeForCausalLM
    budgets: dict[str, float]

    @classmethod
    def over(cls, model: AneeForCausalLM) -> "Plans":
        """Those of a model's base, whose weights are made in 8 and in 4 bits beside it."""
        layers = model.config.num_layers
        texts = {"int8": f"{layers}*INT8 / int8", "int4": f"{layers}*INT4 / int8", LEFT_OUT: f"{layers}*SKIP_INT8 / int8"}
        made = strict_plans(model, list(texts.values()))
        for variant in VARIANTS[1:]:
            made.stack.head_of(variant)
        return cls(made, {"full": 1.0} | {name: cost_of(made, text) for name, text in texts.items()})


def time_maps(stack: BaseStack, variant: str, effort: Effort, advance: Callable[[int], Any]) -> list[MapTimes]:
    """The linear maps of a base in a variant, the head included, for each number of rows."""
    listed, calls = kernels_and_calls(stack, variant)
    kernels = {one.name: one for one in [*listed, Counter(stack, None).head(variant)]}
    times: dict[str, list[float]] = {name: [] for name in kernels}
    for rows in effort.rows:
        inputs = {name: _random(rows, one.inputs, stack) for name, one in kernels.items()}
        with_head = [("head", stack.head_map(variant))] if rows in effort.head_rows else []
        for name, ms in mean_passes([*calls, *with_head], inputs, effort.rounds).items():
            times[name].append(ms)
        advance(1)
    return [
        MapTimes(name, variant, one.outputs, one.inputs, one.weight_bytes, list(effort.rows)[: len(times[name])], times[name])
        for name, one in kernels.items()
    ]


def kernels_and_calls(stack: BaseStack, variant: str) -> tuple[list[Kernel], list[tuple[str, Callable[[Tensor], Tensor]]]]:
    """The maps of the first layer in a variant, and those of all layers by name, as they run."""
    blocks = stack.blocks_of(variant)
    kernels = [*attention_kernels(blocks[0], variant), *feed_forward_kernels(blocks[0], variant)]
    calls: list[tuple[str, Callable[[Tensor], Tensor]]] = []
    for block in blocks:
        calls += list(block.linear.items()) if block.mlp_maps else [*block.linear.items(), ("mlp", block.mlp)]
    return kernels, calls


def mean_passes(
    calls: Sequence[tuple[str, Callable[[Tensor], Tensor]]], inputs: dict[str, Tensor], rounds: int
) -> dict[str, float]:
    """Milliseconds of a call by name, the mean over passes through all calls, after one uncounted."""
    passed: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for name, call in calls:
            ms = seconds_of(partial(call, inputs[name])) * 1e3
            if number:
                passed.setdefault(name, []).append(ms)
    return {name: usual_mean(ms) for name, ms in passed.items()}


def _random(rows: int, width: int, stack: BaseStack) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    weight = stack.base.get_output_embeddings().weight
    return torch.randn(rows, width, generator=generator, device="cpu").to(weight.device, weight.dtype)


class Rest:
    """What forwards take besides their linear maps.

    Args:
        plans: over the base.
        maps: as they were measured.
        effort: how much is measured.
    """

    def __init__(self, plans: Plans, maps: Sequence[MapTimes], effort: Effort) -> None:
        self._plans, self._effort = plans, effort
        self._maps = {(one.name, one.variant): one for one in maps}
        self._layers = plans.model.config.num_layers
        self._names = list(dict.fromkeys(one.name for one in maps if one.name != "head"))
        longest = max(*effort.prompts, effort.contexts[1] + effort.tokens)
        size, rows = plans.model.config.text_config.vocab_size, max(effort.batches)
        generator = torch.Generator("cpu").manual_seed(0)
        self._ids = torch.randint(3, size, (rows, longest), generator=generator, device="cpu").to(plans.model.device)

    def prompt(self, tokens: int) -> PromptTimes:
        """A prompt of so many tokens."""
        model, ids = self._plans.model, self._ids[:1, :tokens]
        calls = {
            name: partial(seconds_of, partial(model, ids, energy_budget=budget, use_cache=True, logits_to_keep=1))
            for name, budget in self._plans.budgets.items()
        }
        ms = _means(calls, self._effort.rounds)
        attention = self._attention_ms(tokens)
        left_out = ms[LEFT_OUT] - self._map_ms("head", "int8", 1)
        layers = {name: self._of_layer(ms[name] - left_out, name, tokens, 1) - attention for name in VARIANTS}
        return PromptTimes(tokens, left_out, attention, layers)

    def decode(self, batch: int) -> DecodeTimes:
        """One token of every row, after few and after many others."""
        few, many = self._effort.contexts
        times = self._step_ms(batch, [(name, few) for name in self._plans.budgets] + [("int8", many)])
        near = {name: times[name, few] for name in self._plans.budgets}
        context = max((times["int8", many] - near["int8"]) / self._layers / (many - few), 0.0)
        left_out = near[LEFT_OUT] - self._map_ms("head", "int8", batch)
        layers = {name: self._of_layer(near[name] - left_out, name, batch, batch) - few * context for name in VARIANTS}
        return DecodeTimes(batch, left_out + self._loop_ms(batch), context, layers)

    def _loop_ms(self, batch: int) -> float:
        """What the loop of `generate` takes of a step, beside the forward that it calls."""
        model, budget, few = self._plans.model, self._plans.budgets["int8"], self._effort.contexts[0]
        ids = self._ids[:batch, :few]
        inputs, tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, max(self._effort.tokens, 2)

        def step() -> float:
            return self._step_ms(batch, [("int8", few)], rounds=1)["int8", few]

        def generate() -> float:
            return decode_seconds(model, inputs, tokens, energy_budget=budget) * 1e3

        runs = interleave({"step": step, "generate": generate}, self._effort.rounds + 2)  # it is a small difference
        return max(usual_mean(runs["generate"]) - usual_mean(runs["step"]), 0.0)

    def _step_ms(self, batch: int, cases: Sequence[tuple[str, int]], rounds: int | None = None) -> dict[tuple[str, int], float]:
        """Of one token of every row, by what all layers run in and how many tokens are before."""
        model, ids = self._plans.model, self._ids[:batch]
        budgets, tokens = self._plans.budgets, self._effort.tokens
        caches = {
            (name, context): model(ids[:, :context], energy_budget=budgets[name], use_cache=True, logits_to_keep=1).cache
            for name, context in cases
        }

        def run(name: str, context: int) -> None:
            cache = caches[name, context]
            for place in range(context, context + tokens):
                options: dict[str, Any] = {"cache": cache, "energy_budget": budgets[name], "logits_to_keep": 1}
                model(ids[:, place : place + 1], use_cache=True, **options)
            cache.crop(-tokens)

        calls = {case: partial(seconds_of, partial(run, *case)) for case in cases}
        return {case: ms / tokens for case, ms in _means(calls, rounds or self._effort.rounds).items()}

    def _of_layer(self, ms: float, variant: str, rows: int, head_rows: int) -> float:
        """What is left for one layer of a forward without its maps."""
        head = "full" if variant == "full" else "int8"
        maps = sum(self._map_ms(name, variant, rows) for name in self._names)
        return (ms - self._map_ms("head", head, head_rows)) / self._layers - maps

    def _map_ms(self, name: str, variant: str, rows: int) -> float:
        found = self._maps.get((name, variant))
        return 0.0 if found is None else found.at(rows)

    def _attention_ms(self, tokens: int) -> float:
        """Of the attention of one prompt to itself."""
        block, width = self._plans.model.stack.blocks[0], self._plans.model.stack
        shape = (1, block.heads, tokens, block.head_size)
        heads = _random(1, block.heads * tokens * block.head_size, width).view(shape)
        call = partial(nn.functional.scaled_dot_product_attention, heads, heads, heads, is_causal=True)
        return _means({"attention": partial(seconds_of, call)}, self._effort.rounds)["attention"]


def _means(calls: Mapping[Key, Callable[[], float]], rounds: int) -> dict[Key, float]:
    """Milliseconds of calls that return seconds, the mean of some rounds."""
    return {name: usual_mean(seconds) * 1e3 for name, seconds in interleave(dict(calls), rounds).items()}


def usual_mean(times: Sequence[float]) -> float:
    """The mean of some times but the slowest."""
    return statistics.mean(sorted(times)[: max(len(times) - 1, 1)])


def _bandwidth(device: torch.device) -> float:
    """Bytes of memory that are read in a millisecond."""
    size = READ if device.type != "cpu" or _memory() > 8 * READ else READ // 8
    data = torch.ones(size // 4, device=device)
    return size / _means({"read": partial(seconds_of, data.sum)}, 5)["read"]


def _memory() -> int:
    """Bytes of memory of this machine, as far as the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _launch(device: torch.device) -> float:
    """Milliseconds of a linear map of next to nothing."""
    row, weight = torch.ones(1, 8, device=device), torch.ones(8, 8, device=device)
    calls = 100

    def run() -> None:
        for _ in range(calls):
            nn.functional.linear(row, weight)

    return _means({"launch": partial(seconds_of, run)}, 5)["launch"] / calls


def _gathering(model: AneeForCausalLM) -> float:
    """Milliseconds of gathering half of some tokens and putting them back."""
    hidden = torch.ones(GATHERED, model.config.text_config.hidden_size, device=model.device)
    mask = torch.arange(GATHERED, device="cpu") % 2 == 0

    def run() -> Tensor:
        index = mask.nonzero().squeeze(1).to(hidden.device)
        return hidden.index_copy(0, index, hidden[index])

    return _means({"gather": partial(seconds_of, run)}, 20)["gather"]
