"""Around transformers: offloaded and half-precision bases, pipelines, chat templates."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from modeling_anee import AneeForCausalLM

from .tiny import FAMILIES, LAYERS, VOCABULARY, tiny_base, token_ids, wrap


WHERE = {  # the list of layers, and everything beside it
    "llama": ("model.layers", ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")),
    "qwen2": ("model.layers", ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")),
    "gpt2": ("transformer.h", ("transformer.wte", "transformer.wpe", "transformer.drop", "transformer.ln_f", "lm_head")),
    "gpt_neox": (
        "gpt_neox.layers",
        ("gpt_neox.embed_in", "gpt_neox.emb_dropout", "gpt_neox.final_layer_norm", "gpt_neox.rotary_emb", "lm_head"),
    ),
}
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_on_disk(family, tmp_path):
    tiny_base(family).save_pretrained(tmp_path / "base")
    model = wrap(AneeForCausalLM.from_base(tmp_path / "base").base, "learned", energy_budget=0.6)
    model.config.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "artifact")
    layers, others = WHERE[family]
    device_map = dict.fromkeys(others, "cpu") | {f"{layers}.{i}": "disk" if i in (1, 2) else "cpu" for i in range(LAYERS)}
    loaded = AneeForCausalLM.from_pretrained(
        tmp_path / "artifact", device_map=device_map, offload_folder=tmp_path / "offload", strict_base=True
    )
    assert any(parameter.is_meta for parameter in loaded.base.parameters())
    ids = token_ids()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert torch.equal(loaded.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
    loaded.save_pretrained(tmp_path / "again")
    again = AneeForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_as_exact_as_the_base(family, dtype):
    exact, ids = tiny_base(family), token_ids()
    base = tiny_base(family).to(dtype)
    expected = exact(ids).logits
    error = (base(ids).logits.float() - expected).abs().max()
    model = wrap(base, "learned")
    output = model(ids, energy_budget=1.0)
    assert output.logits.dtype == dtype
    assert (output.logits.float() - expected).abs().max() <= 2 * error
    low = model(ids, energy_budget=0.6)
    assert low.logits.isfinite().all() and low.execution.mean_cost < 1.0
    assert model.generate(ids, energy_budget=0.6, **GREEDY).shape[1] > ids.shape[1]


@pytest.fixture
def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    wrapped.padding_side = "left"
    return wrapped


def test_text_generation_pipeline_takes_the_budget(tokenizer):
    model = wrap(controller="plan")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["w5 w6 w7", "w9"]
    for budget in (1.0, 0.5):
        found = write(texts, energy_budget=budget, batch_size=2, **GREEDY)
        for text, (answer,) in zip(texts, found, strict=True):
            ids = tokenizer(text, return_tensors="pt").input_ids
            expected = model.generate(ids, energy_budget=budget, **GREEDY)
            decoded = tokenizer.decode(expected[0], skip_special_tokens=True)
            assert answer["generated_text"].replace(" ", "") == decoded.replace(" ", "")
    chat = write([{"role": "user", "content": "w5 w6"}], energy_budget=0.7, **GREEDY)
    assert chat[0]["generated_text"][-1]["role"] == "assistant"
