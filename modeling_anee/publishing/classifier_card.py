"""The model card of an early-exit classifier, from its configuration and the figures of `anee evaluate-classifier`."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..configuration_anee import AneeConfig
from ..data.files import write_file
from ..evaluation.classification import as_text
from ..version import __version__
from .card_metadata import TAGS, base_name


TASK = "text-classification"


def write_classifier_card(artifact: Path, figures: dict[str, Any], data: str, license: str = "apache-2.0") -> Path:
    """Write the card of a classifier as its `README.md`, whole or not at all.

    Args:
        artifact: its folder.
        figures: what was measured.
        data: name of what they were measured on.
        license: of what is in the artifact.

    Raises:
        OSError: there is no such folder, or the card can't be written.
        ValueError: it is not a classifier.
    """
    config = AneeConfig.from_pretrained(artifact)
    if config.classifier is None:
        raise ValueError(f"{artifact} is an artifact of a language model, not a classifier: anee card writes its card")
    title = artifact.resolve().name
    sections = [
        _front_matter(config, title, figures, data, license),
        f"# {title}",
        f"A text classifier over `{base_name(config)[0]}`, which is frozen: heads after the layers "
        f"{', '.join(map(str, config.classifier['layers']))} of {config.num_layers}. A text leaves at the first head that is "
        "sure enough, and the deeper layers are not run for it; `energy_budget`, between 0 and 1, is the share of the work to "
        f"spend. Labels: {', '.join(figures['labels'])}.",
        "## Use\n\n" + _usage(title),
        f"## Measured\n\nOn `{data}`, which nothing was fitted on.\n\n{as_text(figures)}",
        f"## License\n\n`{license}` is for what is in this repository: heads, configuration and code. The base is not in it; "
        f"it comes under its own license. Made with modeling-anee {__version__}.",
    ]
    card = artifact / "README.md"
    write_file(card, "\n\n".join(sections) + "\n")
    return card


def _usage(name: str) -> str:
    return "\n".join(
        [
            "```python",
            "from transformers import pipeline",
            "",
            f'name = "{name}"  # this folder, or its name on the Hub',
            'budget = {"energy_budget": 0.5}',
            f'classify = pipeline("{TASK}", model=name, trust_remote_code=True, model_kwargs=budget)',
            'print(classify("a text"))',
            "```",
        ]
    )


def _front_matter(config: AneeConfig, title: str, figures: dict[str, Any], data: str, license: str) -> str:
    """The fields between the two lines of dashes."""
    name, on_hub = base_name(config)
    base: dict[str, Any] = {"base_model": name, "base_model_relation": "adapter"} if on_hub else {}
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=os.path.basename(data),
            dataset_name=os.path.basename(data),
            metric_type="accuracy",
            metric_value=round(row["accuracy"], 4),
            metric_name=f"accuracy with {row['rule']} at energy_budget {row['budget']:g} (cost {row['cost']:.3f})",
            metric_args={"energy_budget": row["budget"], "exit_rule": row["rule"]},
        )
        for row in figures["rows"]
    ]
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": TASK,
        "license": license,
        "tags": [*TAGS, "early-exit"],
    }
    found = ModelCardData(**fields, model_name=title, eval_results=results, **base)
    return f"---\n{found.to_yaml()}\n---"
