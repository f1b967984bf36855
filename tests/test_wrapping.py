"""What is no base is refused before anything is done with it, and the message says what to do."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2DoubleHeadsModel,
    GPT2Model,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

from modeling_anee import AneeForCausalLM

from .tiny import CONFIGS, FAMILIES, LAYERS, tiny_base, token_ids, wrap


NO_BASE = {
    "wrapper": (wrap, "AneeForCausalLM can't be wrapped again: wrap its base .model.base."),
    "compiled": (
        lambda: torch.compile(tiny_base(), backend="eager"),
        "OptimizedModule can't be wrapped: wrap .* .base._orig_mod.",
    ),
    "data-parallel": (lambda: nn.DataParallel(tiny_base()), "DataParallel can't be wrapped: wrap .* .base.module."),
    "bare": (lambda: LlamaModel(CONFIGS["llama"]()), "LlamaModel has no language model head: .*AutoModelForCausalLM"),
    "bare gpt2": (lambda: GPT2Model(CONFIGS["gpt2"]()), "GPT2Model has no language model head"),
    "classifier": (lambda: LlamaForSequenceClassification(CONFIGS["llama"]()), "has no language model head"),
    "tagger": (lambda: LlamaForTokenClassification(CONFIGS["llama"]()), "has no language model head"),
    "module": (lambda: nn.Linear(2, 2), "a Linear can't be wrapped: a base is a Hub name, a folder, or a causal LM"),
    "nothing": (lambda: None, "a NoneType can't be wrapped"),
}


@pytest.mark.parametrize(("make", "message"), NO_BASE.values(), ids=NO_BASE)
def test_what_is_no_base_is_refused_with_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        AneeForCausalLM.from_base(make())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_peft_model_says_how_to_merge_and_what_it_says_works():
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted, ids = get_peft_model(tiny_base(), lora).eval(), token_ids()
    expected = adapted(ids).logits
    with pytest.raises(ValueError, match=r"PeftModel.* can't be wrapped: merge .*merge_and_unload.*get_base_model"):
        AneeForCausalLM.from_base(adapted)
    torch.testing.assert_close(AneeForCausalLM.from_base(adapted.get_base_model())(ids).logits, expected)
    torch.testing.assert_close(AneeForCausalLM.from_base(adapted.merge_and_unload())(ids).logits, expected)


def test_a_second_head_does_not_matter():
    base, ids = GPT2DoubleHeadsModel(CONFIGS["gpt2"]()).eval(), token_ids()
    torch.testing.assert_close(AneeForCausalLM.from_base(base)(ids).logits, base(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_deleted_layers_need_a_config_that_knows(family, tmp_path):
    base = tiny_base(family)
    decoder = base.base_model
    layers = decoder.h if family == "gpt2" else decoder.layers
    del layers[1]
    with pytest.raises(ValueError, match=f"has {LAYERS - 1} layers, but its config says num_hidden_layers={LAYERS}"):
        AneeForCausalLM.from_base(base)
    base.config.num_hidden_layers = LAYERS - 1
    if family == "qwen2":
        base.config.layer_types = base.config.layer_types[: LAYERS - 1]
    base.save_pretrained(tmp_path)
    model = AneeForCausalLM.from_base(tmp_path, controller="plan")
    assert model(token_ids()).execution.actions.shape[-1] == LAYERS - 1


def test_an_artifact_points_to_from_pretrained(tmp_path):
    wrap(base_model_name_or_path="no/such-base").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an artifact: load it with AneeForCausalLM.from_pretrained"):
        AneeForCausalLM.from_base(tmp_path)


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_a_checkpoint_without_a_head_is_refused(kind, tmp_path):
    """transformers would give it a random one."""
    config = CONFIGS["llama"]()
    config.tie_word_embeddings = False
    kind(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not one of a whole LlamaForCausalLM: it lacks lm_head.weight"):
        AneeForCausalLM.from_base(tmp_path)


def test_keywords_of_a_base_are_told_apart(tmp_path):
    """Fields of ours, fields of the base's config, arguments of transformers, and what is none of them."""
    tiny_base().save_pretrained(tmp_path)
    model = AneeForCausalLM.from_base(
        tmp_path, min_layers=2, attention_dropout=0.25, use_cache=False, attn_implementation="eager", local_files_only=True
    )
    assert model.config.min_layers == 2 and model.base.config._attn_implementation == "eager"
    assert model.base.config.attention_dropout == model.config.text_config.attention_dropout == 0.25
    assert model.config.use_cache is False
    with pytest.raises(
        ValueError, match="'min_layer' .did you mean 'min_layers'.*: it must be a field of AneeConfig or of the b"
    ):
        AneeForCausalLM.from_base(tmp_path, min_layer=2)
    with pytest.raises(ValueError, match="'atn_implementation' .did you mean 'attn_implementation'"):
        AneeForCausalLM.from_base(tmp_path, atn_implementation="eager", attention_dropout=0.25)
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    with pytest.raises(ValueError, match="'attention_dropout'"):  # there is one already
        AneeForCausalLM.from_base(tmp_path, config=config, attention_dropout=0.25)


def test_keywords_do_not_apply_to_a_model_that_is_loaded():
    base = tiny_base()
    with pytest.raises(ValueError, match="is a model already.*dtype.* do not apply"):
        AneeForCausalLM.from_base(base, dtype="bfloat16")
    with pytest.raises(ValueError, match="is a model already.*trust_remote_code.* do not apply"):
        AneeForCausalLM.from_base(base, trust_remote_code=True)
    with pytest.raises(ValueError, match="'energy_buget' .did you mean 'energy_budget'"):
        AneeForCausalLM.from_base(base, energy_buget=0.5)


def test_a_base_loaded_by_a_relative_path_is_named_by_its_absolute_one(tmp_path, monkeypatch):
    tiny_base().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for base in ("./base", AutoModelForCausalLM.from_pretrained("./base")):
        model = AneeForCausalLM.from_base(base)
        assert model.config.base_model_name_or_path == str(tmp_path / "base")
    model.save_pretrained("artifact")
    assert json.loads((tmp_path / "artifact" / "config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "base")
