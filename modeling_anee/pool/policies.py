"""Policies: which rung serves a request. Each sees a `Case` and gives a `Choice`; none of them runs a rung by itself.

`complexity` is in `complexity.py`, `learned` and `mixture` are both a `Gate` (`gates.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .config import Cascade, Measured, PoolConfig
from .features import Glance, features_of


@dataclass
class Case:
    """A request, and what may serve it.

    Args:
        text: of the prompt.
        rungs: names of those that may serve, the cheapest first; at least one.
        measured: what is known of each rung.
        take_look: lets the rung that looks read the prompt.
    """

    text: str
    rungs: Sequence[str]
    measured: Mapping[str, Measured]
    take_look: Callable[[], Glance]

    @cached_property
    def glance(self) -> Glance:
        """What the cheap pass found; it is run when this is first asked."""
        return self.take_look()

    @cached_property
    def features(self) -> dict[str, float]:
        """The features of the prompt."""
        return features_of(self.text, self.glance)

    def nearest(self, name: str) -> str:
        """The rung of this name, if it may serve; or else the next dearer one that may, or else the next cheaper one."""
        if name in self.rungs:
            return name
        cost = self.measured[name].bytes_per_token
        dearer = [rung for rung in self.rungs if self.measured[rung].bytes_per_token >= cost]
        return dearer[0] if dearer else self.rungs[-1]


@dataclass(frozen=True)
class Choice:
    """A rung, why in one line, and the figures behind it, by what they are."""

    rung: str
    reason: str
    figures: Mapping[str, Any] = field(default_factory=dict)


class Policy:
    """Interface. `looks`: whether the features are asked for; `asks_confidence`: whether it may change its mind afterwards."""

    looks = False
    asks_confidence = False

    def choose(self, case: Case) -> Choice:
        """The rung for a case."""
        raise NotImplementedError

    def reconsider(self, case: Case, confidence: float) -> Choice | None:
        """Another rung, after the first one has answered with this confidence; None where its answer is good enough."""
        return None


class EnergyPolicy(Policy):
    """The most accurate rung of those that may serve, which are those that the budget affords."""

    def choose(self, case: Case) -> Choice:
        """The one that was measured to lose least; of equals the cheapest."""
        best = min(case.rungs, key=lambda name: case.measured[name].loss)
        return Choice(best, f"the most accurate of {len(case.rungs)} rungs, loss {case.measured[best].loss:.3f}")


class FixedPolicy(Policy):
    """Always the same rung: a control."""

    def __init__(self, name: str) -> None:
        self._name = name

    def choose(self, case: Case) -> Choice:
        """That rung."""
        return Choice(case.nearest(self._name), f"always {self._name}")


class CascadePolicy(Policy):
    """A cheap rung first, the dear one where it is not sure (FrugalGPT, arXiv:2305.05176, with the rung's own confidence)."""

    asks_confidence = True

    def __init__(self, config: Cascade, threshold: float | None = None) -> None:
        self._cheap, self._dear = config.cheap, config.dear
        self._threshold = config.threshold if threshold is None else threshold

    def choose(self, case: Case) -> Choice:
        """The cheap rung."""
        return Choice(case.nearest(self._cheap), "the cheap rung of the cascade goes first")

    def reconsider(self, case: Case, confidence: float) -> Choice | None:
        """The dear one below the threshold, if it may serve."""
        if confidence >= self._threshold or self._dear not in case.rungs:
            return None
        return Choice(self._dear, f"confidence {confidence:.3f} of {self._cheap} is below {self._threshold:.3f}")


def policy_of(config: PoolConfig, name: str, price: float | None = None) -> Policy:
    """The policy of a pool by its name.

    Args:
        config: the pool's.
        name: one of `POLICIES`.
        price: of `learned` and `mixture`, which of the fits: the one at the nearest price. Default: the pool's.

    Raises:
        ValueError: an unknown name, or one that the pool has no settings for.
        ImportError: `complexity` without the library for fuzzy rules.
    """
    settings = {
        "energy": True,
        "complexity": config.fuzzy,
        "learned": config.learned,
        "cascade": config.cascade,
        "mixture": config.mixture,
    }
    if name not in settings:
        raise ValueError(f"policy={name!r} is not allowed: it must be one of {', '.join(settings)}")
    if not settings[name]:
        raise ValueError(f"policy={name!r} is not possible: this pool has no settings for it, which anee pool make writes")
    if name == "complexity" and config.fuzzy is not None:
        from .complexity import ComplexityPolicy

        return ComplexityPolicy(config.fuzzy)
    if name == "cascade" and config.cascade is not None:
        return CascadePolicy(config.cascade)
    if name == "energy":
        return EnergyPolicy()
    from .gates import GatePolicy, gate_at

    gates = config.learned if name == "learned" else config.mixture
    return GatePolicy(gate_at(gates, config.price if price is None else price))
