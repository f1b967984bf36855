"""When a row leaves an early-exit classifier: scores of the newest head, given all heads so far, and what they must reach.

Shapes: B rows, E heads, n heads that were asked so far, C classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .budget import TOLERANCE, budget_tensor
from .configuration_classifier import COLUMNS, check_rule


NEVER = torch.inf  # a setting that no score reaches


def exit_scores(rule: str, probabilities: Tensor) -> Tensor:
    """Score of the newest of n heads, float32 [B], from the probabilities of all so far, [B, n, C].

    - `confidence`: the probability of the most likely class (BranchyNet's and DeeBERT's rule with another measure,
      arXiv:1709.01686, arXiv:2004.12993).
    - `agreement`: the same, times the share of the confidence of all heads so far that is in heads with the same answer.
    - `patience`: number of heads just before with the same answer (PABEE, arXiv:2006.04152).
    - `fixed`: 0.
    """
    confidence, answers = probabilities.max(dim=-1)  # [B, n]
    newest, same = confidence[:, -1], answers == answers[:, -1:]
    if rule == "confidence":
        return newest
    if rule == "agreement":
        return newest * (confidence * same).sum(dim=1) / confidence.sum(dim=1)
    if rule == "patience":
        return (same.flip(1).long().cumprod(dim=1).sum(dim=1) - 1).float()
    return torch.zeros_like(newest)


def leaves(rule: str, scores: Tensor, settings: Tensor) -> Tensor:
    """Which scores let a row leave, bool, of the shape of both: those that reach a count, or are above a threshold."""
    return scores >= settings if rule == "patience" else scores > settings


@dataclass(frozen=True)
class Exits:
    """The rule that a forward goes by, with a setting for each row and head but the last, float64 [B, E - 1] on the CPU."""

    rule: str
    settings: Tensor

    def leave(self, place: int, probabilities: Tensor) -> Tensor:
        """Which rows leave at the head at a place, bool [B] on the CPU, from the probabilities of all so far, [B, n, C]."""
        return leaves(self.rule, exit_scores(self.rule, probabilities).cpu().double(), self.settings[:, place])

    def rows(self, index: Tensor) -> "Exits":
        """The rows at `index`."""
        return Exits(self.rule, self.settings[index])


def settings_for(rule: str, budgets: Tensor, dials: dict[str, Any], reached: Tensor) -> Tensor:
    """Settings float64 [B, E - 1] of a rule for budgets float64 [B]; a budget of 1 keeps a row to the last head.

    They are the calibrated ones whose cost is the largest that is at most the budget; below the lowest, rows leave at once.

    Args:
        rule: of `EXIT_RULES`.
        budgets: in [0, 1].
        dials: the calibrated ones, by rule.
        reached: cost of leaving at each head, float64 [E], for fixed exits without a dial: the deepest that is affordable.

    Raises:
        ValueError: the rule has no dial.
    """
    if rule not in dials and rule != "fixed" and bool((budgets < 1.0).any()):
        raise ValueError(
            f"energy_budget below 1 is not possible with exit_rule={rule!r}, for which this classifier was not calibrated (its "
            f"dials: {', '.join(dials) or 'none'}): anee fit-classifier does that; or give confidence_threshold or patience"
        )
    if rule in dials:
        costs, settings = (torch.tensor(dials[rule][name], dtype=torch.float64, device="cpu") for name in COLUMNS)
    else:
        costs, settings = reached, fixed_settings(len(reached))
    place = torch.searchsorted(costs, budgets + TOLERANCE, right=True) - 1
    found = torch.where((place < 0).unsqueeze(1), -1.0, settings[place.clamp(min=0)])
    return without_end(rule, torch.where((budgets < 1.0).unsqueeze(1), found, NEVER))


def fixed_settings(heads: int) -> Tensor:
    """Settings of exits at each of the heads, float64 [E, E - 1]: 1 at the heads before, which keeps rows, then -1."""
    place = torch.arange(heads, device="cpu")
    return torch.where(place[:-1] < place.unsqueeze(1), 1.0, -1.0).double()


def without_end(rule: str, settings: Tensor) -> Tensor:
    """Settings with thresholds of 1 and more as `NEVER`: no probability is above them."""
    return settings if rule == "patience" else torch.where(settings >= 1.0, NEVER, settings)


def exits_of(config: Any, reached: Tensor, rows: int, given: dict[str, Any]) -> Exits:
    """The rule and its settings, of the arguments of a forward where they are given, else of the configuration.

    Args:
        config: an `AneeConfig` of a classifier.
        reached: cost of leaving at each head, float64 [E].
        rows: B.
        given: `energy_budget` (a number or one per row), `exit_rule`, `confidence_threshold`, `patience`; None where not given.

    Raises:
        ValueError: a bad value, or two that exclude each other.
    """
    names = ("confidence_threshold", "patience")
    asked = [name for name in (*names, "energy_budget") if given[name] is not None]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} exclude each other: each says when rows leave; give one of them")
    rule, threshold, patience = given["exit_rule"], given["confidence_threshold"], given["patience"]
    if rule is None:  # a count of heads is for one rule only, a threshold not for that
        rule = "patience" if patience is not None else config.exit_rule
        rule = "confidence" if threshold is not None and rule in ("patience", "fixed") else rule
    if not asked and rule == config.exit_rule:
        threshold, patience = config.confidence_threshold, config.patience
    check_rule(rule, threshold, patience)
    number, shape = (patience if rule == "patience" else threshold), (rows, len(reached) - 1)
    if number is not None:
        return Exits(rule, without_end(rule, torch.full(shape, float(number), dtype=torch.float64, device="cpu")))
    budgets = budget_tensor(config.energy_budget if given["energy_budget"] is None else given["energy_budget"], rows)
    if budgets.dim() > 1:
        raise ValueError(f"energy_budget of shape {tuple(budgets.shape)} is not allowed: one number, or one for each row")
    return Exits(rule, settings_for(rule, budgets, config.classifier["dials"], reached))
