"""The model that a verb works with, and one generation with it."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from ..data.smollm2 import BASE_FIELDS, shipped_artifact, smollm2_folder
from ..evaluation.energy import EnergyMeter, devices_of
from ..evaluation.tokens import token_texts
from ..modeling_anee import AneeForCausalLM
from ..trace import ExecutionTrace
from .console import progress_bar, progress_console


def load(name: str | None, controller: str | None, dtype: str = "auto", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """An artifact, or a base with an untrained controller; and its tokenizer.

    Args:
        name: folder or Hub name; None for the shipped artifact, or its base where there is none.
        controller: for a base; None for `plan`.
        dtype: of the base.
        trust_remote_code: allow code that comes with the base.

    Raises:
        ValueError: a controller for an artifact, which has its own.
        OSError: there is no such model.
    """
    logging.disable_progress_bar()
    with progress_console.status("loading the model"):
        folder, fields = (str(name), {}) if name is not None else default_model(controller)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if config.model_type == "anee":
            if controller is not None:
                raise ValueError(f"--controller {controller}: {folder} is an artifact and has its own controller")
            return AneeForCausalLM.from_pretrained(folder, dtype=dtype).eval(), tokenizer
        model = AneeForCausalLM.from_base(
            folder, controller=controller or "plan", dtype=dtype, trust_remote_code=trust_remote_code, **fields
        )
        return model, tokenizer


def named_model(argument: str | None, option: str | None) -> str | None:
    """The model that a verb was told of, as its argument MODEL or its option --model; None for neither.

    Raises:
        ValueError: both were given.
    """
    if argument is not None and option is not None:
        raise ValueError(f"MODEL {argument} and --model {option} are the same setting: give one of them")
    return option if argument is None else argument


def default_model(controller: str | None) -> tuple[str, dict[str, Any]]:
    """What no `--model` means: a folder, and what a configuration says of it if it is a base."""
    base = str(smollm2_folder())  # the artifact needs it too
    artifact = shipped_artifact()
    if controller is None and artifact is not None:
        return str(artifact), {}
    if controller is None:
        print(
            "no trained artifact here: layers are skipped without a stand-in. One comes with the repository, in "
            "configuration/; anee generate --model takes its folder",
            file=sys.stderr,
        )
    return base, BASE_FIELDS


def encode(tokenizer: Any, prompt: str, chat: bool) -> dict[str, torch.Tensor]:
    """Token ids and mask of a prompt, in the chat template if asked for."""
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")


@dataclass(frozen=True)
class Generated:
    """One generation: the new text, every token as text, what was run, new tokens per second, and a line on its energy."""

    text: str
    tokens: list[str]
    prompt_length: int
    trace: ExecutionTrace
    speed: float
    energy: str


def run(
    model: AneeForCausalLM, tokenizer: Any, inputs: dict[str, torch.Tensor], max_new_tokens: int, **kwargs: Any
) -> Generated:
    """Generate with a progress bar."""
    kwargs = {"do_sample": False} | {name: value for name, value in kwargs.items() if value is not None}
    meter = EnergyMeter(devices_of(model.base))
    with progress_bar("generating", max_new_tokens) as advance, meter:
        streamer, begin = TokenCounter(advance), time.perf_counter()
        output: Any = model.generate(
            **inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, streamer=streamer, **kwargs
        )
        seconds = time.perf_counter() - begin
    ids, prompt_length = output.sequences[0], inputs["input_ids"].shape[1]
    text, new = tokenizer.decode(ids[prompt_length:], skip_special_tokens=True), len(ids) - prompt_length
    tokens = token_texts(tokenizer, ids.tolist())
    return Generated(text, tokens, prompt_length, output.execution, new / seconds, meter.describe(new))


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
