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
from ..classifier_heads import mixed
from ..data.bases import Base, load_base_of
from ..data.files import whole_folder
from ..data.labelled import Labelled, read_labelled
from ..data.progress import progress, waiting
from ..evaluation.early_exits import HeadLogits
from ..sequence_classification import AneeForSequenceClassification
from .classifier_calibration import calibrate
from .classifier_check import checked_as_text, crossed
from .classifier_features import Features
from .classifier_fit import fit_head, fit_mixing
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
        pooling: what heads read of the tokens: their `"mean"`, the `"last"` or the `"first"`.
        hidden_size: inner width of a head; 0: one linear map.
        precision: variant that the layers run in.
        max_length: tokens of a text that are read.
        folds: each is answered by heads fitted on the others, for all that is chosen on rows that heads were not fitted on.
        seed: of the order of the rows.
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
    folds: int = 5
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
        said = fit_heads(model, features, torch.tensor(labels)[rows], request)
        with waiting("calibrating"):
            calibrate(model, said)
            checked = crossed(model.config.exit_rule, said, model.exit_costs)
        say(checked_as_text(checked, len(rows), request.folds))
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


def fit_heads(model: Any, features: Features, labels: Tensor, request: ClassifierRequest) -> HeadLogits:
    """Fit every head and the mixing; returns what heads that were fitted on other folds say of all rows."""
    heads, generator = len(model.heads.exits), torch.Generator().manual_seed(request.seed)
    own = torch.zeros(len(labels), heads, model.config.num_labels)
    folds = torch.arange(len(labels)) % request.folds  # the rows are in a random order
    with progress("heads", heads) as done:
        for head in range(heads):
            own[:, head] = fit_head(model.heads.exits[head], features.of_head(head), labels, folds, generator)
            done(1)
    model.heads.mixing.copy_(fit_mixing(own, labels))
    before: Tensor | None = None
    for head in range(heads):
        own[:, head] = before = mixed(model.heads.mixing[head], own[:, head].clone(), before)
    return HeadLogits(own, labels, torch.tensor([len(row) for row in features.rows]))


def export(model: Any, tokenizer: Any, artifact: Path) -> Path:
    """Write the artifact."""
    with whole_folder(artifact) as part:
        model.save_pretrained(part, tokenizer=tokenizer)
        compact(part / "tokenizer.json")
    return artifact
