"""A rung that classifies: an artifact with early exits at its budget. What it gives is the name of a class."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..sequence_classification import AneeForSequenceClassification
from .config import RungConfig
from .examples import Example
from .features import Glance
from .rungs import Answer, NoChatTemplate, Outcome, Request


@dataclass(frozen=True)
class ClassifierRung:
    """A loaded classifier at the budget that its configuration says, and its tokenizer; a strict one has a fixed exit."""

    config: RungConfig
    model: AneeForSequenceClassification
    tokenizer: Any
    energy_budget: float

    @property
    def name(self) -> str:
        """As the configuration has it."""
        return self.config.name

    @property
    def dearest(self) -> float:
        """Bytes of a token at most: the deepest exit that a text can take, and, for a text of one token, all heads."""
        costs = self.model.exit_costs
        places = costs.reached <= self.energy_budget + 1e-9
        last = max(int(places.sum()) - 1, 0) if self.config.strict else -1
        return float(costs.layers[last] + costs.heads.sum())

    @torch.inference_mode()
    def generate(self, request: Request, with_confidence: bool = False, **kwargs: Any) -> Answer:
        """Classify a text: the answer is the name of its class, the confidence its probability.

        Raises:
            NoChatTemplate: messages.
            ValueError: arguments, of which there are none, or a text without tokens.
        """
        if not isinstance(request, str):
            raise NoChatTemplate("it classifies text, not messages")
        if kwargs:
            raise ValueError(f"{', '.join(kwargs)} is not allowed: rung {self.name!r} is a classifier")
        inputs = self.tokenizer(request, return_tensors="pt", truncation=True).to(self.model.device)
        if not inputs["input_ids"].numel():
            raise ValueError(f"the prompt {request!r} is not allowed: it has no tokens")
        rule = {"exit_rule": "fixed"} if self.config.strict else {}
        output = self.model(inputs["input_ids"], inputs["attention_mask"], energy_budget=self.energy_budget, **rule)
        chance, place = output.logits[0].float().softmax(dim=-1).max(dim=-1)
        tokens = inputs["input_ids"].shape[1]
        costs = self.model.exit_costs  # whose shares are of all layers and heads
        price = float(costs.layers[-1] + costs.heads.sum() / tokens)
        work = float(output.execution.cost.double().sum()) * price
        names: Any = self.model.config.id2label
        return Answer(names[int(place)], output.execution, work, tokens, float(chance), tokens)

    def glance(self, text: str) -> Glance:
        """A look at a text: its doubt stands for perplexity."""
        return glance_of(self.generate(text), text)

    def outcome(self, example: Example) -> Outcome:
        """What the rung makes of an example, whose answer is the name of a class; the loss is 1 for another one.

        Raises:
            ValueError: an example of text to go on with.
        """
        if not example.is_label:
            raise ValueError(f"rung {self.name!r} is a classifier: it needs texts with labels (.tsv), not {example.source}")
        answer = self.generate(example.prompt)
        numbers: Any = self.model.config.label2id
        right = {answer.text, str(numbers[answer.text])}  # files have names of classes, or their numbers
        return Outcome(
            loss=float(example.answer not in right),
            work=answer.work,
            tokens=answer.tokens,
            confidence=answer.confidence or 0.0,
            dearest=self.dearest,
            glance=glance_of(answer, example.prompt),
        )


def glance_of(answer: Answer, text: str) -> Glance:
    """What an answer says of its text: bits of doubt about the class, by bytes of text."""
    doubt = -math.log2(answer.confidence or 1.0)
    return Glance(doubt / max(len(text.encode()), 1), answer.tokens, answer.work)
