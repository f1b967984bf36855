"""The trained artifact in `configuration/`: small, whole, in step with the package; the slow tests run it."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_anee
from modeling_anee.actions import ActionTable
from modeling_anee.data.encoding import encode_text
from modeling_anee.data.smollm2 import SHIPPED_ARTIFACT, smollm2_folder
from modeling_anee.data.windows import windows
from modeling_anee.evaluation.perplexity import ratio, score
from modeling_anee.modeling_anee import AneeForCausalLM
from modeling_anee.pretrained import without_base
from modeling_anee.publishing.artifact import problems
from modeling_anee.publishing.export import export
from modeling_anee.training.recipe import read_recipe

from .test_real_base import TEXT


LIMIT = 8_000_000  # bytes


def test_the_artifact_is_small():
    assert sum(file.stat().st_size for file in SHIPPED_ARTIFACT.iterdir()) < LIMIT


def test_it_has_no_code_and_its_configuration_says_what_to_do(tmp_path):
    """`anee export --without-code` writes it."""
    export(SHIPPED_ARTIFACT, tmp_path / "again", code=False)
    assert {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()} == {
        file.name: file.read_bytes() for file in SHIPPED_ARTIFACT.iterdir()
    }
    assert not [file.name for file in SHIPPED_ARTIFACT.iterdir() if file.suffix == ".py"]


def test_it_can_be_published():
    assert problems(SHIPPED_ARTIFACT) == []


def test_its_weights_fit_its_configuration():
    config = modeling_anee.AneeConfig.from_pretrained(SHIPPED_ARTIFACT)
    with without_base():
        model, info = AneeForCausalLM._load_own(SHIPPED_ARTIFACT, config=config)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(parameter.isfinite().all() and parameter.dtype == torch.float32 for parameter in model.parameters())


def test_it_holds_no_weight_of_the_base():
    with safe_open(SHIPPED_ARTIFACT / "model.safetensors", "pt") as file:
        assert all(name.split(".")[0] in ("bridges", "controller", "corrections") for name in file.keys())


def test_it_is_what_its_recipe_says():
    recipe = read_recipe(SHIPPED_ARTIFACT.with_name(f"{SHIPPED_ARTIFACT.name}.yaml"))
    config = json.loads((SHIPPED_ARTIFACT / "config.json").read_text())
    assert {name: config[name] for name in recipe.anee} == recipe.anee
    assert set(config["calibration"]["budgets"]) >= set(recipe.stages.calibration.budgets)  # and where the router begins
    table = ActionTable.of(config["actions"])
    assert all(table.plan(plan, config["text_config"]["num_hidden_layers"]) for plan in config["plans"])


@pytest.fixture(scope="module")
def model():
    smollm2_folder()  # makes the base known by its name
    return AutoModelForCausalLM.from_pretrained(SHIPPED_ARTIFACT, dtype=torch.float32)


@pytest.fixture(scope="module")
def text():
    return AutoTokenizer.from_pretrained(SHIPPED_ARTIFACT), TEXT


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.14, 0.5])
def test_strict_is_never_over(text, budget):
    smollm2_folder()
    strict = AutoModelForCausalLM.from_pretrained(SHIPPED_ARTIFACT, dtype=torch.float32, budget_mode="strict")
    trace = strict(encode_text(*text)[None], energy_budget=budget).execution
    assert float(trace.cost.max()) <= budget + 1e-6


@pytest.mark.slow
def test_perplexity_rises_as_the_budget_falls_and_bridges_earn_their_cost(model, text):
    ids = windows(encode_text(*text), 128)
    base = score(model, ids, 1.0)
    ratios = [ratio(score(model, ids, budget), base)[0] for budget in (0.5, 0.26, 0.18, 0.15, 0.13, 0.11)]
    print("perplexity ratios at 0.5, 0.26, 0.18, 0.15, 0.13, 0.11:", [round(value, 3) for value in ratios])
    assert max(ratios[:3]) < 1.02 and ratios[2:] == sorted(ratios[2:])
    assert ratios[4] < 2.3  # plans without bridges had 18 at 0.14


@pytest.mark.slow
@torch.no_grad()
def test_at_full_budget_it_is_the_base(model, text):
    ids = encode_text(*text)[None]
    base = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    torch.testing.assert_close(model(ids, energy_budget=1.0).logits, base(ids).logits, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@torch.no_grad()  # with gradients weights of 4 bits become numbers again in each call
def test_scoring_is_decoding_with_the_trained_controller(model, text):
    ids = encode_text(*text)[None, :96]
    whole = model(ids, energy_budget=0.14)
    cache, logits, actions = None, [], []
    for token in range(ids.shape[1]):
        output = model(ids[:, token : token + 1], energy_budget=0.14, cache=cache, use_cache=True)
        cache = output.cache
        logits.append(output.logits[0, -1])
        actions.append(output.execution.actions[0, 0])
    same = (torch.stack(actions) == whole.execution.actions[0]).all(dim=1)
    assert float(same.float().mean()) > 0.95  # a near tie of two plans may fall the other way
    apart = (torch.stack(logits) - whole.logits[0]).abs()  # a few rows of 4 bits run in bfloat16, many in exact integers
    assert float(apart.mean()) < 0.15 and float(apart[same].max()) < 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_over_a_base_in_half_precision_it_goes_the_same_ways_and_keeps_its_budgets(model, text, dtype):
    half = AutoModelForCausalLM.from_pretrained(SHIPPED_ARTIFACT, dtype=dtype)
    assert torch.equal(half.controller.plans, model.controller.plans)
    for budget in (0.5, 0.36, 0.3, 0.26):
        assert abs(half(encode_text(*text)[None], energy_budget=budget).execution.mean_cost - budget) < 0.02


@pytest.mark.slow
@torch.no_grad()
def test_without_the_full_weights_it_loses_as_much(model, text):
    smollm2_folder()
    small, ids = AutoModelForCausalLM.from_pretrained(SHIPPED_ARTIFACT, dtype=torch.float32, drop_full=True), encode_text(*text)
    assert torch.equal(small.controller.plans, model.controller.plans)
    for budget in (0.18, 0.14):
        one, other = (score(each, windows(ids, 128), budget) for each in (small, model))
        assert ratio(one, other)[0] == pytest.approx(1.0, abs=0.03) and abs(one.mean_cost - other.mean_cost) < 0.005
    with pytest.raises(ValueError, match="energy_budget=1 is not possible"):
        small(ids[None], energy_budget=1.0)
