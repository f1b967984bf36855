"""Fields of an early-exit classifier: its heads, when rows leave, how budgets become thresholds; checked in one place."""

from collections.abc import Sequence
from typing import Any

from .actions import FULL
from .checks import check_budget, is_number, is_whole, one_of, plain, refuse_unknown, whole


EXIT_RULES = ("confidence", "agreement", "patience", "fixed")
COLUMNS = ("budgets", "settings")  # of a dial: costs, and for each of them a setting of every head but the last
POOLINGS = ("mean", "last", "first")
FIELDS = ("layers", "pooling", "hidden_size", "precision", "dials")
DEFAULTS: dict[str, Any] = {"pooling": POOLINGS[0], "hidden_size": 0, "precision": FULL}
HEADS = 15  # of a deep base, by default


def default_layers(layers: int) -> list[int]:
    """Numbers of layers after which a head stands: evenly spread, at most `HEADS`, the last after all layers."""
    heads = min(layers, HEADS)
    return sorted({round(layers * (place + 1) / heads) for place in range(heads)})


def completed(classifier: Any, layers: int, precisions: Sequence[str]) -> dict[str, Any]:
    """The field `classifier` with defaults for what it leaves open.

    Args:
        classifier: what a configuration was given.
        layers: of the base.
        precisions: variants that its layers may run in, beside full.

    Raises:
        ValueError: a bad value; the message names the entry and what is allowed.
    """
    if not isinstance(classifier, dict):
        raise ValueError(f"classifier={classifier!r} is not allowed: it must be a dict of {', '.join(FIELDS)}")
    refuse_unknown([name for name in classifier if name not in FIELDS], FIELDS, "an entry of classifier")
    found = {"layers": default_layers(layers), "pooling": "mean", "hidden_size": 0, "precision": FULL, "dials": {}} | plain(
        classifier
    )
    _check_layers(found["layers"], layers)
    one_of("classifier.pooling", found["pooling"], POOLINGS)
    whole("classifier.hidden_size", found["hidden_size"], 0)
    one_of("classifier.precision", found["precision"], (FULL, *precisions))
    if not isinstance(found["dials"], dict):
        raise ValueError(f"classifier.dials={found['dials']!r} is not allowed: it must be a dict of dials by exit rule")
    for rule, dial in found["dials"].items():
        one_of("a rule in classifier.dials", rule, EXIT_RULES)
        _check_dial(rule, dial, len(found["layers"]) - 1)
    return found


def check_rule(rule: Any, threshold: Any, patience: Any) -> None:
    """Check what a rule needs: a threshold of at least 0 for `confidence` and `agreement`, a whole number for `patience`.

    Raises:
        ValueError: a rule that nobody knows, or a setting that is not for it.
    """
    one_of("exit_rule", rule, EXIT_RULES)
    if threshold is not None:
        number = plain(threshold)
        if not is_number(number) or number < 0:
            raise ValueError(f"confidence_threshold={threshold!r} is not allowed: it must be a number from 0")
        if rule not in ("confidence", "agreement"):
            raise ValueError(f"confidence_threshold={threshold!r} is not allowed with exit_rule={rule!r}")
    if patience is not None:
        whole("patience", patience, 0)
        if rule != "patience":
            raise ValueError(f"patience={patience!r} is not allowed with exit_rule={rule!r}: it is for exit_rule='patience'")


def _check_layers(chosen: Any, layers: int) -> None:
    whole_numbers = isinstance(chosen, list | tuple) and chosen and all(map(is_whole, chosen))
    if not whole_numbers or list(chosen) != sorted(set(chosen)) or chosen[0] < 1 or chosen[-1] != layers:
        raise ValueError(
            f"classifier.layers={chosen!r} is not allowed: it must be an ascending list of numbers of layers after which a "
            f"head stands, from 1 to {layers}, of which the last is {layers}"
        )


def _check_dial(rule: str, dial: Any, settings: int) -> None:
    name = f"classifier.dials.{rule}"
    columns = isinstance(dial, dict) and set(dial) == set(COLUMNS) and all(isinstance(dial[one], list) for one in COLUMNS)
    if not columns or not 0 < len(dial["budgets"]) == len(dial["settings"]):
        raise ValueError(f"{name}={dial!r} is not allowed: it must be a dict of two lists of one length, budgets and settings")
    for budget in dial["budgets"]:
        check_budget(budget, f"{name}.budgets")
    if dial["budgets"] != sorted(set(dial["budgets"])):
        raise ValueError(f"{name}.budgets={dial['budgets']!r} is not allowed: they must be ascending")
    for row in dial["settings"]:
        if not isinstance(row, list) or len(row) != settings or not all(map(is_number, row)):
            raise ValueError(f"{name}.settings has {row!r}, which is not allowed: it must be {settings} numbers, one a head")
