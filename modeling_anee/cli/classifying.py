"""Verbs of early-exit classifiers: `anee fit-classifier` and `anee evaluate-classifier`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.utils import logging

from ..actions import FULL
from ..base_variants import precisions
from ..configuration_classifier import POOLINGS
from ..data.progress import progress, waiting
from .console import Output, check_file, check_picture, deliver, extra_libraries, say
from .options import FiguresOption
from .perplexity import parse_budgets


BUDGETS = "1,0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2"
MAX_LENGTH = 256
LabelledOption = Annotated[Path, typer.Option(help="TSV file: a text, a tab, its label, in each line.")]


def fit_classifier(
    base: Annotated[str, typer.Argument(help="Base: a Hub name, a folder, or smollm2-135m-instruct.")],
    data: LabelledOption,
    output: Annotated[Path, typer.Option(help="Folder of the run; the artifact is in it.")],
    rows: Annotated[int | None, typer.Option(min=1, help="Take so many rows, at random. Default: all.")] = None,
    labels: Annotated[str | None, typer.Option(help="Names of the labels, in their order, as in negative,positive.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Numbers of layers after which a head stands, as in 4,8,12. Default: evenly spread.")
    ] = None,
    pooling: Annotated[str, typer.Option(help="What a head reads of the tokens: their mean, the last, or the first.")] = "mean",
    hidden_size: Annotated[int, typer.Option(min=0, help="Inner width of a head; 0: one linear map.")] = 0,
    precision: Annotated[str, typer.Option(help="What the layers run in: full, int8 or int4.")] = FULL,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a text that are read.")] = MAX_LENGTH,
) -> None:
    """Fit classifier heads at layers of a frozen base, where texts leave as soon as a head is sure enough."""
    from ..data.labelled import read_labelled

    if pooling not in POOLINGS:
        raise ValueError(f"--pooling {pooling} is not allowed: it must be one of {', '.join(POOLINGS)}")
    check_precision(precision)
    names = None if labels is None else tuple(name.strip() for name in labels.split(","))
    read_labelled(data)  # before anything is loaded
    with extra_libraries("train", "anee fit-classifier"):
        from ..training.fit_classifier import ClassifierRequest
        from ..training.fit_classifier import fit_classifier as fit
    logging.disable_progress_bar()
    heads: dict[str, Any] = {
        "layers": parse_layers(layers),
        "pooling": pooling,
        "hidden_size": hidden_size,
        "precision": precision,
    }
    request = ClassifierRequest(base, data, rows, names, max_length=max_length, **heads)
    say(f"artifact: {fit(request, output, say)}")


def evaluate_classifier(
    artifact: Annotated[str, typer.Argument(help="Classifier: a folder or a Hub name.")],
    data: LabelledOption,
    budgets: Annotated[str, typer.Option(help="Budgets to replay, as in 0.5,0.3.")] = BUDGETS,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a text that are read.")] = MAX_LENGTH,
    precision: Annotated[
        str | None, typer.Option(help="Run the layers in full, int8 or int4. Default: as it was fitted.")
    ] = None,
    seconds: Annotated[
        bool, typer.Option("--seconds", help="Measure the time of the classifier's exit rule and of fixed exits, too.")
    ] = False,
    timed_rows: Annotated[int, typer.Option(min=1, help="--seconds: texts that are run, of all lengths.")] = 40,
    batch_size: Annotated[int, typer.Option(min=1, help="--seconds: texts that are run together.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="--seconds: rounds; the median counts.")] = 3,
    reliability: Annotated[Path | None, typer.Option(help="Draw how far confidence is to be trusted (PNG).")] = None,
    curve: Annotated[Path | None, typer.Option(help="Draw accuracy against cost (PNG).")] = None,
    card: Annotated[bool, typer.Option("--card", help="Write the artifact's README.md, with these figures.")] = False,
    output: FiguresOption = None,
) -> None:
    """Accuracy of an early-exit classifier against its cost, with controls, and the calibration of its heads."""
    check_file("--output", output)
    check_picture("--reliability", reliability)
    check_picture("--curve", curve)
    asked = parse_budgets(budgets)
    if precision is not None:
        check_precision(precision)
    if card and not Path(artifact).is_dir():
        raise ValueError(f"--card is not allowed with {artifact}: the card is written into the artifact's folder")
    from ..data.labelled import read_labelled
    from ..evaluation.classification import as_text, report
    from ..evaluation.early_exits import head_logits
    from ..evaluation.report import write_report

    rows = read_labelled(data)
    model, tokenizer = load_classifier(artifact, precision)
    numbers = label_numbers(model.config, rows.labels)
    ids = tokenizer(rows.texts, truncation=True, max_length=max_length)["input_ids"]
    with progress("rows", len(ids)) as done:
        said = head_logits(model, ids, numbers, done=done)
    figures = report(model, said, asked)
    text = as_text(figures)
    if seconds:
        from ..evaluation.classifier_time import cases, measure, spread, times_as_text

        chosen = [ids[place] for place in spread(ids, timed_rows)]
        with progress("times", (repeats + 1) * len(cases(model, asked))) as done:
            figures["seconds"] = measure(model, chosen, asked, batch_size, repeats, done)
        text += "\n\n" + times_as_text(figures["seconds"], figures["rows"], figures["last"])
    files = [Output("figures", output, lambda path: write_report(figures, path)), *pictures_of(figures, reliability, curve)]
    if card:
        from ..publishing.classifier_card import write_classifier_card

        files.append(Output("card", Path(artifact), lambda folder: write_classifier_card(folder, figures, data.name)))
    deliver(text, *files)


def pictures_of(figures: dict[str, Any], reliability: Path | None, curve: Path | None) -> list[Output]:
    """The pictures that were asked for."""
    found: list[Output] = []
    if reliability is not None or curve is not None:
        from ..pictures.classifier import draw_accuracy, draw_reliability

        found.append(Output("reliability", reliability, lambda path: draw_reliability(figures, path)))
        found.append(Output("curve", curve, lambda path: draw_accuracy(figures, path)))
    return found


def check_precision(name: str) -> None:
    """Notice a variant that there is not.

    Raises:
        ValueError: it is unknown.
    """
    known = [FULL, *precisions()]
    if name not in known:
        raise ValueError(f"--precision {name} is not allowed: it must be one of {', '.join(known)}")


def load_classifier(name: str, precision: str | None = None) -> tuple[Any, Any]:
    """A classifier, its layers in a variant if one is named, and its tokenizer.

    Raises:
        OSError: there is none.
        ValueError: it is something else.
    """
    from transformers import AutoTokenizer

    from ..configuration_anee import AneeConfig
    from ..sequence_classification import AneeForSequenceClassification

    logging.disable_progress_bar()
    with waiting("loading the classifier"):
        config = AneeConfig.from_pretrained(name)
        if config.classifier is None:
            raise ValueError(f"{name} is an artifact of a language model, not a classifier: anee fit-classifier makes one")
        fields: dict[str, Any] = {}
        if precision is not None:
            fields["classifier"] = config.classifier | {"precision": precision}
            fields["precisions"] = [] if precision == FULL else [precision]
            fields["actions"] = config.table.with_precisions(fields["precisions"]).stored()
        model = AneeForSequenceClassification.from_pretrained(name, **fields)
        return model.eval(), AutoTokenizer.from_pretrained(name)


def label_numbers(config: Any, labels: list[str]) -> list[int]:
    """Labels of a file as numbers of classes: they are names of classes, or their numbers.

    Raises:
        ValueError: a label that is neither.
    """
    known = {str(number): number for number in config.id2label} | config.label2id
    if unknown := sorted(set(labels) - set(known)):
        raise ValueError(f"label {unknown[0]!r} is not allowed: it must be one of {', '.join(map(repr, known))}")
    return [known[label] for label in labels]


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Numbers of layers of a list like `4,8,12`.

    Raises:
        ValueError: something that is no whole number.
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--layers {text} is not allowed: it must be whole numbers with commas between them") from error
