"""PEFT: adapters in the base count, whenever and on whatever they are put; they are trained and saved with PEFT."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors import safe_open
from torch import nn

from modeling_anee import AneeForCausalLM

from .tiny import BRIDGES, tiny_base, token_ids, wrap


GREEDY = {"max_new_tokens": 4, "do_sample": False}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
# PEFT asks transformers for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def lora(family: str = "llama", **fields) -> LoraConfig:
    fan = {"fan_in_fan_out": family == "gpt2"}
    return LoraConfig(r=4, target_modules=TARGETS[family], init_lora_weights=False, **fan, **fields)


def check_follows(model: nn.Module, base: nn.Module, other_than: torch.Tensor) -> None:
    """At 1.0 the wrapper gives what the base gives with its adapters."""
    ids = token_ids()
    with torch.no_grad():
        expected, found = base(input_ids=ids).logits, model(input_ids=ids, energy_budget=1.0).logits
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, other_than, atol=0.1)
    tokens = [run.generate(input_ids=ids, **GREEDY, **budget) for run, budget in ((model, {"energy_budget": 1.0}), (base, {}))]
    assert torch.equal(*tokens)


def plain_logits(family: str) -> torch.Tensor:
    with torch.no_grad():
        return tiny_base(family)(token_ids()).logits


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("family", TARGETS)
def test_adapters_under_the_wrapper(family, merged):
    adapted = get_peft_model(tiny_base(family), lora(family))
    base = adapted.merge_and_unload() if merged else adapted.get_base_model()
    check_follows(wrap(base, **BRIDGES), base, plain_logits(family))


@contextlib.contextmanager
def peft_is_new_enough() -> Iterator[None]:
    """A release of transformers may want a PEFT for its own methods that is not out yet."""
    try:
        yield
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))


def on_the_wrapper(model):
    return get_peft_model(model, lora(task_type="CAUSAL_LM"))


def on_the_wrapper_by_transformers(model):
    with peft_is_new_enough():
        model.add_adapter(lora())
    return model


def in_the_base(model):
    inject_adapter_in_model(lora(), model.base)
    return model


def in_the_base_by_transformers(model):
    with peft_is_new_enough():
        model.base.add_adapter(lora())
    return model


@pytest.mark.parametrize(
    "put",
    [on_the_wrapper, on_the_wrapper_by_transformers, in_the_base, in_the_base_by_transformers],
    ids=lambda put: put.__name__,
)
def test_adapters_that_come_later(put):
    model = wrap()
    model(token_ids())
    check_follows(put(model), model.base, plain_logits("llama"))
    model.train()(token_ids(), labels=token_ids(), energy_budget=0.8).loss.backward()
    adapters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    others = [parameter.grad for name, parameter in model.base.named_parameters() if "lora_" not in name]
    assert len(adapters) == 24 and all(parameter.grad.abs().sum() > 0 for parameter in adapters.values())
    assert others == [None] * len(others)


def test_adapters_switched_off_taken_out_and_merged():
    model, ids = wrap(), token_ids()
    adapted = on_the_wrapper(model)
    with_adapters = adapted(input_ids=ids, energy_budget=1.0).logits.detach()
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(input_ids=ids, energy_budget=1.0).logits, plain_logits("llama"))
    merged = adapted.merge_and_unload()
    assert isinstance(merged, AneeForCausalLM)
    torch.testing.assert_close(merged(ids, energy_budget=1.0).logits, with_adapters)
    other = wrap()
    on_the_wrapper(other).unload()
    torch.testing.assert_close(other(ids, energy_budget=1.0).logits, plain_logits("llama"))


def test_adapters_are_saved_with_peft_and_an_artifact_has_none(tmp_path, said):
    model, ids = wrap(base_model_name_or_path="somewhere"), token_ids()
    adapted = on_the_wrapper(model)
    expected = adapted(input_ids=ids, energy_budget=1.0).logits
    adapted.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "artifact")  # nothing has been run since they were put there
    with safe_open(tmp_path / "artifact" / "model.safetensors", "pt") as weights:
        assert not [name for name in weights.keys() if name.startswith("base.")]  # noqa: SIM118
    assert any("an artifact holds nothing of it" in message for message in said)
    again = PeftModel.from_pretrained(wrap(), tmp_path / "adapter")
    torch.testing.assert_close(again(input_ids=ids, energy_budget=1.0).logits, expected)


def test_no_adapter_is_trained_that_was_there_before_wrapping():
    base = get_peft_model(tiny_base(), lora()).get_base_model()
    model = wrap(base, **BRIDGES)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert any(parameter.requires_grad for parameter in model.bridges.parameters())
