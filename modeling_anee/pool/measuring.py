"""What every rung costs and loses on examples, once; policies are fitted and compared on these figures, as they would choose.

Shapes: N examples, R rungs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .config import Measured
from .examples import Example
from .features import Glance
from .rungs import Rung, glance_of


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
class Sample:
    """An example with what each rung made of it; `weight` is what losses are divided by: bytes of the answer.

    Args:
        text: of the prompt.
        source: name of the text that it is from.
        weight: bytes of what should come next.
        size: bytes of prompt and answer.
        outcomes: by rung.
    """

    text: str
    source: str
    weight: int
    size: int
    outcomes: dict[str, Outcome]


def measure(
    rungs: Sequence[Callable[[], Rung]], examples: Sequence[Example], progress: Callable[[int], Any] | None = None
) -> list[Sample]:
    """Run every rung on every example, rung by rung; `progress` is called with the number of examples that were just run."""
    found: list[dict[str, Outcome]] = [{} for _ in examples]
    for load in rungs:
        rung = load()
        for example, outcomes in zip(examples, found, strict=True):
            outcomes[rung.name] = outcome_of(rung, example)
            if progress is not None:
                progress(1)
    sizes = [(len(example.answer.encode()), len((example.prompt + example.answer).encode())) for example in examples]
    parts = zip(examples, sizes, found, strict=True)
    return [Sample(example.prompt, example.source, *size, outcomes) for example, size, outcomes in parts]


def outcome_of(rung: Rung, example: Example) -> Outcome:
    """Read prompt and answer in one go; a token that stands in both belongs to the answer."""
    reading = rung.read(example.prompt + example.answer)
    answer = reading.ends > len(example.prompt)
    return Outcome(
        loss=float(reading.bits[answer].sum()),
        work=float(reading.work.sum()),
        tokens=reading.tokens,
        confidence=float(reading.sure[answer].mean()),
        dearest=reading.dearest,
        glance=glance_of(reading, example.prompt),
    )


def summarise(samples: Sequence[Sample]) -> dict[str, Measured]:
    """What a pool's file says of each rung."""
    summaries = {}
    for name in samples[0].outcomes:
        outcomes = [sample.outcomes[name] for sample in samples]
        sources = dict.fromkeys(sample.source for sample in samples)
        work = sum(outcome.work for outcome in outcomes)
        summaries[name] = Measured(
            bytes_per_token=work / sum(outcome.tokens for outcome in outcomes),
            most_bytes_per_token=max(outcome.dearest for outcome in outcomes),
            bytes_per_text_byte=work / sum(sample.size for sample in samples),
            loss=mean_loss(samples, name),
            losses={source: mean_loss([one for one in samples if one.source == source], name) for source in sources},
        )
    return summaries


def mean_loss(samples: Sequence[Sample], name: str) -> float:
    """Bits per byte of a rung."""
    return sum(sample.outcomes[name].loss for sample in samples) / sum(sample.weight for sample in samples)
