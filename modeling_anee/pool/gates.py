"""Policies that score every rung from the features: a logistic regression, or a gating network; the highest score serves.

The gate is that of a mixture of experts with top-1 routing (arXiv:1701.06538), with whole models as experts, once a request.
"""

import math
from collections.abc import Sequence

from .config import Gate, Layer
from .policies import Case, Choice, Policy


FARTHEST = 3.0  # deviations


class GatePolicy(Policy):
    """The rung that a gate scores highest, of those that may serve."""

    looks = True

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def choose(self, case: Case) -> Choice:
        """The likeliest rung; where none that the gate knows may serve, the one nearest to its first choice."""
        shares = chances(self._gate, case.features)
        possible = [name for name in shares if name in case.rungs]
        first = max(possible or shares, key=lambda name: shares[name])
        return Choice(
            case.nearest(first),
            f"the gate gives {first} {shares[first]:.0%}",
            {"gate": shares, "features": case.features},
        )


def gate_at(gates: Sequence[Gate], price: float) -> Gate:
    """The gate that was fitted at the nearest price."""
    return min(gates, key=lambda gate: abs(gate.price - price))


def chances(gate: Gate, features: dict[str, float]) -> dict[str, float]:
    """Softmax of a gate's scores, by rung."""
    standard = zip(gate.features, gate.mean, gate.scale, strict=True)
    values = [clipped((features[name] - mean) / scale) for name, mean, scale in standard]
    for place, layer in enumerate(gate.layers):
        values = _affine(layer, values if place == 0 else [math.tanh(value) for value in values])
    weights = [math.exp(value - max(values)) for value in values]
    return {name: weight / sum(weights) for name, weight in zip(gate.rungs, weights, strict=True)}


def clipped(value: float) -> float:
    """A standardised feature, held where examples may have been: what lies far out says no more than what lies out."""
    return min(max(value, -FARTHEST), FARTHEST)


def _affine(layer: Layer, values: list[float]) -> list[float]:
    rows = zip(layer.weight, layer.bias, strict=True)
    return [bias + sum(weight * value for weight, value in zip(row, values, strict=True)) for row, bias in rows]
