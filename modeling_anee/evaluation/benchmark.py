"""Wall-clock against plain transformers: one process, runs interleaved, medians, spread, ceilings.

The plain model is the very base that is wrapped, called without us, so both read the same weights. Every case runs the
same number of tokens; `min_new_tokens` keeps the end of sequence from cutting a run short.
"""

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch

from ..actions import FULL, PROCESS
from ..base_loading import find_base
from ..budget import TOLERANCE
from ..capacity import budgets_of
from ..energy_counters import devices_of
from ..machines.energy import EnergyModel
from ..modeling_anee import AneeForCausalLM
from ..timing import greedy, interleave, ratios, seconds_of
from ..trace import ExecutionTrace
from .benchmark_rows import Done, Row, Run, rows_of
from .energy import EnergyMeter
from .shown import budgets_to_show
from .uniform import INT4, INT8, uniform_precisions


KINDS = ("plan", "budget", "learned", "routed", "gated")  # `confidence` adds one head call per question
PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "List three ways to save energy at home and say why each works.",
    "Give me a recipe for a simple vegetable soup.",
    "What is the difference between weather and climate?",
    "Write a polite letter to a neighbour about a noisy dog.",
    "Summarise the story of the tortoise and the hare.",
    "Why do we have leap years?",
)


class Case(NamedTuple):
    """A model at a budget; `cost` is that of a token where the model's trace has it in another unit."""

    name: str
    model: AneeForCausalLM
    budget: float
    cost: float | None = None


def cases_of(model: AneeForCausalLM, capacities: Sequence[float] = ()) -> list[Case]:
    """What is timed beside plain transformers: the model at its budgets, and its base in 8 and in 4 bits, all tokens alike.

    Args:
        model: the first case is this in full.
        capacities: of a `gated` controller, to be timed instead of budgets below 1; 1 is always among them.
    """
    budgets = budgets_to_show(model.config, model.dtype)
    cases = [Case(f"budget {budget}", model, budget) for budget in (budgets[:1] if capacities else budgets)]
    cases += [Case(f"capacity {capacity:g}", model, budget) for capacity, budget in _at_capacities(model, capacities)]
    uniform = [one for one in uniform_precisions(model) if one.name in (INT8, INT4)]
    return cases + [Case(one.name, one.model, one.budget, one.cost) for one in uniform]


def _at_capacities(model: AneeForCausalLM, capacities: Sequence[float]) -> list[tuple[float, float]]:
    """Capacities, the highest first, and their budgets; with 1 where it is cheaper than the model in full.

    Raises:
        ValueError: the model's controller has none.
    """
    kind = model.config.controller
    listed = sorted(capacities, reverse=True)
    found = [(one, float(budgets_of(model.controller, kind, one, 1))) for one in ([1.0, *listed] if listed else [])]
    return [(capacity, budget) for capacity, budget in dict(found).items() if budget < 1.0]


def metered_runs(cases: dict[str, Callable[[], Any]], repeats: int, meter: EnergyMeter) -> dict[str, list[Run]]:
    """Seconds and joules of each case, run in turn, after one uncounted round."""
    return interleave({name: partial(_metered, case, meter) for name, case in cases.items()}, repeats)


def _metered(case: Callable[[], Any], meter: EnergyMeter) -> Run:
    before, seconds = meter.joules, seconds_of(case)
    after = meter.joules
    return Run(seconds, None if before is None or after is None else after - before)


class Meters(NamedTuple):
    """What tells joules: counters, and what models them where there are none."""

    counted: EnergyMeter
    modelled: EnergyModel | None = None


def decode_rows(cases: list[Case], tokenizer: Any, batch: int, new_tokens: int, repeats: int, meters: Meters) -> list[Row]:
    """Greedy decoding: plain `generate` beside ours; the first case is the model in full."""
    model = cases[0].model
    inputs = _chat(tokenizer, PROMPTS[:batch]).to(model.device)
    length = greedy(new_tokens)

    def ours(case: Case) -> ExecutionTrace:
        output: Any = case.model.generate(**inputs, **length, energy_budget=case.budget, return_dict_in_generate=True)
        return output.execution

    if not model.config.table.variants - {FULL}:
        cases = [*cases, Case("half the layers", model, _budget_of_half_the_layers(model))]
    prompt = inputs["input_ids"].shape[1]
    runs, done = _timed(cases, lambda: model.base.generate(**inputs, **length), ours, repeats, meters.counted, prompt)
    return rows_of(runs, done, batch * new_tokens, with_ceiling=batch == 1, energy=meters.modelled)


@torch.no_grad()
def prefill_rows(cases: list[Case], tokens: int, repeats: int, meters: Meters) -> list[Row]:
    """One forward over a prompt, cache and last logits included: the base's beside ours; the first case is the model."""
    model = cases[0].model
    limit = min(tokens, getattr(model.config.text_config, "max_position_embeddings", tokens))
    ids = torch.randint(3, model.config.text_config.vocab_size, (1, limit), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)

    def ours(case: Case) -> ExecutionTrace:
        return case.model(ids, energy_budget=case.budget, use_cache=True, logits_to_keep=1).execution

    plain = partial(model.base, ids, use_cache=True, logits_to_keep=1)
    runs, done = _timed(cases, plain, ours, repeats, meters.counted, limit)
    return rows_of(runs, done, limit, with_ceiling=False, energy=meters.modelled)


def _timed(
    cases: list[Case],
    plain: Callable[[], Any],
    ours: Callable[[Case], ExecutionTrace],
    repeats: int,
    meter: EnergyMeter,
    prompt: int,
) -> tuple[dict[str, list[Run]], dict[str, Done]]:
    """Runs of plain transformers and of every case, and what the cases did."""
    done: dict[str, Done] = {}

    def call(case: Case) -> None:
        trace = ours(case)
        done[case.name] = Done(case.model, trace, trace.mean_cost if case.cost is None else case.cost, prompt)

    calls: dict[str, Callable[[], Any]] = {"plain": plain} | {case.name: partial(call, case) for case in cases}
    return metered_runs(calls, repeats, meter), done


@torch.no_grad()
def controller_overheads(model: AneeForCausalLM, tokenizer: Any, steps: int, meter: EnergyMeter) -> dict[str, float]:
    """Share of a decoding step that each kind's decisions add, when they change nothing.

    At a budget just under 1 every kind is asked and answers PROCESS; those that learn are untrained. Single steps are timed in
    turn, since the difference is small beside the drift of whole generations.
    """
    ids = _chat(tokenizer, PROMPTS[:1]).input_ids.to(model.device)
    never = _never_left_out(model.config.num_layers)  # without a calibration nobody asks routers
    wrapped = {
        kind: AneeForCausalLM.from_base(model.base, controller=kind, calibration=never if kind == "gated" else None)
        for kind in KINDS
    }
    budgets = {"dense": 1.0} | dict.fromkeys(KINDS, 1.0 - 2 * TOLERANCE)  # a single one may count as 1
    cases: dict[str, Callable[[], Any]] = {}
    for name, budget in budgets.items():
        other = wrapped.get(name, model)
        cache = other(ids, energy_budget=1.0, use_cache=True, logits_to_keep=1).cache
        cases[name] = partial(other, ids[:, -1:], cache=cache, energy_budget=budget, logits_to_keep=1)
    runs = metered_runs(cases, steps, meter)
    seconds = {name: [run.seconds for run in own] for name, own in runs.items()}
    return {kind: statistics.median(ratios(seconds[kind], seconds["dense"])) - 1.0 for kind in KINDS}


def _never_left_out(layers: int) -> dict[str, list]:
    """A calibration of thresholds that no score is below."""
    return {"budgets": [0.5], "settings": [0.5], "thresholds": [[[-1e3] * layers]]}


def memories(model: AneeForCausalLM, rounded: bool) -> dict[str, dict[str, int]]:
    """Bytes of fresh processes on the CPU; empty where the base is not a folder or the system does not tell.

    With `rounded` those of the base in 8 and in 4 bits, its full weights dropped, are among them.
    """
    where, _ = find_base(model.config.base_model_name_or_path)
    if sys.platform == "win32" or model.device.type != "cpu" or not os.path.isdir(where):
        return {}
    from .memory import memory_of

    dtype = str(model.dtype).removeprefix("torch.")
    cases = {"plain": "plain", "budget 1.0": "1.0", "budget 0.5": "0.5"}
    if rounded:
        cases |= {"INT8, full weights dropped": "int8", "INT4, INT8 head, full weights dropped": "int4"}
    return {name: memory_of(where, case, dtype)._asdict() for name, case in cases.items()}


def benchmark(
    model: AneeForCausalLM,
    tokenizer: Any,
    new_tokens: int,
    repeats: int,
    batch: int,
    prefill: int,
    capacities: Sequence[float] = (),
    energy: EnergyModel | None = None,
) -> dict[str, Any]:
    """All tables, ready for JSON; `energy` models joules where the machine can't tell."""
    cases = cases_of(model, capacities)
    with EnergyMeter(devices_of(model.base)) as meter:
        meters = Meters(meter, energy)
        tables = {
            f"decode, batch {rows}, {new_tokens} new tokens": decode_rows(cases, tokenizer, rows, new_tokens, repeats, meters)
            for rows in (1, batch)
        }
        tables[f"prefill, {prefill} tokens"] = prefill_rows(cases, prefill, repeats, meters)
        overhead = controller_overheads(model, tokenizer, new_tokens, meter)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else str(model.device),
        "threads": torch.get_num_threads(),
        "rounds": repeats,
        "controller": model.config.controller,
        "tables": {title: [asdict(row) for row in rows] for title, rows in tables.items()},
        "energy": {"counted": meter.counted, "reason": meter.reason, "modelled": "" if energy is None else energy.machine.name},
        "controller_overhead": overhead,
        "head_share": model.costs.head,
        "memory": memories(model, rounded=any(case.name == INT8 for case in cases)),
    }


def _budget_of_half_the_layers(model: AneeForCausalLM) -> float:
    """Cost of processing as many of the layers as not; they are all alike."""
    process, skip = (float(model.costs.layers[:, action].mean()) for action in (PROCESS, model.config.table.skip))
    layers = len(model.costs.layers)
    return process * (layers - layers // 2) + skip * (layers // 2) + model.costs.head


def _chat(tokenizer: Any, prompts: tuple[str, ...]) -> Any:
    """A left-padded batch of prompts, in the chat template if there is one."""
    tokenizer.padding_side = "left"
    if tokenizer.chat_template is not None:
        prompts = tuple(
            tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False)
            for p in prompts
        )
    return tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=tokenizer.chat_template is None)
