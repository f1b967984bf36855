"""What every rung costs and loses on examples, once; policies are fitted and compared on these figures, as they would choose.

Shapes: N examples, R rungs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .config import Measured
from .examples import Example
from .loading import AnyRung
from .rungs import Outcome


@dataclass(frozen=True)
class Sample:
    """An example with what each rung made of it.

    Args:
        text: of the prompt.
        source: name of the text that it is from.
        weight: what losses are divided by: bytes of what should come next, or 1 for a label.
        size: bytes of all that was run.
        outcomes: by rung.
    """

    text: str
    source: str
    weight: int
    size: int
    outcomes: dict[str, Outcome]


def measure(
    rungs: Sequence[Callable[[], AnyRung]], examples: Sequence[Example], progress: Callable[[int], Any] | None = None
) -> list[Sample]:
    """Run every rung on every example, rung by rung; `progress` is called with the number of examples that were just run."""
    found: list[dict[str, Outcome]] = [{} for _ in examples]
    for load in rungs:
        rung = load()
        for example, outcomes in zip(examples, found, strict=True):
            outcomes[rung.name] = rung.outcome(example)
            if progress is not None:
                progress(1)
    return [Sample(one.prompt, one.source, one.weight, one.size, parts) for one, parts in zip(examples, found, strict=True)]


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
