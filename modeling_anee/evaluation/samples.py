"""What a model says at several budgets: greedy answers to ten fixed questions, unedited."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..modeling_anee import AneeForCausalLM


PROMPTS = (
    "What is the capital of Norway, and on which water does it lie?",
    "How many days are in a leap year, and why is there one?",
    "Explain to a ten-year-old what gravity does.",
    "What is the difference between a virus and a bacterium?",
    "Write a short, friendly email that moves a meeting from Monday to Wednesday.",
    "Write the opening of a story about a clock that runs backwards.",
    "I sleep badly before exams. What can I do?",
    "My bread always comes out too dense. What could be wrong?",
    "List five things to pack for a day in the mountains.",
    "Give me three names for a small bookshop by the sea.",
)


def sample(
    model: AneeForCausalLM,
    tokenizer: Any,
    budgets: Sequence[float],
    max_new_tokens: int,
    prompts: Sequence[str] = PROMPTS,
    progress: Callable[[int], Any] | None = None,
) -> list[dict[str, Any]]:
    """One row per prompt and budget: what was asked, what it cost, and the answer as it came.

    Args:
        model: what answers.
        tokenizer: its tokenizer, with a chat template.
        budgets: energy budgets.
        max_new_tokens: tokens of an answer, at most.
        prompts: what to ask.
        progress: called with 1 after every answer.

    Raises:
        ValueError: the tokenizer has no chat template, a budget is out of [0, 1], or the model's logits are not finite.
    """
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template, which the questions are put into")
    rows = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        inputs = inputs.to(model.device)
        for budget in budgets:
            output: Any = model.generate(
                **inputs,
                energy_budget=budget,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            if not torch.stack(output.logits).isfinite().all():
                raise ValueError(f"the answer to {prompt!r} at budget {budget:g} is none: the model's logits are not finite")
            answer = output.sequences[0, inputs["input_ids"].shape[1] :]
            text = tokenizer.decode(answer, skip_special_tokens=True)
            rows.append({"prompt": prompt, "budget": budget, "cost": output.execution.mean_cost, "text": text})
            if progress is not None:
                progress(1)
    return rows


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown: every prompt, then its answers in code blocks, in which nothing is formatted."""
    lines: list[str] = []
    asked = None
    for row in rows:
        if row["prompt"] != asked:
            asked = row["prompt"]
            lines += [f"**{asked}**", ""]
        fence = _fence(row["text"])
        lines += [f"budget {row['budget']:g}, cost {row['cost']:.3f}:", "", f"{fence}text", row["text"], fence, ""]
    return "\n".join(lines).rstrip()


def _fence(text: str) -> str:
    """A fence that is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return fence
