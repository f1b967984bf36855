"""One rung of a pool: loaded when it is first needed, then it generates, or reads a text.

Rungs over the same base share it. Weights come from safetensors only, and no code comes with them.

Shapes: T tokens of a text, V entries of a vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig

from ..base_loading import find_base
from ..configuration_anee import AneeConfig
from ..data.encoding import start_tokens
from ..modeling_anee import AneeForCausalLM
from ..trace import ExecutionTrace
from ..weight_files import readable_weights
from .config import RungConfig
from .features import Glance


Request = str | Sequence[dict[str, str]]  # a text to go on from, or messages of a chat
PRECISIONS = ("int8", "int4")


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
class Answer:
    """What a rung generated.

    Args:
        text: the new text.
        trace: what was run, of one row.
        work: bytes of weights that were read.
        tokens: how many tokens were run, those of the prompt included.
        confidence: mean probability of the likeliest token, over the new ones; None if it was not asked for.
    """

    text: str
    trace: ExecutionTrace
    work: float
    tokens: int
    confidence: float | None = None


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
        return Answer(text, trace, work, int(trace.valid.sum()), sum(sure) / len(sure) if sure else None)

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


class Loader:
    """Loads rungs: models that differ in nothing but their budget are one, and so are the bases of others."""

    def __init__(self, folder: Path, device: str | torch.device = "cpu") -> None:
        self._folder, self._device = folder, device
        self._models: dict[tuple, tuple[Any, Any]] = {}
        self._bases: dict[tuple, tuple[Any, Any]] = {}

    def load(self, config: RungConfig) -> Rung:
        """Load one rung.

        Raises:
            OSError: the model can't be found or read, or has no safetensors.
            ValueError: what can't be wrapped, a plan for an artifact, costs in something else than bytes.
        """
        whole = (config.model, config.revision, config.dtype, config.strict, config.plan)
        if whole not in self._models:
            where = self._where(config.model)
            with readable_weights(where):
                load = self._artifact if is_artifact(where, config) else self._wrapped
                model, tokenizer = load(where, config)
            if model.costs.unit != "bytes":
                raise ValueError(f"{config.model} counts costs in {model.costs.unit}, and rungs are compared in bytes")
            self._models[whole] = model.to(self._device).eval(), tokenizer
        model, tokenizer = self._models[whole]
        budget = 1.0 if config.energy_budget is None else config.energy_budget
        return Rung(config, model, tokenizer, budget if config.plan is None else min(model.controller.plan_budgets()))

    def _where(self, model: str) -> str:
        """A folder relative to the pool's, or else what the name stands for."""
        local = self._folder / model
        return str(local) if local.is_dir() else find_base(model)[0]

    def _artifact(self, where: str, config: RungConfig) -> tuple[Any, Any]:
        if config.plan is not None:
            raise ValueError(f"rung {config.name!r} has a plan, and {config.model} is an artifact: give it an energy_budget")
        options: dict[str, Any] = {"dtype": config.dtype, "use_safetensors": True}
        options |= {"budget_mode": "strict"} if config.strict else {}
        return AneeForCausalLM.from_pretrained(where, **files_of(config), **options), tokenizer_of(where, config)

    def _wrapped(self, where: str, config: RungConfig) -> tuple[Any, Any]:
        options: dict[str, Any] = {"controller": "plan", "cost_unit": "bytes", "keep_first_tokens": 0}
        if config.plan is not None:
            precisions = [name for name in PRECISIONS if name in config.plan.lower()]
            options |= {"plans": [config.plan], "precisions": precisions}
        key = (config.model, config.revision, config.dtype)
        if key not in self._bases:
            loading: dict[str, Any] = {"dtype": config.dtype, "use_safetensors": True}
            model = AneeForCausalLM.from_base(where, **files_of(config), **loading, **options)
            self._bases[key] = model.base, tokenizer_of(where, config)
            return model, self._bases[key][1]
        base, tokenizer = self._bases[key]
        return AneeForCausalLM.from_base(base, **options), tokenizer


def tokenizer_of(where: str, config: RungConfig) -> Any:
    """The tokenizer that comes with a model."""
    return AutoTokenizer.from_pretrained(where, trust_remote_code=False, **files_of(config))


def files_of(config: RungConfig) -> dict[str, Any]:
    """Which files of a repository are meant."""
    return {} if config.revision is None else {"revision": config.revision}


def is_artifact(where: str, config: RungConfig) -> bool:
    """Whether a folder or a repository of the Hub holds an artifact of ours."""
    return PreTrainedConfig.get_config_dict(where, **files_of(config))[0].get("model_type") == AneeConfig.model_type
