"""One generation: what `anee generate` and `anee demo` run."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from ..data.progress import progress
from ..data.text import STDIN, read_text
from ..energy_counters import devices_of
from ..evaluation.energy import EnergyMeter
from ..evaluation.tokens import token_texts
from ..machines.energy import EnergyModel
from ..modeling_anee import AneeForCausalLM
from ..trace import ExecutionTrace


def read_prompt(prompt: str) -> str:
    """A prompt as it was given, or for `-` the standard input, without the line end that a shell puts there.

    Raises:
        ValueError: it is not text in UTF-8.
        OSError: there is no standard input.
    """
    if prompt == str(STDIN):
        return read_text(STDIN).removesuffix("\n")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes of an argument that are no text become such characters
        raise ValueError(f"--prompt is not text in UTF-8: it has {prompt[error.start]!r} at character {error.start}") from None
    return prompt


def encode(tokenizer: Any, prompt: str, chat: bool) -> dict[str, torch.Tensor]:
    """Token ids and mask of a prompt, in the chat template if asked for.

    Raises:
        ValueError: it has no tokens.
    """
    if chat:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise ValueError(f"--prompt {prompt!r} is not allowed: it has no tokens to go on from")
    return inputs


@dataclass(frozen=True)
class Generated:
    """One generation: the new text, every token as text, what was run, how long it took, and a line on its energy."""

    text: str
    tokens: list[str]
    prompt_length: int
    trace: ExecutionTrace
    seconds: float
    energy: str

    @property
    def speed(self) -> float:
        """New tokens per second."""
        return (len(self.tokens) - self.prompt_length) / self.seconds

    @property
    def budgets(self) -> str:
        """What the new tokens were asked to cost, in words."""
        assert self.trace.budget is not None
        asked = self.trace.budget[0, self.prompt_length :]  # the last new token was not run
        if not len(asked):
            return "of the prompt alone"
        return f"{float(asked.min()):.3g} to {float(asked.max()):.3g}, mean {float(asked.mean()):.3g}"


def run(
    model: AneeForCausalLM,
    tokenizer: Any,
    inputs: dict[str, torch.Tensor],
    max_new_tokens: int,
    energy: EnergyModel | None = None,
    **kwargs: Any,
) -> Generated:
    """Generate, and show how far it is; `energy` models joules where the machine can't tell."""
    kwargs = {"do_sample": False} | {name: value for name, value in kwargs.items() if value is not None}
    meter = EnergyMeter(devices_of(model.base))
    with progress("generating", max_new_tokens) as advance, meter:
        streamer, begin = TokenCounter(advance), time.perf_counter()
        output: Any = model.generate(
            **inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, streamer=streamer, **kwargs
        )
        seconds = time.perf_counter() - begin
    ids, prompt_length = output.sequences[0], inputs["input_ids"].shape[1]
    text, new = tokenizer.decode(ids[prompt_length:], skip_special_tokens=True), len(ids) - prompt_length
    tokens = token_texts(tokenizer, ids.tolist())
    told = meter.describe(new)
    if energy is not None:
        modelled = partial(energy.of_trace, model, output.execution, prompt_length, seconds)
        told = meter.describe(new, modelled, energy.machine.name)
    return Generated(text, tokens, prompt_length, output.execution, seconds, told)


class TokenCounter(BaseStreamer):
    """Tells a function how many tokens have just been generated."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Count new tokens; the first call has the prompt."""
        if self._seen_prompt:
            self._advance(value.numel())
        self._seen_prompt = True

    def end(self) -> None:
        """Nothing to flush."""
