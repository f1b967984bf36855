"""Cost and quality of every policy on samples, beside controls: always one rung, and random choice at equal cost.

Random choice between two rungs has any point on the line between theirs, so the best that chance can do is the lower hull of
all rungs. `gain` is how far below that line a policy's loss is, at its own cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .config import PoolConfig
from .gates import GatePolicy
from .measuring import Sample
from .policies import CascadePolicy, Case, EnergyPolicy, FixedPolicy, Policy


BUDGETS = (1.0, 0.5, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class Row:
    """A policy at one setting.

    Args:
        policy: its name.
        setting: what it was set to.
        megabytes: of weights read per byte of text, everything that was run included.
        loss: bits per byte.
        losses: the same by text.
        gain: loss of random choice at equal cost, less this one.
        error: standard error of the gain, over examples; None for one example.
        rungs: share of the examples that each rung served.
        over: how many of the examples cost more than the budget; None where there is none.
    """

    policy: str
    setting: str
    megabytes: float
    loss: float
    losses: dict[str, float]
    gain: float
    error: float | None
    rungs: dict[str, float]
    over: int | None = None


@dataclass(frozen=True)
class Played:
    """What a policy did with N samples: loss and work of each, float64 [N], bytes per token, and the rungs that served."""

    loss: Tensor
    work: Tensor
    per_token: Tensor
    rungs: list[str]


def play(policy: Policy, samples: Sequence[Sample], config: PoolConfig, names: Sequence[str]) -> Played:
    """Let a policy choose for every sample among rungs, the cheapest first, and count all that it would have run."""
    losses, works, per_token, rungs = [], [], [], []
    for sample in samples:
        looks: list[float] = []

        def look(sample: Sample = sample, looks: list[float] = looks) -> object:
            glance = sample.outcomes[config.glance or names[0]].glance
            looks.append(glance.work)
            return glance

        case = Case(sample.text, names, config.measured, look)  # type: ignore[arg-type]
        choice = policy.choose(case)
        work = sum(looks) + sample.outcomes[choice.rung].work
        if policy.asks_confidence:
            second = policy.reconsider(case, sample.outcomes[choice.rung].confidence)
            if second is not None and second.rung != choice.rung:
                choice, work = second, work + sample.outcomes[second.rung].work
        outcome = sample.outcomes[choice.rung]
        losses.append(outcome.loss)
        works.append(work)
        per_token.append(work / outcome.tokens)
        rungs.append(choice.rung)
    columns = [torch.tensor(values, dtype=torch.float64) for values in (losses, works, per_token)]
    return Played(columns[0], columns[1], columns[2], rungs)


class Table:
    """Rows of policies, over one set of samples."""

    def __init__(self, samples: Sequence[Sample], config: PoolConfig) -> None:
        self._samples, self._config = samples, config
        self._names = sorted(config.measured, key=lambda name: config.measured[name].bytes_per_token)
        self._weight = torch.tensor([sample.weight for sample in samples], dtype=torch.float64)
        self._size = sum(sample.size for sample in samples)
        self._fixed = {name: play(FixedPolicy(name), samples, config, self._names) for name in self._names}
        points = {name: (self._cost(played), self._loss(played)) for name, played in self._fixed.items()}
        self._hull = lower_hull(points)

    def rows(self) -> list[Row]:
        """Controls first, then every policy that the pool has settings for."""
        found = [self.row("always", name, FixedPolicy(name)) for name in self._names]
        dearest = max(measured.most_bytes_per_token for measured in self._config.measured.values())
        for budget in BUDGETS:
            cap = budget * dearest
            names = [name for name in self._names if self._config.measured[name].most_bytes_per_token <= cap * (1 + 1e-9)]
            if names:
                found.append(self.row("energy", f"budget {budget:g}", EnergyPolicy(), names, cap))
        if self._config.fuzzy is not None:
            from .complexity import ComplexityPolicy

            for cuts in dict.fromkeys((self._config.fuzzy.cuts, (0.2, 0.5), (0.5, 0.8))):
                policy = ComplexityPolicy(self._config.fuzzy.model_copy(update={"cuts": cuts}))
                found.append(self.row("complexity", f"cuts {cuts[0]:.2f}, {cuts[1]:.2f}", policy))
        for name, gates in (("learned", self._config.learned), ("mixture", self._config.mixture)):
            found += [self.row(name, f"price {gate.price:g}", GatePolicy(gate)) for gate in gates]
        if (cascade := self._config.cascade) is not None:
            for threshold in sorted({cascade.threshold, *cascade.others}):
                found.append(self.row("cascade", f"threshold {threshold:.3f}", CascadePolicy(cascade, threshold)))
        return found

    def row(self, name: str, setting: str, policy: Policy, names: Sequence[str] | None = None, cap: float | None = None) -> Row:
        """One policy at one setting, among some rungs or all; `cap` is the bytes of a token that it must keep to."""
        played = play(policy, self._samples, self._config, names or self._names)
        cost, loss = self._cost(played), self._loss(played)
        gain, error = self._gain(played, cost)
        sources = dict.fromkeys(sample.source for sample in self._samples)
        return Row(
            policy=name,
            setting=setting,
            megabytes=cost / 1e6,
            loss=loss,
            losses={source: self._loss(played, source) for source in sources},
            gain=gain,
            error=error,
            rungs={name: played.rungs.count(name) / len(played.rungs) for name in self._names if name in played.rungs},
            over=None if cap is None else int((played.per_token > cap * (1 + 1e-9)).sum()),
        )

    def _cost(self, played: Played) -> float:
        return float(played.work.sum()) / self._size

    def _loss(self, played: Played, source: str | None = None) -> float:
        kept = torch.tensor([source in (None, sample.source) for sample in self._samples])
        return float(played.loss[kept].sum() / self._weight[kept].sum())

    def _gain(self, played: Played, cost: float) -> tuple[float, float | None]:
        """What random choice at equal cost would lose more, and the standard error of that (linearised ratio estimator)."""
        expected = sum(share * self._fixed[name].loss for name, share in shares_at(self._hull, cost).items())
        saved = expected - played.loss
        total, count = self._weight.sum(), len(self._samples)
        mean = float(saved.sum() / total)
        if count < 2:
            return mean, None
        off = (saved - mean * self._weight).square().sum() * count / (count - 1)
        return mean, float(off.sqrt() / total)


def lower_hull(points: dict[str, tuple[float, float]]) -> list[tuple[str, float]]:
    """Rungs on the lower left hull of their (cost, loss), with their costs, the cheapest first."""
    hull: list[str] = []
    best = min(points.values(), key=lambda point: (point[1], point[0]))
    for name in sorted(points, key=points.__getitem__):
        if points[name][0] > best[0]:
            break
        while len(hull) > 1 and _above(points[hull[-2]], points[hull[-1]], points[name]):
            hull.pop()
        if hull and points[name][1] >= points[hull[-1]][1]:
            continue
        hull.append(name)
    return [(name, points[name][0]) for name in hull]


def _above(first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]) -> bool:
    """Whether the middle point is on or above the line between the others."""
    run, rise = last[0] - first[0], last[1] - first[1]
    return (middle[1] - first[1]) * run >= rise * (middle[0] - first[0])


def shares_at(hull: Sequence[tuple[str, float]], cost: float) -> dict[str, float]:
    """How often random choice takes which rung to cost so much; outside of the hull the rung at its end."""
    if cost <= hull[0][1]:
        return {hull[0][0]: 1.0}
    for (cheap, low), (dear, high) in pairwise(hull):
        if cost <= high:
            share = (cost - low) / (high - low)
            return {cheap: 1 - share, dear: share}
    return {hull[-1][0]: 1.0}


def as_text(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    sources = list(rows[0].losses)
    head = ["policy", "setting", "MB a byte", *sources, "all", "gain over random", "served by"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        error = "" if row.error is None else f" +- {row.error:.4f}"
        gain = "" if row.policy == "always" else f"{row.gain:+.4f}{error}"
        over = "" if row.over is None else f"; over budget: {row.over}"
        served = ", ".join(f"{name} {share:.0%}" for name, share in row.rungs.items()) + over
        losses = [f"{row.losses[source]:.3f}" for source in sources]
        lines.append([row.policy, row.setting, f"{row.megabytes:.1f}", *losses, f"{row.loss:.4f}", gain, served])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
