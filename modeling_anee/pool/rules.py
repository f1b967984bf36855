"""Fuzzy rules as text: what a rule may say. The grammar is closed, so that a file from elsewhere can hold nothing else."""

import re
from collections.abc import Collection
from typing import Literal, NamedTuple


Level = Literal["LOW", "MEDIUM", "HIGH"]
LEVELS: tuple[Level, ...] = ("LOW", "MEDIUM", "HIGH")
OUTPUT = "complexity"
CENTRES = {"LOW": 0.0, "MEDIUM": 0.5, "HIGH": 1.0}  # complexity of a request that is wholly so
RULE = re.compile(r"IF (?P<clauses>.+) THEN \(complexity IS (?P<level>[A-Z]+)\)")
CLAUSE = re.compile(r"\((?P<feature>[a-z]+) IS (?P<level>[A-Z]+)\)")


class Rule(NamedTuple):
    """A rule taken apart: (feature, level) of each clause, what joins them (AND or OR), and the level that follows."""

    clauses: list[tuple[str, str]]
    joined_by: str
    level: str


def parse_rule(text: str, features: Collection[str]) -> Rule:
    """Take a rule apart: `IF (a IS LOW) AND (b IS HIGH) THEN (complexity IS LOW)`, with AND or OR throughout.

    Raises:
        ValueError: it says something else, or of a feature or level that is not there.
    """
    whole = RULE.fullmatch(text)
    if whole is None:
        raise ValueError(
            f"rule {text!r} is not allowed: it must be like 'IF (a IS LOW) AND (b IS HIGH) THEN (complexity IS LOW)'"
        )
    parts = re.split(r" (AND|OR) ", whole["clauses"])
    clauses = [CLAUSE.fullmatch(part) for part in parts[::2]]
    joins = set(parts[1::2])
    if len(joins) > 1 or any(clause is None for clause in clauses):
        raise ValueError(f"rule {text!r} is not allowed: its clauses must be like '(a IS LOW)', joined by AND or by OR alone")
    found = [(clause["feature"], clause["level"]) for clause in clauses if clause is not None]
    for feature, level in found:
        if feature not in features:
            raise ValueError(f"rule {text!r} speaks of {feature!r}: the variables are {', '.join(features)}")
        _check_level(text, level)
    _check_level(text, whole["level"])
    return Rule(found, joins.pop() if joins else "AND", whole["level"])


def _check_level(text: str, level: str) -> None:
    if level not in LEVELS:
        raise ValueError(f"rule {text!r} has the level {level!r}: it must be one of {', '.join(LEVELS)}")
