"""One rung of a pool, loaded: a language model at a budget, which generates, or reads a text.

Shapes: T tokens of a text, V entries of a vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.encoding import start_tokens
from ..modeling_anee import AneeForCausalLM
from ..trace import ExecutionTrace
from .config import RungConfig
from .examples import Example
from .features import Glance


Request = str | Sequence[dict[str, str]]  # a text to go on from, or messages of a chat


class NoChatTemplate(ValueError):
    """Messages for a tokenizer that has no chat template."""


class Reading(NamedTuple):
    """A text of T tokens, as a rung saw it.

    Args:
        ends: where each token ends in the text, in characters, int64 [T].
        bits: of each token given those before it, float64 [T]; 0 where there is none before.
        sure: probability of what the rung held most likely in its place, float64 [T]; 1 likewise.
        work: bytes of weights that were read for each token, float64 [T]; the first has those for the BOS token, too.
        dearest: the most that any single token read.
        tokens: how many were run, those before the text included.
    """

    ends: Tensor
    bits: Tensor
    sure: Tensor
    work: Tensor
    dearest: float
    tokens: int


@dataclass(frozen=True)
class Outcome:
    """One rung on one example.

    Args:
        loss: bits of what should come next.
        work: bytes of weights read for all of it.
        tokens: how many were run.
        confidence: mean probability of the likeliest token, where the answer stands.
        dearest: bytes of the dearest token.
        glance: what the rung would say of the prompt if it were the one that looks.
    """

    loss: float
    work: float
    tokens: int
    confidence: float
    dearest: float
    glance: Glance


@dataclass(frozen=True)
class Answer:
    """What a rung generated.

    Args:
        text: the new text.
        trace: what was run, of one row.
        work: bytes of weights that were read.
        tokens: how many tokens were run, those of the prompt included.
        confidence: mean probability of the likeliest token, over the new ones; None if it was not asked for.
        prompt: tokens of the prompt, the first of those.
    """

    text: str
    trace: ExecutionTrace
    work: float
    tokens: int
    confidence: float | None = None
    prompt: int = 0


@dataclass(frozen=True)
class Rung:
    """A loaded rung: a model at the budget that its configuration says, and its tokenizer."""

    config: RungConfig
    model: AneeForCausalLM
    tokenizer: Any
    energy_budget: float

    @property
    def name(self) -> str:
        """As the configuration has it."""
        return self.config.name

    def generate(self, request: Request, with_confidence: bool = False, **kwargs: Any) -> Answer:
        """Go on from a request; `kwargs` are those of `generate` of transformers.

        Raises:
            NoChatTemplate: messages for a tokenizer that has none.
            ValueError: nothing to go on from.
        """
        inputs = self._encode(request)
        length = inputs["input_ids"].shape[1]
        output: Any = self.model.generate(
            **inputs,
            energy_budget=self.energy_budget,
            return_dict_in_generate=True,
            output_logits=with_confidence,
            **kwargs,
        )
        trace = output.execution
        text = self.tokenizer.decode(output.sequences[0, length:], skip_special_tokens=True)
        sure = [float(logits[0].float().softmax(dim=-1).max()) for logits in output.logits] if with_confidence else []
        work = float(trace.cost.double().sum()) * self.model.costs.total
        return Answer(text, trace, work, int(trace.valid.sum()), sum(sure) / len(sure) if sure else None, length)

    @torch.inference_mode()
    def read(self, text: str) -> Reading:
        """Score a text, in one forward.

        Raises:
            ValueError: a tokenizer that does not tell where its tokens are.
        """
        if not self.tokenizer.is_fast:
            raise ValueError(f"rung {self.name!r} has a slow tokenizer, which does not tell where tokens are in a text")
        start = start_tokens(self.tokenizer)
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = torch.tensor([start + found["input_ids"]], device=self.model.device)
        output = self.model(input_ids=ids, energy_budget=self.energy_budget, use_cache=False)
        chances = output.logits[0].float().log_softmax(dim=-1)  # [start + T, V]
        bits = -chances[:-1].gather(1, ids[0, 1:, None]).squeeze(1).double() / math.log(2)
        sure = chances[:-1].max(dim=-1).values.double().exp()
        if not start:
            bits, sure = torch.cat([bits.new_zeros(1), bits]), torch.cat([sure.new_ones(1), sure])
        kept = len(found["input_ids"])
        price = output.execution.cost[0].double() * self.model.costs.total
        work = price[-kept:].clone()
        work[0] += price[:-kept].sum()
        ends = torch.tensor([end for _, end in found["offset_mapping"]])
        return Reading(ends, bits[-kept:].cpu(), sure[-kept:].cpu(), work, float(price.max()), len(price))

    def glance(self, text: str) -> Glance:
        """A look at a prompt before a rung is chosen."""
        return glance_of(self.read(text), text)

    def outcome(self, example: Example) -> Outcome:
        """Read prompt and answer in one go; a token that stands in both belongs to the answer.

        Raises:
            ValueError: an example whose answer is a label.
        """
        if example.is_label:
            raise ValueError(f"rung {self.name!r} is a language model: {example.source} has labels, which are for classifiers")
        reading = self.read(example.prompt + example.answer)
        answer = reading.ends > len(example.prompt)
        return Outcome(
            loss=float(reading.bits[answer].sum()),
            work=float(reading.work.sum()),
            tokens=reading.tokens,
            confidence=float(reading.sure[answer].mean()),
            dearest=reading.dearest,
            glance=glance_of(reading, example.prompt),
        )

    def _encode(self, request: Request) -> Any:
        if isinstance(request, str):
            inputs = self.tokenizer(request, return_tensors="pt")
        elif self.tokenizer.chat_template is None:
            raise NoChatTemplate("its tokenizer has no chat template for messages")
        else:
            messages = [dict(message) for message in request]
            inputs = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        if not inputs["input_ids"].numel():
            raise ValueError(f"the prompt {request!r} is not allowed: it has no tokens to go on from")
        return {name: value.to(self.model.device) for name, value in inputs.items() if name != "token_type_ids"}


def glance_of(reading: Reading, text: str) -> Glance:
    """What the beginning of a reading says of `text`, which it begins with."""
    inside = reading.ends <= len(text)
    return Glance(float(reading.bits[inside].sum()) / len(text.encode()), int(inside.sum()), float(reading.work[inside].sum()))
