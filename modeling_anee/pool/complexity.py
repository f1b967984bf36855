"""The policy `complexity`: fuzzy rules say how complex a request is, LOW, MEDIUM or HIGH, and each level has its rung.

Reasoning is that of simpful (Spolaor et al. 2020, doi 10.2991/ijcis.d.201012.002), Takagi-Sugeno of order zero. A rule reaches
it only after our own grammar has taken it apart (`rules.py`), since the library evaluates what it parses.
"""

import contextlib
import io
from typing import Any

from .config import Fuzzy
from .policies import Case, Choice, Policy
from .rules import CENTRES, LEVELS, OUTPUT, Level, parse_rule


class ComplexityPolicy(Policy):
    """The rung of a request's level of complexity.

    Raises:
        ImportError: simpful is not installed.
    """

    looks = True

    def __init__(self, config: Fuzzy) -> None:
        self._config = config
        self._system = fuzzy_system(config)

    def choose(self, case: Case) -> Choice:
        """Let the rules speak; where none applies, a request is MEDIUM."""
        values = {name: self._clipped(name, case.features[name]) for name in self._config.variables}
        for name, value in values.items():
            self._system.set_variable(name, value)
        strengths = [float(strength) for strength in self._system.get_firing_strengths()]
        complexity = CENTRES["MEDIUM"]
        if any(strengths):
            complexity = float(self._system.inference([OUTPUT], verbose=False)[OUTPUT])
        level = level_of(complexity, self._config.cuts)
        fired = sorted(zip(strengths, self._config.rules, strict=True), key=lambda pair: -pair[0])
        why = f"most of all by: {fired[0][1]} ({fired[0][0]:.2f})" if fired[0][0] else "no rule applies"
        rules = {rule: strength for strength, rule in fired if strength}
        figures = {"complexity": complexity, "level": level, "rules": rules, "features": case.features}
        rung = case.nearest(self._config.rungs[level])
        return Choice(rung, f"complexity {complexity:.2f} is {level}; {why}", figures)

    def _clipped(self, name: str, value: float) -> float:
        low, high = universe(self._config, name)
        return min(max(value, low), high)


def universe(config: Fuzzy, feature: str) -> tuple[float, float]:
    """From where to where the levels of a feature are defined; beyond, they stay as they end."""
    levels = config.variables[feature].values()
    return min(corners[0] for corners in levels), max(corners[3] for corners in levels)


def level_of(complexity: float, cuts: tuple[float, float]) -> Level:
    """The level of a complexity from 0 to 1."""
    return LEVELS[sum(complexity >= cut for cut in cuts)]


def fuzzy_system(config: Fuzzy) -> Any:
    """The rules as a system of simpful's."""
    from simpful import FuzzySystem

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it detects, whatever it is told
        return filled(FuzzySystem(show_banner=False, verbose=False), config)


def filled(system: Any, config: Fuzzy) -> Any:
    """A system with the variables, levels and rules of a configuration."""
    from simpful import LinguisticVariable, TrapezoidFuzzySet

    for feature, levels in config.variables.items():
        sets = [TrapezoidFuzzySet(*corners, term=level) for level, corners in levels.items()]
        system.add_linguistic_variable(feature, LinguisticVariable(sets, universe_of_discourse=list(universe(config, feature))))
    for level, centre in CENTRES.items():
        system.set_crisp_output_value(level, centre)
    system.add_rules([spelled(rule, config) for rule in config.rules])
    return system


def spelled(text: str, config: Fuzzy) -> str:
    """A rule made anew from its parts, with the brackets that the library wants around three clauses and more."""
    rule = parse_rule(text, config.variables)
    joined, *others = [f"({feature} IS {level})" for feature, level in rule.clauses]
    for clause in others:
        joined = f"({joined} {rule.joined_by} {clause})"
    return f"IF {joined} THEN ({OUTPUT} IS {rule.level})"
