"""Fitting a classifier, as a user would on a tiny base: it learns, keeps its budgets, goes on, and says what is wrong."""

import json
import random
import shutil

import evaluate
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from modeling_anee import AneeForCausalLM
from modeling_anee.classifier_heads import ExitCosts, mixed
from modeling_anee.cli.main import app
from modeling_anee.evaluation.classification import exits_at
from modeling_anee.evaluation.early_exits import HeadLogits, head_logits, mean_cost
from modeling_anee.publishing.artifact import problems
from modeling_anee.publishing.classifier_card import write_classifier_card
from modeling_anee.sequence_classification import AneeForSequenceClassification
from modeling_anee.training.classifier_check import BUDGETS, checked_as_text, crossed
from modeling_anee.training.classifier_fit import fit_head, fit_mixing

from .tiny import LAYERS, tiny_base
from .workshop import make_workshop, tiny_tokenizer


ACCURACY = """
import datasets
import evaluate


class Accuracy(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": sum(a == b for a, b in zip(predictions, references)) / len(references)}
"""


def lines(count: int, seed: int) -> list[tuple[str, str]]:
    """Texts with more words below w33 than above, or the reverse: label 0 or 1."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        label = draw.randrange(2)
        own, other = (range(33, 63), range(3, 33)) if label else (range(3, 33), range(33, 63))
        size = draw.randrange(4, 11)
        words = [f"w{draw.choice(own if draw.random() < 0.9 else other)}" for _ in range(size)]
        rows.append((" ".join(words), str(label)))
    return rows


def write(file, rows):
    file.write_text("".join(f"{text}\t{label}\n" for text, label in rows))
    return file


def anee(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A folder with a base, data and a run."""
    folder = tmp_path_factory.mktemp("classifier")
    make_workshop(folder)
    write(folder / "train.tsv", lines(500, 1))
    write(folder / "dev.tsv", lines(150, 2))
    done = fit(folder)
    assert done.exit_code == 0, done.output
    return folder


def fit(folder, *more, output="run"):
    given = ("--data", folder / "train.tsv", "--output", folder / output, "--labels", "low,high")
    return anee("fit-classifier", folder / "base", *given, *more)


def test_it_learns_and_is_a_classifier(fitted):
    model = AutoModelForSequenceClassification.from_pretrained(fitted / "run" / "artifact")
    tokenizer = tiny_tokenizer()
    rows = lines(150, 2)
    said = head_logits(model, [tokenizer(text)["input_ids"] for text, _ in rows], [int(label) for _, label in rows])
    assert model.config.id2label == {0: "low", 1: "high"}
    assert said.right.double().mean(dim=0).min() > 0.7
    for rule in ("confidence", "agreement"):
        cost = mean_cost(model.exit_costs, exits_at(model, rule, said, 0.6), said.tokens)
        assert cost < 0.7  # 150 rows that were not calibrated on


def test_the_same_seed_gives_the_same_artifact_and_features_are_used_again(fitted, monkeypatch):
    first = (fitted / "run" / "artifact" / "model.safetensors").read_bytes()
    computed = []
    features = AneeForSequenceClassification.features
    monkeypatch.setattr(AneeForSequenceClassification, "features", lambda *given: computed.append(1) or features(*given))
    assert fit(fitted).exit_code == 0 and not computed
    assert (fitted / "run" / "artifact" / "model.safetensors").read_bytes() == first
    assert fit(fitted, output="again").exit_code == 0 and computed
    assert (fitted / "again" / "artifact" / "model.safetensors").read_bytes() == first
    computed.clear()
    assert fit(fitted, "--layers", "2,4", output="again").exit_code == 0 and computed
    config = json.loads((fitted / "again" / "artifact" / "config.json").read_text())
    assert config["classifier"]["layers"] == [2, 4]


def test_the_base_is_as_it_was(fitted):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(fitted / "base")
    model = AneeForSequenceClassification.from_pretrained(fitted / "run" / "artifact")
    assert all(torch.equal(one, other) for one, other in zip(base.parameters(), model.base.parameters(), strict=True))


def test_heads_with_an_inner_layer_and_the_last_token(fitted):
    done = fit(fitted, "--hidden-size", 8, "--pooling", "last", "--rows", 120, output="inner")
    assert done.exit_code == 0, done.output
    model = AneeForSequenceClassification.from_pretrained(fitted / "inner" / "artifact")
    assert model.config.classifier["pooling"] == "last" and model.heads.exits[0][0].out_features == 8


def test_an_evaluator_of_evaluate_gives_the_accuracy_of_the_figures(fitted, tmp_path):
    done = anee(
        *("evaluate-classifier", fitted / "run" / "artifact", "--data", fitted / "dev.tsv", "--budgets", "0.5"),
        *("--output", tmp_path / "figures.json", "--curve", tmp_path / "curve.png"),
        *("--reliability", tmp_path / "reliability.png", "--seconds", "--repeats", 1, "--batch-size", 16, "--card"),
    )
    assert done.exit_code == 0, done.output
    assert "the last head alone (cost 1)" in done.stdout and "ms a row (batches of 16)" in done.stdout
    assert (tmp_path / "curve.png").is_file() and (tmp_path / "reliability.png").is_file()
    assert "dev.tsv" in (fitted / "run" / "artifact" / "README.md").read_text()
    figures = json.loads((tmp_path / "figures.json").read_text())
    (tmp_path / "accuracy").mkdir()
    (tmp_path / "accuracy" / "accuracy.py").write_text(ACCURACY)
    rows = lines(150, 2)
    data = Dataset.from_dict({"text": [text for text, _ in rows], "label": [int(label) for _, label in rows]})
    metric = evaluate.load(str(tmp_path / "accuracy"), module_type="metric")
    for rule, budget in (("confidence", 0.5), ("fixed", 0.5), ("confidence", 1.0)):
        model = AutoModelForSequenceClassification.from_pretrained(
            fitted / "run" / "artifact", energy_budget=budget, exit_rule=rule
        )
        # Given a pipeline, evaluate 0.4.6 asks transformers for TensorFlow's models, which release 5 no longer has.
        found = evaluate.evaluator("text-classification").compute(
            model, data, tokenizer=tiny_tokenizer(), metric=metric, label_mapping={"low": 0, "high": 1}
        )
        (row,) = (row for row in figures["rows"] if (row["rule"], row["budget"]) == (rule, budget))
        assert found["accuracy"] == pytest.approx(row["accuracy"])


def test_a_card_is_all_that_a_push_asks_for(fitted, tmp_path):
    shutil.copytree(fitted / "run" / "artifact", tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/base"}))
    figures = {
        "labels": ["low", "high"],
        "texts": 2,
        "layers": [1],
        "last": {"accuracy": 0.5, "standard_error": 0.1},
        "heads": [],
        "rows": [],
    }
    row = {"rule": "confidence", "budget": 0.5, "cost": 0.49, "accuracy": 0.75, "standard_error": 0.1}
    figures["rows"].append(row | {"gap": 0.1, "gap_error": 0.1, "used": [1.0], "shuffled": 0.7})
    write_classifier_card(tmp_path / "copy", figures, "dev.tsv")
    assert problems(tmp_path / "copy") == []
    text = (tmp_path / "copy" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in text and "org/base" in text and "0.7500 +- 0.1000" in text
    tiny_base().save_pretrained(tmp_path / "base")
    AneeForCausalLM.from_base(str(tmp_path / "base")).save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="not a classifier"):
        write_classifier_card(tmp_path / "lm", figures, "dev.tsv")


def test_a_linear_head_is_a_logistic_regression_of_standardised_features():
    generator = torch.Generator().manual_seed(0)
    features = 5 + 3 * torch.randn(500, 6, generator=generator)
    labels = (features[:, 0] > features[:, 1]).long()
    head, folds = torch.nn.Linear(6, 2), torch.arange(500) % 5
    outside = fit_head(head, features, labels, folds, generator)
    for said in (head(features).detach(), outside):
        assert (said.argmax(dim=1) == labels).float().mean() > 0.97
    labels[folds == 2] = 1 - labels[folds == 2]  # what a row says of itself is not in its answer
    assert (fit_head(head, features, labels, folds, generator).argmax(dim=1) == labels)[folds == 2].float().mean() < 0.1


def test_mixing_trusts_the_heads_that_are_right():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (2000,), generator=generator)
    answer = torch.stack((1.0 - labels, labels), dim=1)
    noise = torch.randn(2000, 3, 2, generator=generator)
    own = torch.stack((answer, torch.zeros_like(answer), answer), dim=1) + noise  # the second knows nothing
    mixing = fit_mixing(own, labels)
    assert mixing[0].tolist() == [1.0, 0.0] and abs(float(mixing[1, 0])) < 0.1 < float(mixing[1, 1])
    before = mixed(mixing[1], own[:, 1], own[:, 0])
    both = mixed(mixing[2], own[:, 2], before)
    right = [float((logits.argmax(dim=1) == labels).float().mean()) for logits in (own[:, 0], own[:, 2], both)]
    assert right[2] > max(right[:2]) + 0.03


def test_the_check_of_a_fit_is_by_rows_that_nothing_was_fitted_on():
    """Answers that have nothing to do with labels look no better than chance, whatever thresholds are tried."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (400,), generator=generator)
    rows = HeadLogits(torch.randn(400, 4, 2, generator=generator), labels, torch.full((400,), 5))
    costs = ExitCosts(torch.arange(1, 5).double(), torch.full((4,), 0.01).double())
    figures = crossed("confidence", rows, costs)
    assert [row["budget"] for row in figures] == [*BUDGETS, *BUDGETS] and figures[0]["cost"] == 1.0
    assert all(abs(row["accuracy"] - 0.5) < 0.08 for row in figures)
    assert "| fixed | 0.5 |" in checked_as_text(figures, 400, 5)


def test_a_classifier_may_be_evaluated_in_another_precision(fitted, tmp_path):
    call = ("evaluate-classifier", fitted / "run" / "artifact", "--data", fitted / "dev.tsv", "--budgets", "0.5")
    done = anee(*call, "--precision", "int8", "--output", tmp_path / "int8.json")
    assert done.exit_code == 0, done.output
    assert anee(*call, "--output", tmp_path / "full.json").exit_code == 0
    full, rounded = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("full", "int8"))
    assert full != rounded and rounded["last"]["accuracy"] == pytest.approx(full["last"]["accuracy"], abs=0.1)
    done = anee(*call, "--precision", "int3")
    assert done.exit_code == 1 and "--precision int3" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--labels", "low"), "the data has 2 labels: 0, 1"),
        (("--rows", "5"), "5 rows are too few"),
        (("--layers", "2,x"), "--layers 2,x"),
        (("--layers", "2"), f"of which the last is {LAYERS}"),
        (("--pooling", "max"), "--pooling max"),
        (("--precision", "int3"), "--precision int3"),
    ],
)
def test_a_bad_option_is_one_line_and_writes_nothing(fitted, tmp_path, options, said):
    done = fit(fitted, *options, output=tmp_path / "bad")
    assert done.exit_code == 1 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "bad" / "artifact").exists()


def test_bad_data_and_bad_artifacts_are_named(fitted, tmp_path):
    write(tmp_path / "one.tsv", [("w5", "1")] * 30)
    write(tmp_path / "other.tsv", [("w5", "7")] * 3)
    done = anee("fit-classifier", fitted / "base", "--data", tmp_path / "one.tsv", "--output", tmp_path / "run")
    assert done.exit_code == 1 and "there must be two or more" in done.stderr
    artifact = fitted / "run" / "artifact"
    done = anee("evaluate-classifier", artifact, "--data", tmp_path / "other.tsv")
    assert done.exit_code == 1 and "label '7' is not allowed" in done.stderr
    done = anee("evaluate-classifier", fitted / "base", "--data", fitted / "dev.tsv")
    assert done.exit_code == 1 and "not an artifact" in done.stderr
    done = anee("evaluate-classifier", artifact, "--data", fitted / "dev.tsv", "--budgets", "2")
    assert done.exit_code == 1 and "--budgets 2" in done.stderr
