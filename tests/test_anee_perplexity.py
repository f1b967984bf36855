"""The metric `anee_perplexity`: equal to the official one at budget 1.0, budgets beside each other, errors."""

import inspect
import json
import math
import re
import runpy
import shutil
import statistics
import sys
import types
from pathlib import Path

import evaluate
import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_anee
from modeling_anee.data.windows import Window
from modeling_anee.evaluation.perplexity import score

from .tiny import BRIDGES, CONFIGS, wrap
from .workshop import make_workshop, words


FOLDER = Path(modeling_anee.__file__).parent / "evaluation" / "anee_perplexity"
TEXTS = ["w3 w4 w5", "w9", *words(60).splitlines(), "w20 w21 w22 w8 w9 w10 w11 w12"]


@pytest.fixture(scope="module")
def metric():
    evaluate.disable_progress_bar()
    return evaluate.load(str(FOLDER))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of a base and of an artifact over it, whose own budget is 0.7."""
    folder = tmp_path_factory.mktemp("models")
    make_workshop(folder)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = wrap(base, energy_budget=0.7, base_model_name_or_path=str(folder / "base"), **BRIDGES)
    model.save_pretrained(folder / "artifact", tokenizer=AutoTokenizer.from_pretrained(folder / "base"))
    return folder


def loaded(folder, name="artifact"):
    return AutoModelForCausalLM.from_pretrained(folder / name), AutoTokenizer.from_pretrained(folder / name)


@torch.no_grad()
def official(model_id, texts, add_start_token=True, max_length=None, batch_size=3):
    """The perplexities that the metric `perplexity` of evaluate gives, computed as it does: by name alone, with padding."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_id), AutoTokenizer.from_pretrained(model_id)
    room = max_length - 1 if add_start_token and max_length else max_length
    cut = {"truncation": bool(room), "max_length": room}
    encoded = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt", return_attention_mask=True, **cut)
    found = []
    for ids, mask in zip(encoded.input_ids.split(batch_size), encoded.attention_mask.split(batch_size), strict=True):
        if add_start_token:
            ids = torch.cat([torch.full((len(ids), 1), tokenizer.bos_token_id), ids], dim=1)
            mask = torch.cat([torch.ones(len(ids), 1, dtype=mask.dtype), mask], dim=1)
        logits, labels, scored = model(ids, attention_mask=mask).logits[:, :-1], ids[:, 1:], mask[:, 1:]
        nll = cross_entropy(logits.transpose(1, 2), labels, reduction="none") * scored
        found += (nll.sum(1) / scored.sum(1)).exp().tolist()
    return found


# Beside the official metric


@pytest.mark.parametrize(
    "settings", [{}, {"max_length": 5}, {"add_start_token": False}, {"add_start_token": False, "max_length": 3}]
)
@pytest.mark.parametrize("name", ["base", "artifact"])
def test_at_budget_one_it_is_the_official_metric_on_the_base(metric, folder, name, settings):
    texts = TEXTS if settings.get("add_start_token", True) else [text for text in TEXTS if " " in text]
    expected = official(str(folder / "base"), texts, **settings)
    found = metric.compute(predictions=texts, model_id=str(folder / name), energy_budget=1.0, batch_size=4, **settings)
    assert found["perplexities"] == pytest.approx(expected, rel=1e-4)
    assert found["mean_perplexity"] == pytest.approx(statistics.mean(expected), rel=1e-4)
    assert found["mean_cost"] == pytest.approx(1.0)


def test_the_official_metric_runs_on_an_artifact_at_its_own_budget(metric, folder):
    expected = official(str(folder / "artifact"), TEXTS)
    found = metric.compute(predictions=TEXTS, model_id=str(folder / "artifact"), energy_budget=[0.7, 1.0])
    assert found["0.7"]["perplexities"] == pytest.approx(expected, rel=1e-4)
    assert found["1.0"]["perplexities"] != pytest.approx(expected, rel=1e-2)


def test_it_rounds_as_the_official_metric_does_with_a_large_vocabulary(metric, folder, tmp_path):
    torch.manual_seed(0)
    config = CONFIGS["llama"]()
    config.vocab_size = 49152
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # logits that are as far apart as those of a trained model
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(tmp_path)
    found = metric.compute(predictions=TEXTS, model_id=str(tmp_path), energy_budget=1.0)
    assert found["perplexities"] == pytest.approx(official(str(tmp_path), TEXTS), rel=1e-5)  # the other sum: 1e-4


# What it returns


def test_every_budget_has_its_figures(metric, folder):
    found = metric.compute(predictions=TEXTS, model_id=str(folder / "artifact"))
    assert list(found) == ["1.0", "0.8", "0.6"] and found == json.loads(json.dumps(found))
    model, tokenizer = loaded(folder)
    encoded = [[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]] for text in TEXTS]
    for budget, figures in found.items():
        own = score(model, [Window(torch.tensor(ids), 1) for ids in encoded], float(budget), batch_size=1)
        assert figures["perplexities"] == pytest.approx((own.nll / own.tokens).exp().tolist(), rel=1e-5)
        assert figures["mean_perplexity"] == pytest.approx(statistics.mean(figures["perplexities"]))
        assert figures["corpus_perplexity"] == pytest.approx(math.exp(own.nll.sum() / own.tokens.sum()), rel=1e-5)
        assert figures["standard_error"] == pytest.approx(own.standard_error, rel=1e-4) and own.standard_error > 0
        assert figures["mean_cost"] == pytest.approx(own.mean_cost)
        assert figures["tokens"] == sum(len(ids) - 1 for ids in encoded)
    costs = [figures["mean_cost"] for figures in found.values()]
    assert costs == sorted(costs, reverse=True) and costs[0] == 1.0 > costs[1] > costs[2]


def test_a_single_budget_gives_its_figures_and_a_single_text_no_error(metric, folder):
    given = {"predictions": TEXTS[:1], "model_id": str(folder / "artifact")}
    one = metric.compute(energy_budget=0.8, **given)
    assert one == metric.compute(energy_budget=[0.8], **given)["0.8"] and one["standard_error"] is None
    assert one["perplexities"] == [pytest.approx(one["mean_perplexity"])] == [pytest.approx(one["corpus_perplexity"])]
    assert list(metric.compute(energy_budget=(0.8, 1, 0.8), **given)) == ["0.8", "1.0"]


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_batches_and_the_order_of_texts_do_not_matter(metric, folder, batch_size):
    given = {"model_id": str(folder / "artifact"), "energy_budget": 0.6}
    there = metric.compute(predictions=TEXTS, batch_size=3, **given)
    back = metric.compute(predictions=TEXTS[::-1], batch_size=batch_size, **given)
    assert back["perplexities"][::-1] == pytest.approx(there["perplexities"], rel=1e-5)
    assert back["mean_cost"] == pytest.approx(there["mean_cost"])


# Models


def test_a_loaded_model_is_scored_in_eval_mode_and_left_as_it_was(metric, folder):
    model, tokenizer = loaded(folder)
    expected = metric.compute(predictions=TEXTS, model_id=str(folder / "artifact"))
    model.train()
    assert metric.compute(predictions=TEXTS, model=model, tokenizer=tokenizer, device="cpu") == expected
    assert model.training


def test_another_tokenizer_may_be_given(metric, folder):
    _, tokenizer = loaded(folder)
    tokenizer.bos_token = "</s>"
    given = {"predictions": TEXTS, "model_id": str(folder / "artifact"), "energy_budget": 1.0}
    assert metric.compute(tokenizer=tokenizer, **given)["perplexities"] != metric.compute(**given)["perplexities"]


def test_no_padding_token_is_needed(metric, folder):
    model, tokenizer = loaded(folder)
    expected = metric.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    tokenizer.pad_token = None
    assert metric.compute(predictions=TEXTS, model=model, tokenizer=tokenizer) == expected


def without_start_token(folder):
    model, tokenizer = loaded(folder)
    tokenizer.bos_token = None
    return {"model_id": None, "model": model, "tokenizer": tokenizer}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: {"energy_budget": 1.5}, "energy_budget=1.5 is not allowed"),
        (lambda folder: {"energy_budget": [0.5, "high"]}, "energy_budget='high' is not allowed"),
        (lambda folder: {"energy_budget": "0.5"}, "energy_budget='0.5' is not allowed"),
        (lambda folder: {"energy_budget": []}, r"energy_budget=\[\] is not allowed"),
        (lambda folder: {"model_id": str(folder / "base")}, "energy_budget=1.0, 0.8, 0.6 .* LlamaForCausalLM is a plain model"),
        (lambda folder: {"model_id": None}, "model_id=None with model=None .* exactly one"),
        (lambda folder: {"model": loaded(folder)[0]}, "with model=AneeForCausalLM .* exactly one"),
        (lambda folder: {"model_id": None, "model": loaded(folder)[0]}, "tokenizer=None is not allowed with model"),
        (without_start_token, "add_start_token=True is not allowed: .* no BOS token"),
        (lambda folder: {"max_length": 1}, "max_length=1 is not allowed"),
        (lambda folder: {"batch_size": 0}, "batch_size=0 is not allowed"),
        (lambda folder: {"device": "toaster"}, "device='toaster' is not allowed"),
        (lambda folder: {"predictions": ["w3", " "]}, r"predictions\[1\]=' ' is not allowed: .* at least 1 token"),
        (lambda folder: {"predictions": ["w3"], "add_start_token": False}, r"predictions\[0\]='w3' .* 2 tokens"),
        (lambda folder: {"predictions": ["w3 " * 2048]}, r"predictions\[0\] of 2049 tokens .* 2048 positions; set max_length"),
        (lambda folder: {"predictions": []}, r"predictions=\[\] is not allowed"),
        (lambda folder: {"predictions": ["w3", None]}, r"predictions\[1\] is None, not a text"),
    ],
)
def test_bad_arguments_are_named(metric, folder, change, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(**({"predictions": TEXTS, "model_id": str(folder / "artifact")} | change(folder)))


def test_a_text_without_a_score_is_named(metric, folder):
    model, tokenizer = loaded(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = math.nan
    message = r"predictions\[1\]: window \d+ of \d+ at budget 0.8 has no score: the loss of a token is nan"
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=["w3 w4 w5", "w3 w9 w3", "w5"], model=model, tokenizer=tokenizer, energy_budget=0.8)


def test_texts_are_cut_at_the_side_that_the_tokenizer_says(metric, folder):
    model, tokenizer = loaded(folder)
    given = {"model": model, "tokenizer": tokenizer, "energy_budget": 1.0}
    for side, cut in (("right", "w3 w4 w5"), ("left", "w5 w6 w7")):
        tokenizer.truncation_side = side
        one = metric.compute(predictions=["w3 w4 w5 w6 w7"], max_length=4, **given)
        assert one == metric.compute(predictions=[cut], **given)


@pytest.mark.parametrize("device", ["cuda", "gpu"])
def test_a_device_that_is_not_there_is_named(metric, folder, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device='{device}' is not allowed: this machine has no CUDA device"):
        metric.compute(predictions=TEXTS, model_id=str(folder / "artifact"), device=device)


# As a Space


@pytest.fixture
def copied(tmp_path):
    """The folder as it lies in a Space: elsewhere, under another name."""
    shutil.copytree(FOLDER, tmp_path / "space", ignore=shutil.ignore_patterns("__pycache__"))
    script = tmp_path / "space" / "anee_perplexity.py"
    script.write_text(script.read_text() + f"\n_COPY = {str(tmp_path)!r}\n")  # a module of its own in evaluate's cache
    return tmp_path / "space"


def test_a_copy_works_with_the_package_installed(metric, copied, folder):
    given = {"predictions": TEXTS, "model_id": str(folder / "artifact"), "energy_budget": 0.6}
    assert evaluate.load(str(copied / "anee_perplexity.py")).compute(**given) == metric.compute(**given)


def test_a_copy_without_the_package_says_what_to_install(copied, monkeypatch):
    monkeypatch.setitem(sys.modules, "modeling_anee.checks", None)
    with pytest.raises(ImportError, match="needs the package modeling_anee: pip install modeling-anee"):
        evaluate.load(str(copied / "anee_perplexity.py"))


def test_the_page_scores_one_text_a_line(copied, folder, monkeypatch):
    gradio = types.SimpleNamespace(Error=RuntimeError, Interface=dict, Textbox=dict, JSON=dict)
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    page = runpy.run_path(str(copied / "app.py"))["page"]
    found = page["fn"]("w3 w4\n\nw5 w6\n", f" {folder / 'artifact'} ", "1.0, 0.6")
    assert [len(found[budget]["perplexities"]) for budget in ("1.0", "0.6")] == [2, 2]
    with pytest.raises(RuntimeError, match="energy_budget=2.0 is not allowed"):
        page["fn"]("w3", str(folder / "artifact"), "2")


def test_the_card_is_that_of_a_metric_space(metric):
    head, text = re.fullmatch(r"---\n(.*?)\n---\n(.*)", (FOLDER / "README.md").read_text(), re.DOTALL).groups()
    card = yaml.safe_load(head)
    assert card["tags"] == ["evaluate", "metric"] and card["sdk"] == "gradio" and (FOLDER / card["app_file"]).is_file()
    assert {"title", "emoji", "colorFrom", "colorTo", "sdk_version", "description", "license"} <= card.keys()
    assert all(f"**{name}**" in text for name in inspect.signature(metric._compute).parameters)
    assert (FOLDER / "requirements.txt").read_text().split()[0] == "modeling-anee"
