"""An early-exit classifier over a frozen base from labelled texts: features, heads, temperatures, dials, artifact."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..actions import FULL
from ..data.bases import Base, load_base_of
from ..data.files import whole_folder
from ..data.labelled import Labelled, read_labelled
from ..data.progress import progress, waiting
from ..evaluation.early_exits import HeadLogits
from ..sequence_classification import AneeForSequenceClassification
from .classifier_calibration import calibrate
from .classifier_features import Features
from .classifier_fit import fit_head
from .fit import compact
from .lock import only_run_in


MIN_ROWS = 20


@dataclass(frozen=True)
class ClassifierRequest:
    """What to fit.

    Args:
        base: Hub name or folder of the base, or that of the demo.
        data: TSV file of texts and labels.
        rows: take so many of its rows, drawn at random; None for all.
        names: of the classes, in the order of the labels in the file; None: the labels themselves.
        layers: numbers of layers after which a head stands; None: evenly spread.
        pooling: what heads read of the tokens: their `"mean"`, or the `"last"`.
        hidden_size: inner width of a head; 0: one linear map.
        precision: variant that the layers run in.
        max_length: tokens of a text that are read.
        held: share of the rows that the heads are not fitted on: they choose the weight decay, temperatures and dials.
        seed: of the split.
    """

    base: str
    data: Path
    rows: int | None = None
    names: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    pooling: str = "mean"
    hidden_size: int = 0
    precision: str = FULL
    max_length: int = 256
    held: float = 0.2
    seed: int = 0


def fit_classifier(request: ClassifierRequest, folder: Path, say: Callable[[str], Any] = print) -> Path:
    """Fit a classifier; returns the folder of the artifact, which is always whole.

    Args:
        request: what to fit.
        folder: of the run: new, or one whose features are used again where they are of the same rows.
        say: gets lines about what is done.

    Raises:
        ValueError: bad data, a bad request, or a folder in use.
        OSError: the base or the data can't be read, or the folder can't be written.
    """
    data = read_labelled(request.data)
    labels, names = classes(data, request.names)
    rows = drawn(len(labels), request)
    with only_run_in(folder):
        with waiting("loading the base"):
            model, tokenizer = prepared(request, names)
        ids = encoded(tokenizer, [data.texts[row] for row in rows], request.max_length)
        features = Features(folder / "features", about(request, model, ids), ids)
        features.compute(model)
        targets = torch.tensor(labels)[rows]
        first = len(rows) - max(round(len(rows) * request.held), MIN_ROWS // 2)
        held = fit_heads(model, features, targets, first, request.seed)
        with waiting("calibrating"):
            calibrate(model, held)
        say(f"fitted on {first} rows; of {len(rows) - first} held-out ones the last head has {last_right(held):.1%} right")
        return export(model, tokenizer, folder / "artifact")


def classes(data: Labelled, names: Sequence[str] | None) -> tuple[list[int], list[str]]:
    """Labels as numbers, and the names of the classes.

    Raises:
        ValueError: a single class, or another number of names.
    """
    found = data.names
    if len(found) < 2:
        raise ValueError(f"the data has the one label {found[0]!r}: there must be two or more")
    if names is not None and (len(names) != len(found) or len(set(names)) != len(names)):
        raise ValueError(f"labels={','.join(names)!r} is not allowed: the data has {len(found)} labels: {', '.join(found)}")
    return data.numbers(found), list(names or found)


def drawn(count: int, request: ClassifierRequest) -> Tensor:
    """Places of the rows to use in a random order, int64.

    Raises:
        ValueError: too few.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(request.seed))[: request.rows]
    if len(order) < MIN_ROWS:
        raise ValueError(f"{len(order)} rows are too few to fit and calibrate a classifier: it needs at least {MIN_ROWS}")
    return order


def prepared(request: ClassifierRequest, names: list[str]) -> tuple[Any, Any]:
    """The base with untrained heads, and a tokenizer that can pad."""
    base, tokenizer, fields = load_base_of(Base(name=request.base))
    torch.manual_seed(request.seed)
    model = AneeForSequenceClassification.from_base(
        base,
        labels=names,
        layers=request.layers,
        pooling=request.pooling,
        hidden_size=request.hidden_size,
        precision=request.precision,
        **fields,
    )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def encoded(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of texts, at most so many of each.

    Raises:
        ValueError: a text without any.
    """
    rows = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    if empty := next((text for text, ids in zip(texts, rows, strict=True) if not ids), None):
        raise ValueError(f"the text {empty[:80]!r} has no tokens")
    return rows


def about(request: ClassifierRequest, model: Any, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What features depend on."""
    return {
        "base": model.config.base_fingerprint,
        "layers": model.config.classifier["layers"],
        "pooling": request.pooling,
        "precision": request.precision,
        "rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }


def fit_heads(model: Any, features: Features, labels: Tensor, first: int, seed: int) -> HeadLogits:
    """Fit every head on the first rows; returns what all say of the others."""
    heads, generator = len(model.heads.exits), torch.Generator().manual_seed(seed)
    logits = torch.zeros(len(labels) - first, heads, model.config.num_labels)
    with progress("heads", heads) as done:
        for head in range(heads):
            read = features.of_head(head)
            held = read[first:], labels[first:]
            fit_head(model.heads.exits[head], read[:first], labels[:first], held, generator)
            with torch.no_grad():
                logits[:, head] = model.heads(head, held[0])
            done(1)
    return HeadLogits(logits, labels[first:], torch.tensor([len(row) for row in features.rows[first:]]))


def last_right(rows: HeadLogits) -> float:
    """Accuracy of the last head."""
    return float(rows.right[:, -1].double().mean())


def export(model: Any, tokenizer: Any, artifact: Path) -> Path:
    """Write the artifact."""
    with whole_folder(artifact) as part:
        model.save_pretrained(part, tokenizer=tokenizer)
        compact(part / "tokenizer.json")
    return artifact
