"""Around transformers: offloaded and half-precision bases."""

import pytest
import torch

from modeling_anee import AneeForCausalLM

from .tiny import FAMILIES, LAYERS, tiny_base, token_ids, wrap


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
