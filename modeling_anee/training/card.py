"""The model card of an artifact: what it is, how to use it, what it was made of and what was measured.

Every number comes from the artifact, its recipe or the figures that are given; nothing is measured here.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from ..configuration_anee import AneeConfig
from ..evaluation import comparison, samples
from ..evaluation.report import read_report
from ..version import __version__
from .checkpoint import write_atomically
from .recipe import Recipe, read_recipe
from .text import name_of


TAGS = ["anee", "adaptive-computation", "dynamic-depth", "energy-budget"]
NOTABLE = 1.5  # perplexity ratio from which the limits speak of lower budgets
KINDS = {"skip": "skipped layers", "skip_ffn": "skipped feed-forwards", "exit": "exits"}
LICENSE = (
    "Apache-2.0 is for what is in this repository: our modules, configuration and code. The base model is not in it and has "
    f"its own license. Made with modeling-anee {__version__}."
)
SAME_IN_RECIPE = ("controller", "bridge_rank", "ffn_bridge_rank", "exit_translator_rank")

Table = list[list[str]]


@dataclass(frozen=True)
class Measured:
    """Reports of other verbs; what is not given is not on the card.

    Args:
        comparison: of `anee compare`.
        budgets: of `anee perplexity`, on texts that were not used for the fit.
        samples: of `anee samples`.
    """

    comparison: dict[str, Any] | None = None
    budgets: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, Any] | None = None

    @classmethod
    def read(cls, comparison: Path | None, budgets: Iterable[Path], samples: Path | None) -> "Measured":
        """Read the files that those verbs wrote.

        Raises:
            OSError: a file can't be read.
            ValueError: it is not such a report.
        """
        where = ("text", "windows", "length")
        row = ("name", "budget", "cost", "perplexity", "ratio", "standard_error")
        scored = ("budget", "mean_cost", "ratio", "ratio_standard_error")
        answers = ("prompt", "budget", "cost", "text")
        return cls(
            None if comparison is None else read_report(comparison, "compare", where, row),
            [read_report(file, "perplexity", where, scored) for file in budgets],
            None if samples is None else read_report(samples, "samples", ("max_new_tokens",), answers),
        )


def write_card(artifact: Path, recipe: Path, measured: Measured, language: str = "English") -> Path:
    """Write the card of an artifact as its `README.md`, whole or not at all.

    Args:
        artifact: folder of the artifact.
        recipe: what it was fitted by.
        measured: what is known of it.
        language: of the text that it was fitted on.

    Raises:
        OSError: there is no such artifact or recipe.
        ValueError: the recipe is not the artifact's.
    """
    if not (artifact / "config.json").is_file():
        raise OSError(f"{artifact} is not an artifact: it has no config.json")
    config, read = AneeConfig.from_pretrained(artifact), read_recipe(recipe)
    check_recipe(read, config)
    name = artifact.resolve().name
    sections = [
        front_matter(config),
        f"# {name}",
        summary(config),
        "## Use\n\n" + usage(name, config, chat=(artifact / "chat_template.jinja").is_file()),
        "## What is in it\n\n" + contents(artifact, config),
        "## Data\n\n" + data(read),
        "## Measured\n\n" + "\n\n".join(results(config, measured)),
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits(config, measured, language)),
        "## Recipe\n\n" + details("The recipe", f"```yaml\n{recipe.read_text(encoding='utf-8').strip()}\n```"),
        f"## License\n\n{LICENSE}",
    ]
    file = artifact / "README.md"
    write_atomically(file, ("\n\n".join(sections) + "\n").encode())
    return file


def check_recipe(recipe: Recipe, config: AneeConfig) -> None:
    """Notice a recipe that is not the artifact's.

    Raises:
        ValueError: it asks for another controller or other bridges.
    """
    for name in SAME_IN_RECIPE:
        if recipe.anee.get(name, getattr(config, name)) != getattr(config, name):
            raise ValueError(
                f"the recipe has {name}={recipe.anee[name]!r}, but the artifact {getattr(config, name)!r}: it is another's"
            )


def base_name(config: AneeConfig) -> tuple[str, bool]:
    """What to call the base, and whether that is its name on the Hub."""
    name = config.base_model_name_or_path
    local = not name or name.startswith(".") or os.path.isabs(name)
    return (os.path.basename(name.rstrip("/\\")) if local else name), not local


def front_matter(config: AneeConfig) -> str:
    """What the Hub reads."""
    name, on_hub = base_name(config)
    fields = {"base_model": name} if on_hub else {}
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation", "license": "apache-2.0"}
    return "---\n" + yaml.safe_dump(fields | {"tags": TAGS}, sort_keys=False) + "---"


def summary(config: AneeConfig) -> str:
    """One sentence."""
    return (
        f"A compute dial for `{base_name(config)[0]}`: `energy_budget`, between 0 and 1, is the share of the decoder stack's "
        "work that a token may cost, and at 1.0 the tokens are the base's own."
    )


def usage(name: str, config: AneeConfig, chat: bool) -> str:
    """Code that runs where the artifact and its base can be found."""
    ask = ['inputs = tokenizer("The lighthouse keeper", return_tensors="pt")']
    if chat:
        ask = [
            'chat = [{"role": "user", "content": "Why is the sky blue?"}]',
            'inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
        ]
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'name = "{name}"  # this folder, or its name on the Hub',
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        'model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype="float32")',
        *ask,
        "output = model.generate(**inputs, energy_budget=0.8, max_new_tokens=80, return_dict_in_generate=True)",
        "print(tokenizer.decode(output.sequences[0], skip_special_tokens=True))",
        "print(output.execution.summary())",
        "```",
    ]
    note = "The code comes with the artifact; the base is loaded by its name."
    if config.base_gguf_file:
        note += f" It is a GGUF file (`{config.base_gguf_file}`), which transformers reads with `gguf` and `accelerate`."
    return "\n".join(lines) + f"\n\n{note}"


def contents(artifact: Path, config: AneeConfig) -> str:
    """Bridges, controller and plans, with their sizes; no base weight is among them."""
    shapes = weight_shapes(artifact)
    rows = [["part", "how many", "parameters"]]
    for kind, stand_in in KINDS.items():
        downs = [
            shape for name, shape in shapes.items() if name.startswith(f"bridges.{kind}.") and name.endswith("down.weight")
        ]
        if downs:
            own = parameters(shapes, f"bridges.{kind}.")
            what = "exit translators" if kind == "exit" else f"bridges for {stand_in}"
            rows.append([f"{what}, rank {downs[0][0]}", str(len(downs)), f"{own:,}"])
    rows.append([f"`{config.controller}` controller", "1", f"{parameters(shapes, 'controller.'):,}"])
    if config.plans:
        rows.append(["plans", str(len(config.plans)), "-"])
    size = sum(file.stat().st_size for file in artifact.glob("*.safetensors")) / 1e6
    return f"{markdown(rows)}\n\nThe weights take {size:.2f} MB; no weight of the base is among them."


def weight_shapes(artifact: Path) -> dict[str, list[int]]:
    """Shape of every tensor in an artifact, by name."""
    shapes: dict[str, list[int]] = {}
    for path in artifact.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}
    return shapes


def parameters(shapes: dict[str, list[int]], prefix: str) -> int:
    """Number of values in tensors whose name begins so; versions, without a dimension, are none."""
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix) and shape)


def data(recipe: Recipe) -> str:
    """Where text came from; a source gives at most so many tokens."""
    rows = [["used to", "source", "tokens, at most"]]
    for part, use in {"train": "train", "choose": "choose plans", "calibrate": "calibrate"}.items():
        rows += [[use, f"`{name_of(source)}`", f"{source.tokens:,}"] for source in getattr(recipe.text, part)]
    return markdown(rows)


def results(config: AneeConfig, measured: Measured) -> list[str]:
    """Every table of figures, with what it is of."""
    parts = [
        "A cost is a share of the decoder stack's work "
        f"({'bytes of weights read' if config.cost_unit == 'bytes' else 'FLOPs'}), a ratio one of perplexities: ours over the "
        "base's, with its standard error."
    ]
    if config.calibration is not None:
        parts.append(f"On the held-out text that it was calibrated on:\n\n{markdown(curve(config.calibration))}")
    if measured.comparison is not None:
        parts.append(f"Beside controls, on {place(measured.comparison)}:\n\n{comparison.as_text(measured.comparison['rows'])}")
    if measured.budgets:
        parts.append(f"Budgets on texts that were not used for the fit:\n\n{markdown(kept(measured.budgets))}")
    if measured.samples is not None:
        shown = samples.as_text(measured.samples["rows"])
        title = f"Greedy answers of at most {measured.samples['max_new_tokens']} tokens, unedited"
        parts.append(details(title, shown))
    return parts if len(parts) > 1 else ["Nothing yet."]


def curve(calibration: dict[str, list[float]]) -> Table:
    """The calibrated curve, as far as it was measured."""
    columns = {"budgets": "budget", "cost": "cost", "perplexity_ratio": "ratio", "standard_error": "standard error"}
    given = [name for name in columns if name in calibration]
    digits = {"budgets": "g", "standard_error": ".4f"}
    body = zip(*([format(value, digits.get(name, ".3f")) for value in calibration[name]] for name in given), strict=True)
    return [[columns[name] for name in given], *map(list, body)]


def kept(reports: list[dict[str, Any]]) -> Table:
    """What every budget below 1 cost on other texts."""
    rows = [["text", "budget", "cost", "ratio"]]
    for report in reports:
        for row in below_1(report):
            ratio = f"{row['ratio']:.3f} +- {row['ratio_standard_error']:.3f}"
            rows.append([place(report), f"{row['budget']:g}", f"{row['mean_cost']:.3f}", ratio])
    return rows


def limits(config: AneeConfig, measured: Measured, language: str) -> list[str]:
    """What follows from the configuration and the figures, and nothing else."""
    found = [f"Fitted on {language} text, listed above; on other text both quality and cost can differ from these figures."]
    if config.budget_mode == "strict":
        found.append("`budget_mode` is `strict`: every single token is kept at or under its budget, or at the floor.")
    else:
        first = "token is" if config.keep_first_tokens == 1 else f"{config.keep_first_tokens} tokens are"
        if config.keep_first_tokens:
            found.append(f"The first {first} always processed in full, so a very short text costs more than its budget.")
        found.append(
            'A budget is the mean over a text, not the limit of a token. Load with `budget_mode="strict"` to keep every single '
            "token at or under it, or at the floor, the first ones too; these figures are not of that mode."
        )
    table = config.calibration or {}
    if "settings" in table:
        low, high = table["budgets"][0], table["budgets"][-1]
        found.append(f"Calibrated at budgets from {low:g} to {high:g}; beyond them the dial stays as at the nearest.")
    if "perplexity_ratio" in table:
        found += quality(table["budgets"], table["perplexity_ratio"])
    if measured.budgets:
        off = max((abs(row["mean_cost"] - row["budget"]) for report in measured.budgets for row in below_1(report)), default=0)
        found.append(f"On the texts that were not used for the fit, the mean cost is at most {off:.3f} off its budget.")
    return found


def quality(budgets: list[float], ratios: list[float]) -> list[str]:
    """What the curve says of quality."""
    lowest = f"At budget {budgets[0]:g}, the lowest that was measured, perplexity is {ratios[0]:.2f} times the base's"
    notable = [budget for budget, ratio in zip(budgets, ratios, strict=True) if ratio > NOTABLE]
    if not notable:
        return [f"{lowest}."]
    return [f"{lowest}; it is more than {NOTABLE:g} times the base's at a budget of {max(notable):g}."]


def below_1(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a report that are not the base's."""
    return [row for row in report["rows"] if row["budget"] < 1.0]


def place(report: dict[str, Any]) -> str:
    """What a report was measured on."""
    return f"`{report['text']}` ({report['windows']} windows of {report['length']} tokens)"


def details(title: str, content: str) -> str:
    """Something long that a reader opens."""
    return f"<details>\n<summary>{title}</summary>\n\n{content}\n\n</details>"


def markdown(rows: Table) -> str:
    """A table whose first row is the head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))
