"""The model card of an artifact: what it is, how to use it, what it was made of and what was measured.

Every number comes from the artifact, its recipe or the figures that are given; nothing is measured here.
"""

import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..configuration_anee import AneeConfig
from ..configuration_prices import PRICED
from ..data.files import write_file
from ..data.sources import name_of
from ..evaluation import comparison, samples
from ..evaluation.report import plus_minus
from ..evaluation.shown import budgets_to_show
from ..training.recipe import Recipe, read_recipe
from ..version import __version__
from ..weight_files import readable_weights
from .card_figures import Measured, window_count
from .card_metadata import CURVE, HEATMAP, About, base_name, front_matter


NOTABLE = 1.5  # perplexity ratio from which the limits speak of lower budgets
KINDS = {"skip": "skipped layers", "skip_ffn": "skipped feed-forwards", "exit": "exits"}
PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins
SAME_IN_RECIPE = ("controller", "bridge_rank", "ffn_bridge_rank", "exit_translator_rank")

Table = list[list[str]]


def write_card(artifact: Path, recipes: list[Path], measured: Measured, about: About | None = None) -> Path:
    """Write the card of an artifact as its `README.md`, whole or not at all, and its pictures beside it.

    Args:
        artifact: folder of the artifact.
        recipes: what it was fitted by, one after the other.
        measured: what is known of it.
        about: what only its maker knows.

    Raises:
        OSError: there is no such artifact, recipe or picture.
        ValueError: a recipe is not the artifact's, or a picture is not a PNG file.
    """
    if not (artifact / "config.json").is_file():
        raise OSError(f"{artifact} is not an artifact: it has no config.json")
    about = about or About()
    config, read = AneeConfig.from_pretrained(artifact), [read_recipe(recipe) for recipe in recipes]
    for recipe in read:
        check_recipe(recipe, config)
    pictures = {CURVE: read_picture(about.curve), HEATMAP: read_picture(about.heatmap)}
    name = about.repository or artifact.resolve().name
    title = name.rsplit("/", 1)[-1]
    chat = (artifact / "chat_template.jinja").is_file()
    sections = [
        front_matter(config, title, measured.evaluated(config.controller), about),
        f"# {title}",
        summary(config),
        "## Use\n\n" + usage(name, config, chat, on_hub=about.repository is not None),
        "## What is in it\n\n" + contents(artifact, config),
        "## Data\n\n" + data(read),
        "## Measured\n\n" + "\n\n".join(results(config, measured, about)),
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits(config, measured, about.language)),
        "## Recipe\n\n" + "\n\n".join(map(as_written, recipes)),
        f"## License\n\n{license_text(about)}",
    ]
    for file, content in pictures.items():
        if content is not None:
            write_file(artifact / file, content)
    card = artifact / "README.md"
    write_file(card, "\n\n".join(sections) + "\n")
    return card


def read_picture(file: Path | None) -> bytes | None:
    """Content of a picture.

    Raises:
        OSError: it can't be read.
        ValueError: it is not a PNG file.
    """
    if file is None:
        return None
    content = file.read_bytes()
    if not content.startswith(PNG):
        raise ValueError(f"{file} is not a PNG file")
    return content


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


def summary(config: AneeConfig) -> str:
    """One sentence."""
    return (
        f"A compute dial for `{base_name(config)[0]}`: `energy_budget`, between 0 and 1, is the share of the whole model's "
        "work that a token may cost, and at 1.0 the tokens are the base's own."
    )


def usage(name: str, config: AneeConfig, chat: bool, on_hub: bool) -> str:
    """Code that runs where the artifact and its base can be found."""
    ask = ['inputs = tokenizer("The lighthouse keeper", return_tensors="pt")']
    if chat:
        ask = [
            'chat = [{"role": "user", "content": "Why is the sky blue?"}]',
            'inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
        ]
    budget = budgets_to_show(config)[1]
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'name = "{name}"' + ("" if on_hub else "  # this folder, or its name on the Hub"),
        "tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)",  # without the flag it asks and waits
        'model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype="float32")',
        *ask,
        f"output = model.generate(**inputs, energy_budget={budget}, max_new_tokens=80, return_dict_in_generate=True)",
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
    if config.corrections:
        numbers = parameters(shapes, "corrections.")
        rows.append([f"corrections of {', '.join(config.corrections)}", str(len(config.corrections)), f"{numbers:,}"])
    if config.orders:
        names = ", ".join(f"`{name}`" for name in config.narrow or ())
        what = f"orders of {' and '.join(config.orders)}, of which {names} keep the first"
        rows.append([what, str(len(config.orders)), f"{parameters(shapes, 'orders.'):,}"])
    rows.append([f"`{config.controller}` controller", "1", f"{parameters(shapes, 'controller.'):,}"])
    if config.plans:
        rows.append(["plans", str(len(config.plans)), "-"])
    size = sum(file.stat().st_size for file in artifact.glob("*.safetensors")) / 1e6
    return f"{markdown(rows)}\n\nThe weights take {size:.2f} MB; no weight of the base is among them."


def weight_shapes(artifact: Path) -> dict[str, list[int]]:
    """Shape of every tensor in an artifact, by name."""
    shapes: dict[str, list[int]] = {}
    for path in artifact.glob("*.safetensors"):
        with readable_weights(path), safe_open(path, framework="pt") as weights:
            shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}
    return shapes


def parameters(shapes: dict[str, list[int]], prefix: str) -> int:
    """Number of values in tensors whose name begins so; versions, without a dimension, are none."""
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix) and shape)


def data(recipes: list[Recipe]) -> str:
    """Where text came from; a source gives at most so many tokens."""
    rows = [["used to", "source", "tokens, at most"]]
    for part, use in {"train": "train", "choose": "choose plans", "calibrate": "calibrate"}.items():
        sources = [source for recipe in recipes for source in getattr(recipe.text, part)]
        rows += [[use, f"`{name_of(source)}`", f"{source.tokens:,}"] for source in without_repeats(sources)]
    return markdown(rows)


def without_repeats(items: list[Any]) -> list[Any]:
    """Items that are equal once only."""
    return [item for number, item in enumerate(items) if item not in items[:number]]


def as_written(recipe: Path) -> str:
    """A recipe as its file has it."""
    return details(recipe.name, f"```yaml\n{recipe.read_text(encoding='utf-8').strip()}\n```")


def unit_of(config: AneeConfig) -> str:
    """What costs count, in words."""
    if config.prices is None or config.cost_unit not in PRICED:
        return "FLOPs" if config.cost_unit == "flops" else "bytes of weights read"
    return f"{config.cost_unit}, as priced for {config.prices['machine']}"


def results(config: AneeConfig, measured: Measured, about: About) -> list[str]:
    """Every table of figures and every picture, with what it is of."""
    parts = [
        f"A cost is a share of the whole model's work ({unit_of(config)}), a ratio one of perplexities: ours over the base's, "
        "with its standard error."
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
    if about.curve is not None:
        parts.insert(1, f"![Perplexity against cost]({CURVE})")
    if about.heatmap is not None:
        parts.append(f"What was done in one generation:\n\n![Tokens across, layers upwards, coloured by action]({HEATMAP})")
    return parts if len(parts) > 1 else ["Nothing yet."]


def license_text(about: About) -> str:
    """What the license in the front matter is for, and what is known of the base's."""
    base = f"under {about.base_license}" if about.base_license else "under its own license: see its page"
    return (
        f"`{about.license}` is for what is in this repository: our modules, configuration and code. The base model is not in "
        f"it; it comes {base}. Made with modeling-anee {__version__}."
    )


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
            ratio = plus_minus(row["ratio"], row["ratio_standard_error"], 3)
            rows.append([place(report), f"{row['budget']:g}", f"{row['mean_cost']:.3f}", ratio])
    return rows


def limits(config: AneeConfig, measured: Measured, language: str) -> list[str]:
    """What follows from the configuration and the figures, and nothing else."""
    found = [f"Fitted on {language} text, listed above; on other text both quality and cost can differ from these figures."]
    if config.budget_mode == "strict":
        found.append("`budget_mode` is `strict`: every single token is kept at or under its budget, or at the floor.")
    else:
        first = "token leaves" if config.keep_first_tokens == 1 else f"{config.keep_first_tokens} tokens leave"
        if config.keep_first_tokens:
            found.append(f"The first {first} nothing out, so a very short text can cost more than its budget.")
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
    return f"`{report['text']}` ({window_count(report)})"


def details(title: str, content: str) -> str:
    """Something long that a reader opens."""
    return f"<details>\n<summary>{title}</summary>\n\n{content}\n\n</details>"


def markdown(rows: Table) -> str:
    """A table whose first row is the head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))
