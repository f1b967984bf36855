"""Around transformers: offloaded and half-precision bases."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modeling_anee import AneeForCausalLM
from modeling_anee import base_kernels as kernels
from modeling_anee.base_attention import scaled_dot_product
from modeling_anee.cache import AneeCache
from modeling_anee.compatibility import cache_argument

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


half_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@half_precision
def test_attention_rounds_in_half_precision_as_the_bases_does(dtype):
    """Nine query heads on three of keys and values, as in SmolLM2-135M; what else would do differs in a few numbers only."""
    torch.manual_seed(0)
    attention = type("Attention", (torch.nn.Module,), {"num_key_value_groups": 3, "is_causal": True})().eval()
    for cached in range(32, 200):
        queries, keys, values = (3 * torch.randn(1, heads, 256, 64) for heads in (9, 3, 3))
        queries, keys, values = queries[:, :, :1].to(dtype), keys.to(dtype)[:, :, :cached], values.to(dtype)[:, :, :cached]
        expected, _ = sdpa_attention_forward(attention, queries, keys, values, None, scaling=0.125)
        assert torch.equal(scaled_dot_product(queries, keys, values, None, scaling=0.125), expected)


@half_precision
def test_half_precision_at_full_budget_is_the_base_bit_by_bit(dtype):
    """Prompt and steps, on a base wide enough for the kernels of real ones."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = LlamaConfig(num_hidden_layers=4, vocab_size=256, initializer_range=0.1, **sizes)
    base, ids = AutoModelForCausalLM.from_config(config).eval().to(dtype), token_ids(1, 72)
    model, logits = wrap(base), []
    for run, cache in ((base, DynamicCache()), (model, AneeCache(model.stack.blocks))):
        with torch.no_grad():
            steps = [run(part, **cache_argument(cache)).logits for part in ids.split([40] + [1] * 32, dim=1)]
        logits.append(torch.cat(steps, dim=1))
    assert torch.equal(*logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_is_honoured_by_every_kernel(family, monkeypatch):
    """Short inputs too, for which there are kernels that know nothing of it."""
    monkeypatch.setattr(kernels, "WIDE", 1)
    base, ids = tiny_base(family), token_ids()
    model = wrap(base)
    exact = model(ids, energy_budget=1.0).logits
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = base(ids).logits
        for budget in (1.0, 0.5):
            assert model(ids, energy_budget=budget).logits.dtype == expected.dtype == torch.bfloat16
        error = (expected - exact).abs().max()
        assert (model(ids, energy_budget=1.0).logits - exact).abs().max() <= 2 * error
    assert model(ids, energy_budget=1.0).logits.dtype == torch.float32
