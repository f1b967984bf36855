"""What `anee compare` reads from its options; the comparison itself is `evaluation/comparison.py`'s."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..data.windows import Window, digest_of
from ..evaluation import comparison, equal_time
from ..evaluation.decode_time import Timing
from ..fingerprint import same_base
from ..modeling_anee import AneeForCausalLM
from .model import load
from .perplexity import parse_budgets


CONTEXT = 32  # tokens before those that are timed, where a window has so many


def parse_lower_budgets(text: str) -> list[float]:
    """Budgets below 1 of a list like `0.9,0.8`, highest first; at 1 there is the base, and nothing is decided.

    Raises:
        ValueError: something that is not a number between 0 and 1, or no budget below 1.
    """
    budgets = [budget for budget in parse_budgets(text) if budget < 1.0]
    if not budgets:
        raise ValueError(f"--budgets {text}: none is below 1, where the model is its base")
    return budgets


def parse_also(values: Sequence[str]) -> dict[str, str]:
    """Artifacts by name, of values like `NAME=ARTIFACT`.

    Raises:
        ValueError: no `=`, an empty part, or a name that is given twice.
    """
    found: dict[str, str] = {}
    for value in values:
        name, _, artifact = value.partition("=")
        if not name or not artifact:
            raise ValueError(f"--also {value} is not allowed: it must be NAME=ARTIFACT")
        if name in found:
            raise ValueError(f"--also {value} is not allowed: the name {name!r} is given twice")
        found[name] = artifact
    return found


def timing_of(milliseconds: bool, new_tokens: int, repeats: int, length: int) -> Timing | None:
    """How long is timed, if anything is.

    Raises:
        ValueError: more tokens than a window has room for.
    """
    if not milliseconds:
        return None
    context = min(CONTEXT, length // 2)
    if new_tokens > length - context:
        raise ValueError(
            f"--new-tokens {new_tokens} is not allowed: it must be at most {length - context} with --length {length}"
        )
    return Timing(new_tokens, repeats, context)


def load_others(
    loaded: tuple[AneeForCausalLM, Any], others: dict[str, str], dtype: str, device: str, trust_remote_code: bool
) -> tuple[dict[str, AneeForCausalLM], Any]:
    """A model, under the kind of its controller, and others, under their names; and the first one's tokenizer.

    Raises:
        ValueError: a name that is that kind already, or another base.
    """
    first, tokenizer = loaded
    kind = first.config.controller
    models = {kind: first}
    for name, artifact in others.items():
        if name == kind:
            raise ValueError(f"--also {name}={artifact} is not allowed: the rows of --model have the name {kind!r}")
        other, _ = load(artifact, None, dtype, device, trust_remote_code=trust_remote_code)
        if not same_base(other.config.base_fingerprint, first.config.base_fingerprint):
            raise ValueError(f"--also {name}={artifact} is not allowed: it is over another base than --model")
        models[name] = other
    return models, tokenizer


def describe(models: dict[str, AneeForCausalLM], windows: Sequence[Window]) -> dict[str, Any]:
    """What was compared on what, ready for JSON."""
    first = next(iter(models.values()))
    return {
        "controllers": {name: model.config.controller for name, model in models.items()},
        "cost_unit": first.config.cost_unit,
        "dtype": str(first.dtype).removeprefix("torch."),
        "length": len(windows[0].ids),
        "windows": len(windows),
        "windows_sha256": digest_of(windows),
    }


def timed(rows: Sequence[dict[str, Any]], times: dict[Any, float], dials: Iterable[str], timing: Timing) -> dict[str, Any]:
    """The rows with their times, and what they say at equal time, ready for JSON."""
    rows = comparison.with_times(rows, times)
    how = asdict(timing) | {"threads": torch.get_num_threads()}
    return {"rows": rows, "timing": how, "equal_time": equal_time.compare_times(rows, [*dials])}


def as_text(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    rows = comparison.as_text(report["rows"])
    return f"{rows}\n\n{equal_time.as_text(report['equal_time'])}" if "equal_time" in report else rows
