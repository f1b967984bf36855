"""Settings of the policies, from what the rungs cost and lose on examples: `anee pool make`.

What a rung is worth on an example is its loss plus a price times its work, as a share of the dearest rung's work.

Shapes: N examples, R rungs, F features.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .config import Cascade, Fuzzy, Gate, Layer, Measured
from .features import FEATURES, features_of
from .gates import FARTHEST
from .measuring import Sample
from .rules import LEVELS


RULES = [
    "IF (perplexity IS LOW) AND (rarity IS LOW) THEN (complexity IS LOW)",
    "IF (perplexity IS LOW) AND (length IS LOW) THEN (complexity IS LOW)",
    "IF (perplexity IS MEDIUM) OR (rarity IS MEDIUM) THEN (complexity IS MEDIUM)",
    "IF (perplexity IS HIGH) OR (rarity IS HIGH) THEN (complexity IS HIGH)",
    "IF (digits IS HIGH) OR (code IS HIGH) THEN (complexity IS HIGH)",
    "IF (length IS HIGH) AND (perplexity IS MEDIUM) THEN (complexity IS HIGH)",
]
QUANTILES = (0.05, 0.3, 0.5, 0.7, 0.95)  # of the examples, where the corners of the levels lie
TELLING = 0.005  # of the loss
HIDDEN = 16
STEPS = 400
# Prompts of examples are as long as they were cut: their lengths tell nothing but which text they are from. So the levels of
# length are fixed, in words, and gates don't see it.
LENGTHS = {"LOW": (0.0, 0.0, 15.0, 60.0), "MEDIUM": (15.0, 60.0, 60.0, 250.0), "HIGH": (60.0, 250.0, 1000.0, 1000.0)}
SEEN = tuple(name for name in FEATURES if name != "length")


def front(measured: dict[str, Measured]) -> list[str]:
    """Rungs worth having, the cheapest first: each loses less than all cheaper ones, by a share that tells."""
    kept: list[str] = []
    for name in sorted(measured, key=lambda name: (measured[name].bytes_per_text_byte, measured[name].loss)):
        if not kept or measured[name].loss < measured[kept[-1]].loss * (1 - TELLING):
            kept.append(name)
    return kept


def fit_fuzzy(samples: Sequence[Sample], glance: str, measured: dict[str, Measured]) -> Fuzzy:
    """The default rules, with levels by quantiles of the examples; rungs from the two ends and the middle of the front."""
    columns = np.array([list(features_of(sample.text, sample.outcomes[glance].glance).values()) for sample in samples])
    variables = {name: levels_of(columns[:, place]) for place, name in enumerate(FEATURES)} | {"length": LENGTHS}
    rungs = front(measured)
    ends = rungs[0], rungs[len(rungs) // 2], rungs[-1]
    return Fuzzy(variables=variables, rules=RULES, rungs=dict(zip(LEVELS, ends, strict=True)))


def levels_of(values: np.ndarray) -> dict:
    """Corners of LOW, MEDIUM and HIGH for a feature, from its values [N]: each pair of neighbours adds up to 1 between them."""
    marks = np.quantile(values, QUANTILES)
    least = max(float(marks[-1] - marks[0]), 1e-2) / 20  # a feature that is mostly 0 has equal quantiles
    for place in range(1, len(marks)):
        marks[place] = max(marks[place], marks[place - 1] + least)
    first, low, middle, high, last = (round(float(mark), 4) for mark in marks)
    return {"LOW": (first, first, low, middle), "MEDIUM": (low, middle, middle, high), "HIGH": (middle, high, last, last)}


def fit_cascade(samples: Sequence[Sample], measured: dict[str, Measured]) -> Cascade:
    """From the middle of the front to its end, at the median confidence; other quantiles beside it."""
    rungs = front(measured)
    cheap, dear = rungs[(len(rungs) - 1) // 2], rungs[-1]
    sure = [sample.outcomes[cheap].confidence for sample in samples]
    others = [round(float(mark), 4) for mark in np.quantile(sure, (0.2, 0.4, 0.6, 0.8))]
    return Cascade(cheap=cheap, dear=dear, threshold=round(float(np.median(sure)), 4), others=others)


def objective(samples: Sequence[Sample], names: Sequence[str], price: float) -> np.ndarray:
    """Loss plus price times work of each rung on each example, float64 [N, R]."""
    losses = np.array([[sample.outcomes[name].loss / sample.weight for name in names] for sample in samples])
    works = np.array([[sample.outcomes[name].work / sample.size for name in names] for sample in samples])
    return losses + price * works / works.mean(axis=0).max()


def fit_learned(samples: Sequence[Sample], glance: str, names: Sequence[str], price: float) -> Gate:
    """A logistic regression of which rung is best, each example weighted by what a wrong choice would lose."""
    from sklearn.linear_model import LogisticRegression

    inputs, mean, scale = standardised(samples, glance)
    values = objective(samples, names, price)
    best = values.argmin(axis=1)
    seen = sorted(set(best.tolist()))
    if len(seen) == 1:  # one rung for all
        layer = Layer(weight=[[0.0] * len(SEEN)], bias=[0.0])
    else:
        stakes = values.mean(axis=1) - values.min(axis=1)
        fitted = LogisticRegression(max_iter=2000).fit(inputs, best, sample_weight=stakes / stakes.mean())
        weight, bias = fitted.coef_, fitted.intercept_
        if len(seen) == 2:  # one row for the second class; the first one's score is 0
            weight, bias = np.vstack([np.zeros_like(weight), weight]), np.concatenate([[0.0], bias])
        layer = Layer(weight=rounded(weight), bias=rounded(bias))
    return gate_of(price, [names[place] for place in seen], mean, scale, [layer])


def fit_mixture(samples: Sequence[Sample], glance: str, names: Sequence[str], price: float, seed: int = 0) -> Gate:
    """A gating network that is trained on the expected objective under its shares; at use the largest share serves."""
    inputs, mean, scale = standardised(samples, glance)
    features = torch.tensor(inputs, dtype=torch.float32)
    targets = torch.tensor(objective(samples, names, price), dtype=torch.float32)
    targets = targets - targets.min(dim=1, keepdim=True).values
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(HIDDEN, len(SEEN), generator=generator) / len(SEEN) ** 0.5
    weights = [first, torch.zeros(HIDDEN), torch.zeros(len(names), HIDDEN), torch.zeros(len(names))]
    parameters = [nn.Parameter(weight) for weight in weights]
    optimiser = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.02)
    for _ in range(STEPS):
        optimiser.zero_grad()
        (scores(parameters, features).softmax(dim=1) * targets).sum(dim=1).mean().backward()
        optimiser.step()
    inner, inner_bias, outer, outer_bias = (parameter.detach().numpy() for parameter in parameters)
    layers = [Layer(weight=rounded(inner), bias=rounded(inner_bias)), Layer(weight=rounded(outer), bias=rounded(outer_bias))]
    return gate_of(price, list(names), mean, scale, layers)


def scores(parameters: Sequence[Tensor], features: Tensor) -> Tensor:
    """Of every rung, float32 [N, R], from features [N, F]."""
    inner, inner_bias, outer, outer_bias = parameters
    return nn.functional.linear((features @ inner.T + inner_bias).tanh(), outer, outer_bias)


def standardised(samples: Sequence[Sample], glance: str) -> tuple[np.ndarray, list[float], list[float]]:
    """Features [N, F] with mean 0 and deviation 1, none far out, and what was taken off and divided by."""
    rows = [features_of(sample.text, sample.outcomes[glance].glance) for sample in samples]
    values = np.array([[row[name] for name in SEEN] for row in rows])
    mean, deviation = values.mean(axis=0), values.std(axis=0)
    scale = np.where(deviation > 1e-9, deviation, 1.0)
    return np.clip((values - mean) / scale, -FARTHEST, FARTHEST), mean.tolist(), scale.tolist()


def gate_of(price: float, names: list[str], mean: list[float], scale: list[float], layers: list[Layer]) -> Gate:
    """A gate over the features that gates see."""
    return Gate(price=price, rungs=names, features=list(SEEN), mean=mean, scale=scale, layers=layers)


def rounded(values: np.ndarray) -> list:
    """As plain numbers with few digits."""
    return np.round(values.astype(float), 5).tolist()
