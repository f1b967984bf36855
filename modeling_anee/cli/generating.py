"""Verbs that generate text: `anee generate` and `anee demo`."""

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import set_seed

from ..base_memory import as_text
from ..budget_sources import BudgetSource, Deadline, TokensPerSecond, check_above_zero
from ..capacity import check_capacity, check_one
from ..checks import check_budget
from ..data.progress import waiting
from ..modeling_anee import AneeForCausalLM
from ..speed_search import Point, TargetNotReached
from ..target_speedup import check_target
from .console import Output, check_file, check_picture, deliver, extra_libraries, say
from .generation import Generated, encode, read_prompt, run
from .model import energy_model, load, named_model
from .options import (
    ControllerOption,
    DtypeOption,
    EnergyOption,
    GgufOption,
    ModelArgument,
    ModelOption,
    PrecisionsOption,
    TrustOption,
)


def generate(
    prompt: Annotated[str, typer.Option(help="Text to go on from; - is the standard input.")],
    name: ModelArgument = None,
    model: ModelOption = None,
    energy_budget: Annotated[float | None, typer.Option(help="Share of the whole model's work to spend, 0 to 1.")] = None,
    prompt_energy_budget: Annotated[float | None, typer.Option(help="The same for the prompt. Default: the same.")] = None,
    capacity: Annotated[
        float | None,
        typer.Option(help="Instead of a budget, with a gated controller: share of the feed-forwards to run, 0.1 to 1."),
    ] = None,
    target_speedup: Annotated[
        float | None,
        typer.Option(help="Instead of a budget: how many times faster than at budget 1.0, measured here from the prompt on."),
    ] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="The tokens of budget 1.0, faster: a cheap plan drafts, the full model verifies.")
    ] = False,
    deadline: Annotated[
        float | None, typer.Option(help="Instead of a budget: seconds for prompt and --max-new-tokens; the budget follows.")
    ] = None,
    tokens_per_second: Annotated[float | None, typer.Option(help="The same for a rate, the prompt's time left out.")] = None,
    lowest_budget: Annotated[float | None, typer.Option(help="With one of these two: never less, whatever the time.")] = None,
    controller: ControllerOption = None,
    precisions: PrecisionsOption = None,
    drop_full: Annotated[
        bool, typer.Option("--drop-full", help="Keep only the weights that were made for --precisions, or for an artifact's.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 100,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the tokenizer's chat template.")] = False,
    sample: Annotated[bool, typer.Option(help="Sample instead of taking the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(help="Seed for --sample.")] = 0,
    dtype: DtypeOption = "auto",
    energy_of: EnergyOption = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed, cost and floor; draw the execution as text.")] = False,
    heatmap: Annotated[Path | None, typer.Option(help="Write the execution heatmap to this PNG.")] = None,
    depth: Annotated[Path | None, typer.Option(help="Write the depth of every token along the text to this PNG.")] = None,
    page: Annotated[
        Path | None, typer.Option(help="Write an HTML page of the text, coloured by cost, with every token's actions.")
    ] = None,
    gguf_file: GgufOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Generate text under an energy budget."""
    check_picture("--heatmap", heatmap)
    check_picture("--depth", depth)
    check_file("--page", page)
    budgets = {"energy_budget": energy_budget, "prompt_energy_budget": prompt_energy_budget}
    times = {"deadline": deadline, "tokens_per_second": tokens_per_second}
    for option, budget in budgets.items():
        if budget is not None:
            check_budget(budget, option)
    if target_speedup is not None:
        check_target(target_speedup, "--target-speedup")
        if energy_budget is not None or capacity is not None:
            given = "--energy-budget" if capacity is None else "--capacity"
            raise ValueError(f"--target-speedup finds the budget and {given} gives it: give one of them")
    if lossless and (given := _given({**budgets, "capacity": capacity, "target_speedup": target_speedup, **times})):
        raise ValueError(f"--lossless gives the tokens of budget 1.0: leave {option_of(given)} out")
    if capacity is not None:
        check_capacity(capacity)
    check_one(capacity, energy_budget)
    others = {"--energy-budget": energy_budget, "--capacity": capacity, "--target-speedup": target_speedup}
    source = followed({option_of(name): value for name, value in times.items()}, lowest_budget, others)
    text = read_prompt(prompt)
    energy = energy_model(energy_of)
    named = named_model(name, model)
    loaded, tokenizer = load(
        named,
        controller,
        dtype,
        gguf_file=gguf_file,
        trust_remote_code=trust_remote_code,
        precisions=precisions,
        drop_full=drop_full,
    )
    inputs = encode(tokenizer, text, chat)
    if target_speedup is not None:
        find_budget(loaded, target_speedup, inputs)
    set_seed(seed)
    options = {"do_sample": sample, "capacity": capacity, "lossless": lossless or None}
    asked = budgets if source is None else budgets | {"energy_budget": source}
    done = run(loaded, tokenizer, inputs, max_new_tokens, energy, **options, **asked)
    try:  # files first: the standard output may be closed
        facts = describe(loaded, budgets | {"capacity": capacity}) | {"speed": f"{done.speed:.1f} tokens/s"}
        if source is not None:
            facts["energy budget"] = done.budgets
        draw(done, heatmap, depth, page, facts)
    finally:
        say(done.text)
    if stats:
        print(f"\n{done.speed:.1f} tokens/s, {done.trace.summary()}\n{done.energy}", file=sys.stderr)
        if source is not None:
            print(f"{done.seconds:.2f} s, budget {done.budgets}", file=sys.stderr)
        print(as_text(loaded.held_bytes), file=sys.stderr)
        print(done.trace.render(), file=sys.stderr)


def _given(options: dict[str, float | None]) -> str:
    """The first option that was given; nothing where none was."""
    return next((name for name, value in options.items() if value is not None), "")


def option_of(name: str) -> str:
    """How an option of a name is written."""
    return f"--{name.replace('_', '-')}"


def followed(wanted: dict[str, float | None], lowest: float | None, others: dict[str, float | None]) -> BudgetSource | None:
    """What the budget is to follow, by option; None for nothing.

    Args:
        wanted: values of `--deadline` and `--tokens-per-second`.
        lowest: value of `--lowest-budget`.
        others: values of the options that give or find a budget.

    Raises:
        ValueError: a value that is not allowed, more than one way to say a budget, or a lowest one of none.
    """
    kinds = {"--deadline": Deadline, "--tokens-per-second": TokensPerSecond}
    given = {option: value for option, value in wanted.items() if value is not None}
    for option, value in given.items():
        check_above_zero(option, value)
    too_many = [*given, *(option for option, value in others.items() if value is not None)]
    if given and len(too_many) > 1:
        raise ValueError(f"{too_many[0]} and {too_many[1]} both say the budget: give one of them")
    if lowest is not None:
        check_budget(lowest, "--lowest-budget")
        if not given:
            raise ValueError(f"--lowest-budget {lowest:g} is not allowed without {' or '.join(kinds)}")
    return next((kinds[option](value, lowest=lowest or 0.0) for option, value in given.items()), None)


def find_budget(model: AneeForCausalLM, target: float, inputs: dict[str, torch.Tensor]) -> None:
    """Set the default budget for a target speedup, and say on stderr what was tried and what was found.

    Raises:
        TargetNotReached: there is none.
    """
    try:
        with waiting("measuring speeds"):
            found = model.set_target_speedup(target, inputs)
    except TargetNotReached as error:
        tell_tried(error.tried)
        raise
    tell_tried(found.tried)
    print(f"found: energy_budget {found.budget:.4g}, {found.speedup:.2f} times the speed of budget 1.0\n", file=sys.stderr)


def tell_tried(tried: Iterable[Point]) -> None:
    """Say on stderr which budgets were measured, in that order."""
    for budget, speedup in tried:
        print(f"tried: energy_budget {budget:<6.4g}  {speedup:.2f} times the speed of budget 1.0", file=sys.stderr)


def draw(done: Generated, heatmap: Path | None, depth: Path | None, page: Path | None, facts: dict[str, str]) -> None:
    """Write the pictures of a generation that are asked for; the facts are for the page."""
    if heatmap is not None:
        from ..pictures.heatmap import draw_heatmap

        draw_heatmap(done.trace, heatmap, done.tokens, prompt_length=done.prompt_length)
    if depth is not None:
        from ..pictures.depth import draw_depth

        draw_depth(done.trace, depth, done.tokens, prompt_length=done.prompt_length)
    if page is not None:
        from ..pictures.page import write_page

        write_page(done.trace, page, done.tokens, done.prompt_length, facts | {"energy": done.energy.removeprefix("energy ")})


def describe(model: AneeForCausalLM, given: dict[str, float | None]) -> dict[str, str]:
    """What the head of a page says of a model and of the budgets that hold; `given` are those of the call."""
    facts = {"base": model.config.base_model_name_or_path, "controller": model.config.controller}
    if given.get("capacity") is not None:
        given = {name: budget for name, budget in given.items() if name != "energy_budget"}
    for name, budget in given.items():
        defaults = getattr(model.generation_config, name, None), getattr(model.config, name, None)
        held = next((value for value in (budget, *defaults) if value is not None), None)
        if held is not None:
            facts[name.replace("_", " ")] = f"{held:g}"
    return facts


def shown_lossless(
    model: AneeForCausalLM, tokenizer: Any, inputs: dict[str, torch.Tensor], max_new_tokens: int, expected: str
) -> str:
    """The same text by drafts, and whether it is the same."""
    model.generate(**inputs, lossless=True, max_new_tokens=2)  # what drafts need is made, and measured
    done = run(model, tokenizer, inputs, max_new_tokens, lossless=True)
    assert done.trace.lossless is not None
    same = "identical to that" if done.text == expected else "another text, which it should not be"
    return f"--- lossless: {done.speed:.1f} tokens/s, {same}\n{done.trace.lossless.summary()}\n{done.text.strip()}"


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the heatmap.")] = Path("anee_demo"),
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "Explain in a few sentences why the sky is blue.",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at each budget.")] = 60,
    precisions: PrecisionsOption = None,
) -> None:
    """Generate with a small real model at budgets from 1.0 down, and losslessly; draw what was run at the lowest."""
    from ..evaluation.shown import budgets_to_show

    with extra_libraries("plots", "demo"):
        from ..pictures.heatmap import draw_heatmap
    model, tokenizer = load(None, None, precisions=precisions)
    inputs = encode(tokenizer, read_prompt(prompt), chat=True)
    output.mkdir(parents=True, exist_ok=True)
    parts = [f"controller: {model.config.controller}"]
    for budget in budgets_to_show(model.config, model.dtype):
        done = run(model, tokenizer, inputs, max_new_tokens, energy_budget=budget)
        parts.append(f"--- energy_budget {budget}: {done.speed:.1f} tokens/s, {done.trace.summary()}\n{done.text.strip()}")
        if budget == 1.0:
            parts.append(shown_lossless(model, tokenizer, inputs, max_new_tokens, done.text))
    parts.append(f"execution at energy_budget {budget}:\n{done.trace.render()}")
    draw = partial(draw_heatmap, done.trace, tokens=done.tokens, prompt_length=done.prompt_length)
    deliver("\n\n".join(parts), Output("heatmap", output / "heatmap.png", draw))
