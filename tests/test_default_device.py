"""Whatever the default device: bookkeeping stays on the CPU, everything else where the base is.

There is no accelerator here: the meta device stands in for one, since what is wrongly made there can't be read.
"""

import ast
from pathlib import Path

import pytest
import torch

import modeling_anee
from modeling_anee import AneeConfig, AneeForCausalLM

from .tiny import BRIDGES, CONTROLLERS, tiny_base, token_ids, wrap


FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "scalar_tensor", "tensor", "zeros")
GENERATE = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}


def padded() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :3] = 0
    return {"input_ids": token_ids(), "attention_mask": mask}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_a_forward_and_generate_under_another_default_device(controller, strict):
    mode = {"budget_mode": "strict"} if strict else {}
    model, inputs, budget = wrap(tiny_base(), controller, **mode, **BRIDGES), padded(), torch.tensor([0.6, 0.8])
    feedback = {} if strict else {"budget_feedback": 0.5}
    expected = model(**inputs, energy_budget=budget)
    tokens = model.generate(**inputs, energy_budget=0.6, prompt_energy_budget=0.8, **feedback, **GENERATE)
    with torch.device("meta"):
        found = model(**inputs, energy_budget=budget)
        again = model.generate(**inputs, energy_budget=0.6, prompt_energy_budget=0.8, **feedback, **GENERATE)
    torch.testing.assert_close(found.logits, expected.logits)
    assert torch.equal(again.sequences, tokens.sequences)
    assert torch.equal(again.execution.actions, tokens.execution.actions)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_a_model_is_built_on_the_meta_device(controller):
    config = AneeConfig(text_config=tiny_base().config.to_dict(), controller=controller, **BRIDGES)
    with torch.device("meta"):
        model = AneeForCausalLM(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.device.type == "meta" and model.controller.floor > 0


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_what_leaves_the_meta_device_is_initialised(controller):
    config = AneeConfig(text_config=tiny_base().config.to_dict(), controller=controller, energy_budget=0.6, **BRIDGES)
    with torch.device("meta"):
        model = AneeForCausalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 99)
    model.init_weights()
    expected = dict(AneeForCausalLM(config).named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    torch.testing.assert_close(model(token_ids(), energy_budget=1.0).logits, model.base(token_ids()).logits)
    changed = [name for name, parameter in model.named_parameters() if name.endswith("up.weight") and parameter.any()]
    assert model(token_ids()).logits.isfinite().all() and not changed


def test_every_tensor_of_the_shipped_code_names_its_device():
    """What has none would follow the default; what a module registers may, as its parameters do."""
    missing = []
    for path in Path(modeling_anee.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        registered = {
            id(argument)
            for call in calls
            if isinstance(call.func, ast.Attribute) and call.func.attr == "register_buffer"
            for argument in call.args
        }
        for call in calls:
            named = isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "torch"
            if named and call.func.attr in FACTORIES and id(call) not in registered:
                if not any(keyword.arg == "device" for keyword in call.keywords):
                    missing.append(f"{path.name}:{call.lineno}")
    assert not missing
