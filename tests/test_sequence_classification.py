"""An early-exit classifier: rows are what they are alone, skipped layers are not run, budgets, saving, pipelines, `Trainer`."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy, rms_norm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)

from modeling_anee import AneeConfig, AneeForCausalLM, AneeForSequenceClassification
from modeling_anee.configuration_classifier import POOLINGS
from modeling_anee.layer_runner import LayerRunner
from modeling_anee.publishing.export import export

from .test_base_loading import lay_out
from .tiny import FAMILIES, LAYERS, VOCABULARY, tiny_base, token_ids
from .workshop import tiny_tokenizer


LENGTHS = (12, 5, 9, 1, 7)
NAMES = ["bad", "fair", "good"]
TEXTS = ["w5 w6 w7", "w9", "w10 w11 w12 w13 w14 w15 w16", "w20 w21"]
DIALS = {
    "confidence": {"budgets": [0.25, 0.5, 0.75], "settings": [[0.0, 0.0, 0.0], [0.5, 0.5, 0.4], [1.0, 0.6, 0.5]]},
    "patience": {"budgets": [0.25, 0.5], "settings": [[0, 0, 0], [1, 1, 1]]},
}


def classifier(family="llama", **fields):
    """A classifier whose heads are sure of some rows and not of others."""
    base = tiny_base(family)
    fields = {"base_model_name_or_path": "tiny/base", "labels": NAMES, **fields}
    model = AneeForSequenceClassification.from_base(base, **fields)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.heads.mixing.copy_(torch.tensor([[1.0, 0.0], [0.8, 0.3], [1.1, -0.1], [0.7, 0.4]]))
    model.config.classifier = model.config.classifier | {"dials": DIALS}
    return model


def padded(side: str = "right"):
    """Rows of different lengths, ids and mask int64 [5, 12]."""
    ids, mask = token_ids(len(LENGTHS), max(LENGTHS)), torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
        if side == "left":
            ids[row], mask[row] = ids[row].roll(-length), mask[row].flip(0)
    return ids * mask, mask


def alone(ids, mask, row):
    return ids[row : row + 1, mask[row].bool()]


SETTINGS = [
    {"confidence_threshold": 0.6},
    {"confidence_threshold": 0.5, "exit_rule": "agreement"},
    {"patience": 1},
    {"energy_budget": 0.5, "exit_rule": "fixed"},
    {"energy_budget": 0.6},
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_row_in_a_batch_is_the_row_alone(family, setting):
    model = classifier(family)
    for side in ("right", "left"):
        ids, mask = padded(side)
        together = model(ids, mask, **setting)
        for row in range(len(ids)):
            single = model(alone(ids, mask, row), **setting)
            torch.testing.assert_close(single.logits[0], together.logits[row], atol=1e-4, rtol=1e-4)
            assert single.exits == together.exits[row]
            assert float(single.execution.row_cost) == pytest.approx(float(together.execution.row_cost[row]), abs=1e-6)
    if setting == SETTINGS[0]:
        assert len(together.exits.unique()) > 1


@pytest.mark.parametrize("pooling", POOLINGS)
def test_heads_read_what_the_base_computes(pooling):
    model = classifier(pooling=pooling)
    ids, mask = padded()
    states = model.base.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    pools = []
    for layer in states[1:3]:  # what leaves the first two
        tokens = rms_norm(layer, layer.shape[-1:], eps=1e-6)
        means = torch.stack([tokens[row, :n].mean(dim=0) for row, n in enumerate(LENGTHS)])
        places = torch.tensor(LENGTHS) - 1 if pooling == "last" else torch.zeros(len(LENGTHS), dtype=torch.long)
        pools.append(means if pooling == "mean" else tokens[torch.arange(len(LENGTHS)), places])
    expected = torch.cat((pools[1], (pools[0] + pools[1]) / 2), dim=1)
    torch.testing.assert_close(model.features(ids, mask)[:, 1], expected, atol=1e-5, rtol=1e-5)


def test_a_budget_or_threshold_of_one_is_the_last_head_alone():
    model = classifier()
    ids, mask = padded()
    expected = model.heads.all(model.features(ids, mask))[:, -1]
    for setting in ({}, {"energy_budget": 1.0}, {"confidence_threshold": 1.0}, {"confidence_threshold": 7.0}):
        output = model(ids, mask, **setting)
        torch.testing.assert_close(output.logits, expected)
        assert output.exits.tolist() == [LAYERS] * len(ids)
        assert (output.execution.row_cost == 1.0).all()


def test_the_answer_is_that_of_the_head_where_a_row_left():
    model = classifier()
    ids, mask = padded()
    logits, output = model.heads.all(model.features(ids, mask)), model(ids, mask, confidence_threshold=0.6)
    for row, layers in enumerate(output.exits.tolist()):
        torch.testing.assert_close(output.logits[row], logits[row, layers - 1])


def test_a_head_is_mixed_with_the_head_before_and_then_calibrated():
    model = classifier()
    model.heads.temperature.copy_(torch.tensor([1.0, 2.0, 0.5, 1.5]))
    features = model.features(*padded())
    first, second = (torch.nn.functional.linear(features[:, head], *model.heads.exits[head].parameters()) for head in (0, 1))
    torch.testing.assert_close(model.heads.all(features)[:, 1], (0.8 * second + 0.3 * first) / 2.0)


def test_layers_are_not_run_for_rows_that_have_left(monkeypatch):
    model, ran = classifier(), [0] * LAYERS
    alike = LayerRunner.alike

    def counted(self, layer, hidden, *args):
        ran[layer] += len(hidden)
        return alike(self, layer, hidden, *args)

    monkeypatch.setattr(LayerRunner, "alike", counted)
    ids, mask = padded()
    output = model(ids, mask, confidence_threshold=0.6)
    assert ran == [int((output.exits > layer).sum()) for layer in range(LAYERS)]
    assert ran[-1] < ran[0] == len(ids)


def test_the_batch_loses_the_padding_of_rows_that_have_left(monkeypatch):
    model, widths = classifier(), []
    alike = LayerRunner.alike

    def noted(self, layer, hidden, *args):
        widths.append(hidden.shape[1])
        return alike(self, layer, hidden, *args)

    monkeypatch.setattr(LayerRunner, "alike", noted)
    ids, mask = padded()
    budgets = [0.25, 1.0, 0.25, 1.0, 0.25]  # the longest row leaves first
    model(ids, mask, energy_budget=budgets, exit_rule="fixed")
    assert widths == [12, 5, 5, 5]


def test_what_is_spent_is_what_the_trace_says():
    model = classifier()
    ids, mask = padded()
    output = model(ids, mask, confidence_threshold=0.6)
    trace = output.execution
    assert torch.equal(trace.depth[:, 0], output.exits) and torch.equal(trace.valid, mask.bool())
    layer, head = 1 / LAYERS, model.exit_costs.heads[0] / model.exit_costs.layers[-1]
    for row, (length, layers) in enumerate(zip(LENGTHS, output.exits.tolist(), strict=True)):
        expected = (layers * layer * length + layers * head) / (length + LAYERS * head)
        assert float(trace.row_cost[row]) == pytest.approx(float(expected), abs=1e-6)


def test_budgets_may_differ_by_row():
    model = classifier()
    ids, mask = padded()
    output = model(ids, mask, energy_budget=[0.25, 0.5, 0.75, 1.0, 0.1], exit_rule="fixed")
    assert output.exits.tolist() == [1, 2, 3, 4, 1]


def test_a_precision_changes_what_layers_run_in():
    model = classifier(precision="int8", cost_unit="bytes")
    ids, mask = padded()
    full = classifier()(ids, mask).logits
    logits = model(ids, mask).logits
    assert not torch.equal(logits, full)
    torch.testing.assert_close(logits, full, atol=1.0, rtol=0.3)
    assert {row.name for row in (model.config.table[p] for p in model(ids, mask).execution.actions.unique())} == {"INT8"}


def test_one_row_without_a_mask_and_embeddings_instead_of_ids():
    model, ids = classifier(), token_ids(2, 6)
    embeddings = model.get_input_embeddings()(ids)
    expected = model(ids, confidence_threshold=0.6)
    torch.testing.assert_close(model(inputs_embeds=embeddings, confidence_threshold=0.6).logits, expected.logits)
    assert isinstance(model(ids, return_dict=False), tuple)


def test_training_asks_all_heads_and_teaches_nothing_else():
    model = classifier().train()
    ids, mask = padded()
    labels = torch.tensor([0, 1, 2, 0, 1])
    output = model(ids, mask, labels=labels, energy_budget=0.25)
    logits = model.heads.all(model.features(ids, mask))
    losses = [cross_entropy(logits[:, head], labels) for head in range(LAYERS)]
    expected = sum((head + 1) * loss for head, loss in enumerate(losses)) / sum(range(1, LAYERS + 1))
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    taught = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert taught == {f"heads.exits.{head}.{part}" for head in range(LAYERS) for part in ("weight", "bias")}
    model.eval()
    output = model(ids, mask, labels=labels)
    torch.testing.assert_close(output.loss, cross_entropy(output.logits, labels))


@pytest.fixture
def artifact(tmp_path):
    """A saved classifier, with its base."""
    tiny_base().save_pretrained(tmp_path / "base")
    model = classifier(base_model_name_or_path=str(tmp_path / "base"))
    model.config.pad_token_id = 0
    model.heads.temperature.copy_(torch.tensor([1.0, 2.0, 0.5, 1.5]))
    model.save_pretrained(tmp_path / "artifact", tokenizer=tiny_tokenizer())
    return model, tmp_path / "artifact"


def test_what_is_saved_loads_as_the_same(artifact):
    model, folder = artifact
    ids, mask = padded()
    for kind in (AneeForSequenceClassification, AutoModelForSequenceClassification):
        loaded = kind.from_pretrained(folder)
        assert type(loaded) is AneeForSequenceClassification and loaded.config.id2label == dict(enumerate(NAMES))
        for setting in ({}, {"energy_budget": 0.6}, {"patience": 1}):
            assert torch.equal(loaded(ids, mask, **setting).logits, model(ids, mask, **setting).logits)
    chosen = AutoModelForSequenceClassification.from_pretrained(folder, exit_rule="patience", patience=1)
    assert torch.equal(chosen(ids, mask).logits, model(ids, mask, patience=1).logits)
    budget = AutoModelForSequenceClassification.from_pretrained(folder, energy_budget=0.5)
    assert torch.equal(budget(ids, mask).exits, model(ids, mask, energy_budget=0.5).exits)


def test_an_artifact_has_heads_and_nothing_of_the_base(artifact):
    from safetensors import safe_open

    with safe_open(artifact[1] / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
    heads = {f"heads.exits.{head}.{part}" for head in range(LAYERS) for part in ("weight", "bias")}
    assert names == heads | {"heads.temperature", "heads.mixing", "controller.format_version"}


LOAD = """
import sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
name = sys.argv[1]
model = AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
print(classify(["w5 w6 w7", "w9"])[1]["label"], model(torch.tensor([[5, 6, 7]]), energy_budget=0.5).exits.item())
"""


def test_it_loads_without_the_package_from_a_folder_and_from_the_hub_s_cache(artifact, forks, tmp_path):
    model, folder = artifact
    expected = pipeline("text-classification", model=model, tokenizer=tiny_tokenizer())(TEXTS[1])[0]["label"]
    answer = f"{expected} {model(torch.tensor([[5, 6, 7]]), energy_budget=0.5).exits.item()}"
    export(folder, tmp_path / "checkout", code=False)
    export(tmp_path / "checkout", tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    for name in (folder, tmp_path / "exported"):
        done = forks.run(LOAD, str(name))
        assert done.returncode == 0 and done.stdout.strip().endswith(answer), done.stderr


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_pipeline_says_what_the_model_says(artifact, batch_size):
    model, tokenizer = artifact[0], tiny_tokenizer()
    model.config.energy_budget = 0.5
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    for text, found in zip(TEXTS, classify(TEXTS, batch_size=batch_size), strict=True):
        scores = model(tokenizer(text, return_tensors="pt").input_ids).logits[0].detach().softmax(dim=-1)
        assert found["label"] == NAMES[int(scores.argmax())]
        assert found["score"] == pytest.approx(float(scores.max()), abs=1e-5)


def test_a_pipeline_loads_an_artifact_by_its_folder(artifact):
    classify = pipeline("text-classification", model=str(artifact[1]), model_kwargs={"energy_budget": 0.5})
    assert classify.model.config.energy_budget == 0.5 and classify(TEXTS[0])[0]["label"] in NAMES


def test_the_trainer_trains_saves_and_evaluates(artifact, tmp_path):
    model, folder = artifact
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(24):
        length = int(torch.randint(2, 9, (1,), generator=generator))
        label = number % 3
        ids = [3 + label, *torch.randint(6, VOCABULARY, (length,), generator=generator).tolist()]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label})
    fields = {"max_steps": 30, "learning_rate": 0.02, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    fields |= {"disable_tqdm": True, "per_device_train_batch_size": 8, "logging_strategy": "no"}
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path / "run"), **fields),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorWithPadding(tiny_tokenizer()),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] and after["eval_accuracy"] > before["eval_accuracy"]
    trainer.save_model(str(tmp_path / "trained"))
    loaded = AneeForSequenceClassification.from_pretrained(tmp_path / "trained")
    ids, mask = padded()
    assert torch.equal(loaded(ids, mask).logits, model.eval()(ids, mask).logits)
    assert not any(parameter.requires_grad for parameter in model.base.parameters())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"labels": 1}, "labels=1"),
        ({"labels": ["a", "a"]}, "two or more different names"),
        ({"layers": [2]}, "classifier.layers=[2]"),
        ({"precision": "int3"}, "int3"),
        ({"exit_rule": "luck"}, "exit_rule='luck'"),
        ({"patience": 2}, "patience=2"),
        ({"problem_type": "regression"}, "problem_type='regression'"),
    ],
)
def test_bad_fields_are_named(fields, said):
    with pytest.raises(ValueError) as raised:
        classifier(**fields)
    assert said in str(raised.value)


def test_bad_calls_are_named():
    model, ids = classifier(), token_ids()
    for call, kind, said in (
        ({"threshold": 0.5}, TypeError, "threshold"),
        ({"energy_budget": 0.5, "exit_rule": "agreement"}, ValueError, "not calibrated"),
        ({"energy_budget": -1}, ValueError, "energy_budget=-1"),
        ({"inputs_embeds": torch.zeros(2, 3, 32)}, ValueError, "exactly one"),
    ):
        with pytest.raises(kind) as raised:
            model(ids, **call)
        assert said in str(raised.value)


def test_artifacts_of_language_models_and_of_classifiers_are_told_apart(artifact, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    AneeForCausalLM.from_base(base).save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError) as raised:
        AneeForSequenceClassification.from_pretrained(tmp_path / "lm")
    assert "has no classifier" in str(raised.value)
    with pytest.raises(ValueError) as raised:
        AneeForCausalLM.from_pretrained(artifact[1])
    assert "AneeForSequenceClassification" in str(raised.value)
    assert AneeConfig.from_pretrained(tmp_path / "lm").classifier is None


def test_rows_of_a_trace_can_be_taken_one_by_one():
    model = classifier()
    trace = model(*padded(), confidence_threshold=0.6).execution
    assert [float(row.row_cost) for row in trace] == trace.row_cost.tolist() and len(trace) == len(LENGTHS)
    with pytest.raises(IndexError):
        trace[len(LENGTHS)]


def test_a_folder_of_the_hub_s_cache_loads_by_its_name(artifact, tmp_path, monkeypatch):
    from huggingface_hub import constants

    lay_out(tmp_path / "cache", "user/classifier", artifact[1])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded = AutoModelForSequenceClassification.from_pretrained("user/classifier", cache_dir=tmp_path / "cache")
    ids, mask = padded()
    assert torch.equal(loaded(ids, mask).logits, artifact[0](ids, mask).logits)
