"""Wall-clock against plain transformers: one process, interleaved runs, medians, ratios.

The plain model is the very base that is wrapped, called without us, so both read the same weights.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..modeling_anee import AneeForCausalLM


BUDGETS = (1.0, 0.8, 0.6, 0.5)
PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "List three ways to save energy at home and say why each works.",
)


def interleave(cases: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each case, run in turn, after one uncounted round."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_number in range(repeats + 1):
        for name, case in cases.items():
            begin = time.perf_counter()
            case()
            if round_number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def decode_benchmark(model: AneeForCausalLM, tokenizer: Any, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Greedy decoding at batch 1, plain `generate` beside ours at several budgets.

    Prompts take turns over the rounds. A case's ratio is the median over the rounds of plain seconds / its seconds.
    """
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    inputs = [_chat(tokenizer, prompt) for prompt in PROMPTS]
    turn = {"plain": 0} | {str(budget): 0 for budget in BUDGETS}
    costs: dict[str, float] = {}

    def case(name: str, budget: float | None) -> Callable[[], None]:
        def call() -> None:
            prompt = inputs[turn[name] % len(inputs)]
            turn[name] += 1
            if budget is None:
                model.base.generate(**prompt, **length)
                return
            output: Any = model.generate(**prompt, **length, energy_budget=budget, return_dict_in_generate=True)
            costs[name] = output.execution.mean_cost

        return call

    cases = {"plain": case("plain", None)} | {str(budget): case(str(budget), budget) for budget in BUDGETS}
    seconds = interleave(cases, repeats)
    rows = [_row(name, seconds, new_tokens, costs.get(name, 1.0), model.costs.stack_share) for name in cases]
    return {
        "what": f"greedy decoding, batch 1, {new_tokens} new tokens, {repeats} rounds",
        "dtype": str(model.dtype),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "controller": model.config.controller,
        "rows": rows,
    }


def _row(name: str, seconds: dict[str, list[float]], tokens: int, cost: float, stack_share: float) -> dict[str, Any]:
    ratios = [plain / own for plain, own in zip(seconds["plain"], seconds[name], strict=True)]
    return {
        "case": "plain generate" if name == "plain" else f"budget {name}",
        "tokens_per_second": tokens / statistics.median(seconds[name]),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "mean_cost": cost,
        # Were time only weight bytes: what the whole model reads at this cost, against all of it.
        "ceiling": 1.0 / (cost * stack_share + 1.0 - stack_share),
    }


def _chat(tokenizer: Any, prompt: str) -> dict[str, torch.Tensor]:
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True, return_tensors="pt")


def table(report: dict[str, Any]) -> str:
    """The report as text, one line per case."""
    lines = [
        f"{report['what']}; {report['controller']} controller; "
        f"{report['dtype']} on {report['device']}, {report['threads']} threads",
        f"{'case':16s} {'tokens/s':>9s} {'ratio':>6s} {'(min-max)':>13s} {'mean cost':>10s} {'byte ceiling':>13s}",
    ]
    for row in report["rows"]:
        spread = f"({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
        lines.append(
            f"{row['case']:16s} {row['tokens_per_second']:9.1f} {row['ratio']:6.2f} {spread:>13s} "
            f"{row['mean_cost']:10.3f} {row['ceiling']:13.2f}"
        )
    return "\n".join(lines)
