"""When a row leaves an early-exit classifier: scores of the newest head, given all heads so far, and what they must reach.

Shapes: B rows, n heads that were asked so far, C classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .budget import Dial, budget_tensor
from .configuration_classifier import check_rule


NEVER = torch.inf  # a setting that no score reaches


def exit_scores(rule: str, probabilities: Tensor) -> Tensor:
    """Score of the newest of n heads, float32 [B], from the probabilities of all so far, [B, n, C].

    - `confidence`: the probability of the most likely class (BranchyNet's and DeeBERT's rule with another measure,
      arXiv:1709.01686, arXiv:2004.12993).
    - `agreement`: the same, times the share of the confidence of all heads so far that is in heads with the same answer.
    - `patience`: number of heads just before with the same answer (PABEE, arXiv:2006.04152).
    """
    confidence, answers = probabilities.max(dim=-1)  # [B, n]
    newest, same = confidence[:, -1], answers == answers[:, -1:]
    if rule == "confidence":
        return newest
    if rule == "agreement":
        return newest * (confidence * same).sum(dim=1) / confidence.sum(dim=1)
    return (same.flip(1).long().cumprod(dim=1).sum(dim=1) - 1).float()


def leaves(rule: str, scores: Tensor, settings: Tensor) -> Tensor:
    """Which rows leave, bool [B]: their score reaches a count, or is above a threshold, so that one of 1 keeps all."""
    return scores >= settings if rule == "patience" else scores > settings


@dataclass(frozen=True)
class Exits:
    """The rule that a forward goes by, with a setting for each row, float64 [B] on the CPU: of a fixed exit its place."""

    rule: str
    settings: Tensor

    @property
    def limited(self) -> Tensor:
        """Which rows may leave before the last head, bool [B]."""
        return self.settings < NEVER

    def may_leave(self, place: int) -> bool:
        """Whether the head at a place has to be asked: a fixed exit needs none before it."""
        return bool((self.settings <= place).any() if self.rule == "fixed" else self.limited.any())

    def leave(self, place: int, probabilities: Tensor) -> Tensor:
        """Which rows leave at the head at a place, bool [B] on the CPU, from the probabilities of all so far, [B, n, C]."""
        if self.rule == "fixed":
            return self.settings <= place
        return leaves(self.rule, exit_scores(self.rule, probabilities).cpu().double(), self.settings)

    def rows(self, index: Tensor) -> "Exits":
        """The rows at `index`."""
        return Exits(self.rule, self.settings[index])


def settings_for(rule: str, budgets: Tensor, dials: dict[str, Any], reached: Tensor) -> Tensor:
    """Settings float64 [B] of a rule for budgets float64 [B]; a budget of 1 keeps a row to the last head.

    Args:
        rule: of `EXIT_RULES`.
        budgets: in [0, 1].
        dials: the calibrated ones, by rule.
        reached: cost of leaving at each head, float64 [E], for fixed exits.

    Raises:
        ValueError: the rule has no dial.
    """
    if rule == "fixed":
        found = ((reached <= budgets.unsqueeze(1) + 1e-9).sum(dim=1) - 1).clamp(min=0).double()
    elif not bool((budgets < 1.0).any()):
        found = torch.zeros_like(budgets)
    elif rule not in dials:
        raise ValueError(
            f"energy_budget below 1 is not possible with exit_rule={rule!r}, for which this classifier was not calibrated (its "
            f"dials: {', '.join(dials) or 'none'}): anee fit-classifier does that; or give confidence_threshold or patience"
        )
    elif rule == "patience":
        found = _largest_afforded(dials[rule], budgets)
    else:
        found = Dial(dials[rule], neutral=0.0).setting(budgets)
        found = torch.where(budgets < dials[rule]["budgets"][0], -1.0, found)
    return torch.where(budgets < 1.0, found, NEVER)


def _largest_afforded(dial: dict[str, list], budgets: Tensor) -> Tensor:
    """The largest of a dial's settings whose cost is at most the budget, float64 [B]: there is nothing between two counts."""
    costs, settings = (torch.tensor(dial[name], dtype=torch.float64, device="cpu") for name in ("budgets", "settings"))
    return settings[(torch.searchsorted(costs, budgets + 1e-9, right=True) - 1).clamp(min=0)]


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
    number = patience if rule == "patience" else threshold
    if number is not None:
        number = NEVER if rule != "patience" and number >= 1 else number
        return Exits(rule, torch.full((rows,), float(number), dtype=torch.float64, device="cpu"))
    budgets = budget_tensor(config.energy_budget if given["energy_budget"] is None else given["energy_budget"], rows)
    if budgets.dim() > 1:
        raise ValueError(f"energy_budget of shape {tuple(budgets.shape)} is not allowed: one number, or one for each row")
    return Exits(rule, settings_for(rule, budgets, config.classifier["dials"], reached))
