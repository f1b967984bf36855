"""Wall-clock against plain transformers: one process, runs interleaved, medians, spread, ceilings.

The plain model is the very base that is wrapped, called without us, so both read the same weights. Every case runs the
same number of tokens; `min_new_tokens` keeps the end of sequence from cutting a run short.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from ..actions import NONE, PROCESS
from ..base_loading import find_base
from ..modeling_anee import AneeForCausalLM
from .energy import EnergyMeter, devices_of


BUDGETS = (1.0, 0.8, 0.6, 0.5, 0.3)
KINDS = ("plan", "budget", "learned", "routed")  # `confidence` adds one head call per question
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


@dataclass(frozen=True)
class Row:
    """Figures of one case.

    Args:
        case: what was run.
        tokens_per_second: of all rows of the batch, from the median.
        ratio: median over the rounds of seconds of plain transformers / seconds of this case.
        ratio_low: smallest ratio of a round.
        ratio_high: largest.
        mean_cost: share of the whole model, as the trace has it.
        weights_read: share of the whole model's weight bytes that decoding still reads (what was run, and the head).
        of_ceiling: speed-up over our own dense run / the speed-up that reading so many fewer bytes could give.
        joules_per_token: mean over the rounds, the prompt's joules included; None where the machine can't tell.
    """

    case: str
    tokens_per_second: float
    ratio: float
    ratio_low: float
    ratio_high: float
    mean_cost: float
    weights_read: float | None = None
    of_ceiling: float | None = None
    joules_per_token: float | None = None


class Run(NamedTuple):
    """Seconds and joules of one run of a case; no joules where the machine can't tell."""

    seconds: float
    joules: float | None


def interleave(cases: dict[str, Callable[[], Any]], repeats: int, meter: EnergyMeter) -> dict[str, list[Run]]:
    """Seconds and joules of each case, run in turn, after one uncounted round."""
    runs: dict[str, list[Run]] = {name: [] for name in cases}
    for round_number in range(repeats + 1):
        for name, case in cases.items():
            _synchronize()
            joules, begin = meter.joules, time.perf_counter()
            case()
            _synchronize()
            seconds, after = time.perf_counter() - begin, meter.joules
            if round_number:
                runs[name].append(Run(seconds, None if joules is None or after is None else after - joules))
    return runs


def decode_rows(
    model: AneeForCausalLM, tokenizer: Any, batch: int, new_tokens: int, repeats: int, meter: EnergyMeter
) -> list[Row]:
    """Greedy decoding: plain `generate` beside ours at every budget."""
    inputs = _chat(tokenizer, PROMPTS[:batch]).to(model.device)
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    traces: dict[str, Any] = {}

    def ours(name: str, budget: float) -> Callable[[], None]:
        def call() -> None:
            output: Any = model.generate(**inputs, **length, energy_budget=budget, return_dict_in_generate=True)
            traces[name] = output.execution

        return call

    cases: dict[str, Callable[[], Any]] = {"plain": lambda: model.base.generate(**inputs, **length)}
    cases |= {f"budget {budget}": ours(f"budget {budget}", budget) for budget in BUDGETS}
    cases["half the layers"] = ours("half the layers", _budget_of_half_the_layers(model))
    runs = interleave(cases, repeats, meter)
    return _rows(model, runs, traces, batch * new_tokens, with_ceiling=batch == 1)


@torch.no_grad()
def prefill_rows(model: AneeForCausalLM, tokens: int, repeats: int, meter: EnergyMeter) -> list[Row]:
    """One forward over a prompt, cache and last logits included: the base's beside ours at every budget."""
    limit = min(tokens, getattr(model.config.text_config, "max_position_embeddings", tokens))
    ids = torch.randint(3, model.config.text_config.vocab_size, (1, limit), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    traces: dict[str, Any] = {}

    def ours(name: str, budget: float) -> Callable[[], None]:
        def call() -> None:
            traces[name] = model(ids, energy_budget=budget, use_cache=True, logits_to_keep=1).execution

        return call

    cases: dict[str, Callable[[], Any]] = {"plain": lambda: model.base(ids, use_cache=True, logits_to_keep=1)}
    cases |= {f"budget {budget}": ours(f"budget {budget}", budget) for budget in BUDGETS}
    return _rows(model, interleave(cases, repeats, meter), traces, limit, with_ceiling=False)


@torch.no_grad()
def controller_overheads(model: AneeForCausalLM, tokenizer: Any, steps: int, meter: EnergyMeter) -> dict[str, float]:
    """Share of a decoding step that each kind's decisions add, when they change nothing.

    At a budget just under 1 every kind is asked and answers PROCESS; those that learn are untrained. Single steps are timed in
    turn, since the difference is small beside the drift of whole generations.
    """
    ids = _chat(tokenizer, PROMPTS[:1]).input_ids.to(model.device)
    wrapped = {kind: AneeForCausalLM.from_base(model.base, controller=kind) for kind in KINDS}
    budgets = {"dense": 1.0} | dict.fromkeys(KINDS, 1.0 - 1e-9)
    cases: dict[str, Callable[[], Any]] = {}
    for name, budget in budgets.items():
        other = wrapped.get(name, model)
        cache = other(ids, energy_budget=1.0, use_cache=True, logits_to_keep=1).cache
        cases[name] = partial(other, ids[:, -1:], cache=cache, energy_budget=budget, logits_to_keep=1)
    runs = interleave(cases, steps, meter)
    dense = runs.pop("dense")
    return {
        kind: statistics.median(one.seconds / other.seconds for one, other in zip(own, dense, strict=True)) - 1.0
        for kind, own in runs.items()
    }


def peak_memories(model: AneeForCausalLM) -> dict[str, int]:
    """Peak bytes of fresh processes on the CPU; empty where the base is not a folder or the system does not tell."""
    where, _ = find_base(model.config.base_model_name_or_path)
    if sys.platform == "win32" or model.device.type != "cpu" or not os.path.isdir(where):
        return {}
    from .memory import peak_memory

    dtype = str(model.dtype).removeprefix("torch.")
    cases = {"plain": None, "budget 1.0": 1.0, "budget 0.5": 0.5}
    return {name: peak_memory(where, budget, dtype) for name, budget in cases.items()}


def benchmark(
    model: AneeForCausalLM, tokenizer: Any, new_tokens: int, repeats: int, batch: int, prefill: int
) -> dict[str, Any]:
    """All tables, ready for JSON."""
    with EnergyMeter(devices_of(model.base)) as meter:
        tables = {
            f"decode, batch 1, {new_tokens} new tokens": decode_rows(model, tokenizer, 1, new_tokens, repeats, meter),
            f"decode, batch {batch}, {new_tokens} new tokens": decode_rows(model, tokenizer, batch, new_tokens, repeats, meter),
            f"prefill, {prefill} tokens": prefill_rows(model, prefill, repeats, meter),
        }
        overhead = controller_overheads(model, tokenizer, new_tokens, meter)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else str(model.device),
        "threads": torch.get_num_threads(),
        "rounds": repeats,
        "controller": model.config.controller,
        "tables": {title: [asdict(row) for row in rows] for title, rows in tables.items()},
        "energy": {"counted": meter.counted, "reason": meter.reason},
        "controller_overhead": overhead,
        "head_share": model.costs.head,
        "peak_memory": peak_memories(model),
    }


def as_text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [
        f"{report['dtype']} on {report['device']}, {report['threads']} threads, {report['controller']} controller, medians of "
        f"{report['rounds']} interleaved rounds; ratio = plain transformers / ours"
    ]
    for title, rows in report["tables"].items():
        heads = f"{'tokens/s':>10s}{'ratio':>8s}{'min-max':>12s}{'cost':>8s}{'J/token':>10s}{'read':>7s}{'of ceiling':>12s}"
        lines += ["", title, f"{'case':16s}{heads}"]
        for row in rows:
            read, ceiling = (f"{row[name]:.2f}" if row[name] is not None else "" for name in ("weights_read", "of_ceiling"))
            joules = "" if row["joules_per_token"] is None else f"{row['joules_per_token']:.3g}"
            spread = f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}"
            lines.append(
                f"{row['case']:16s}{row['tokens_per_second']:10.1f}{row['ratio']:8.2f}{spread:>12s}{row['mean_cost']:8.3f}"
                f"{joules:>10s}{read:>7s}{ceiling:>12s}"
            )
    overheads = ", ".join(f"{kind} {share:+.1%}" for kind, share in report["controller_overhead"].items())
    question = f"{report['head_share']:+.0%} for each question of confidence (the head, by its share of the work)"
    lines += ["", f"what deciding adds to a decoding step: {overheads}; {question}"]
    energy = report["energy"]
    lines.append(f"energy not known: {energy['reason']}" if energy["reason"] else f"energy: of {energy['counted']}")
    plain = report["peak_memory"].get("plain")
    if plain:
        more = ", ".join(f"{n} {b / plain - 1:+.1%}" for n, b in report["peak_memory"].items() if n != "plain")
        lines.append(f"peak memory of a process: plain {plain / 2**20:.0f} MiB, {more}")
    return "\n".join(lines)


def _rows(
    model: AneeForCausalLM, runs: dict[str, list[Run]], traces: dict[str, Any], tokens: int, with_ceiling: bool
) -> list[Row]:
    rows = []
    dense = statistics.median(run.seconds for run in runs["budget 1.0"])
    for name, own in runs.items():
        ratios = [plain.seconds / run.seconds for plain, run in zip(runs["plain"], own, strict=True)]
        median = statistics.median(run.seconds for run in own)
        joules = [run.joules for run in own if run.joules is not None]
        read = _weights_read(model, traces[name]) if with_ceiling and name in traces else None
        rows.append(
            Row(
                case=name,
                tokens_per_second=tokens / median,
                ratio=statistics.median(ratios),
                ratio_low=min(ratios),
                ratio_high=max(ratios),
                mean_cost=traces[name].mean_cost if name in traces else 1.0,
                weights_read=read,
                of_ceiling=None if read is None else dense / median * read,
                joules_per_token=statistics.mean(joules) / tokens if len(joules) == len(own) else None,
            )
        )
    return rows


def _budget_of_half_the_layers(model: AneeForCausalLM) -> float:
    """Cost of processing as many of the layers as not; they are all alike."""
    process, skip = (float(model.costs.layers[:, action].mean()) for action in (PROCESS, model.config.table.skip))
    layers = len(model.costs.layers)
    return process * (layers - layers // 2) + skip * (layers // 2) + model.costs.head


def _weights_read(model: AneeForCausalLM, trace: Any) -> float:
    """Share of the whole model's bytes in what was run, bridges and the head included; deferred keys cost next to none."""
    read, table = model.costs.layers.clone(), model.config.table
    if (leaves := table.find(NONE, NONE, leaves=True)) is not None:  # its layers cost keys and values alone
        keys_values = read[:, leaves].clone()
        read[:, ~table.where([action.attention != NONE for action in table])] -= keys_values.unsqueeze(1)
    taken = trace.actions[trace.valid].long()
    stack = float(read[torch.arange(len(read)), taken].sum(dim=-1).mean())
    return stack + model.costs.head


def _chat(tokenizer: Any, prompts: tuple[str, ...]) -> Any:
    """A left-padded batch of prompts, in the chat template if there is one."""
    tokenizer.padding_side = "left"
    if tokenizer.chat_template is not None:
        prompts = tuple(
            tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False)
            for p in prompts
        )
    return tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=tokenizer.chat_template is None)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
