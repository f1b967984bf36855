"""What the Hub reads of a card: its front matter, with the evaluation results as a model index."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..configuration_anee import AneeConfig
from .card_figures import Evaluated


TAGS = ["anee", "adaptive-computation", "dynamic-depth", "energy-budget"]
TASK = "text-generation"
CURVE, HEATMAP = "budget_curve.png", "heatmap.png"  # names of the pictures beside a card


@dataclass(frozen=True)
class About:
    """What a card says that neither the artifact nor its figures know.

    Args:
        repository: name on the Hub, `USER/REPO`, for the code on the card; None: the folder's name.
        language: of the text that it was fitted on.
        license: of what is in the repository, by its identifier on the Hub.
        base_license: of the base; None: the card sends the reader to the base's own page.
        curve: picture of perplexity against cost, PNG.
        heatmap: picture of a generation, PNG.
    """

    repository: str | None = None
    language: str = "English"
    license: str = "apache-2.0"
    base_license: str | None = None
    curve: Path | None = None
    heatmap: Path | None = None


def base_name(config: AneeConfig) -> tuple[str, bool]:
    """What to call the base, and whether that is its name on the Hub."""
    name = config.base_model_name_or_path
    local = not name or name.startswith(".") or os.path.isabs(name)
    return (os.path.basename(name.rstrip("/\\")) if local else name), not local


def front_matter(config: AneeConfig, title: str, evaluated: Sequence[Evaluated], about: About) -> str:
    """The fields between the two lines of dashes."""
    name, on_hub = base_name(config)
    base: dict[str, Any] = {"base_model": name, "base_model_relation": "adapter"} if on_hub else {}
    found = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASK,
        license=about.license,
        tags=TAGS,
        model_name=title,
        eval_results=evaluation_results(evaluated) or None,
        **base,
    )
    if found.eval_results is None:
        found.model_name = None  # a field that only a model index has
    return f"---\n{found.to_yaml()}\n---"


def evaluation_results(evaluated: Sequence[Evaluated]) -> list[EvalResult]:
    """Two metrics per budget and text: perplexity, and its ratio to the base's."""
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=row.text,
            dataset_name=row.text,
            dataset_config=row.windows,
            metric_type=kind,
            metric_value=round(value, 4),
            metric_name=f"{title} at energy_budget {row.budget:g} (cost {row.cost:.3f})",
            metric_args={"energy_budget": row.budget},
        )
        for row in evaluated
        for kind, title, value in (
            ("perplexity", "perplexity", row.perplexity),
            ("perplexity_ratio", "perplexity / that of the base", row.ratio),
        )
    ]
