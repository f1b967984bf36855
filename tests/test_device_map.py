"""Offloaded bases: accelerate keeps the weights elsewhere, results stay, and what is skipped is not loaded."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, remove_hook_from_submodules
from transformers import AutoModelForCausalLM

from modeling_anee import AneeForCausalLM

from .tiny import BRIDGES, CONFIGS, CONTROLLERS, LAYERS, tiny_base, token_ids, wrap


GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
PLANS = {"controller": "plan", "plans": ["PSFE", "FPSE", "SFPF"], **BRIDGES}


def offload(module: torch.nn.Module, where: str, folder) -> None:
    """Take every weight of a module out of it, to be fetched when its part runs."""
    if where == "cpu":
        cpu_offload(module, execution_device="cpu")
    else:
        disk_offload(module, folder, execution_device="cpu")
    assert all(parameter.is_meta for parameter in module.parameters())


def check_same(model: AneeForCausalLM, expected: AneeForCausalLM) -> None:
    """The same logits at full budget and below, the same tokens and actions in `generate`."""
    ids = token_ids(tokens=6)
    for budget in (1.0, 0.6):
        torch.testing.assert_close(model(ids, energy_budget=budget).logits, expected(ids, energy_budget=budget).logits)
    found, known = (each.generate(ids, energy_budget=0.6, **GREEDY) for each in (model, expected))
    assert torch.equal(found.sequences, known.sequences)
    assert torch.equal(found.execution.actions, known.execution.actions)


@pytest.mark.parametrize("family, where", [*((family, "cpu") for family in CONFIGS), ("llama", "disk"), ("gpt2", "disk")])
def test_a_base_offloaded_after_wrapping(family, where, tmp_path):
    model, ids = wrap(tiny_base(family), **PLANS), token_ids()
    exact = model(ids, energy_budget=1.0).logits
    offload(model.base, where, tmp_path / "offload")
    torch.testing.assert_close(model(ids, energy_budget=1.0).logits, exact)
    other = tiny_base(family)
    offload(other, where, tmp_path / "other")
    check_same(model, wrap(other, **PLANS))  # costs as well: a fused projection now runs whole
    assert all(parameter.is_meta for parameter in model.base.parameters())


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_base_offloaded_before_wrapping(where, tmp_path):
    base = tiny_base()
    offload(base, where, tmp_path / "offload")
    model = wrap(base, **PLANS)
    assert model.device.type == "cpu" and not any(parameter.is_meta for parameter in model.bridges.parameters())
    check_same(model, wrap(**PLANS))


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_the_whole_model_offloaded(controller, tmp_path):
    model, expected = (wrap(controller=controller, **BRIDGES) for _ in range(2))
    offload(model, "disk", tmp_path / "offload")
    check_same(model, expected)


def test_weights_that_come_back_are_joined_again():
    model, expected = wrap(**PLANS), wrap(**PLANS)
    cpu_offload(model.base, execution_device="cpu")
    check_same(model, expected)
    remove_hook_from_submodules(model.base)
    for parameter in model.base.parameters():
        assert not parameter.is_meta
    check_same(model, expected)
    assert not model.stack.blocks[0].qkv.runs_modules


@pytest.fixture
def loads(monkeypatch):
    """Names of the base's modules whose weights were fetched, in order, once `names` is filled."""
    fetched, names = [], {}
    original = AlignDevicesHook.pre_forward

    def counted(hook, module, *args, **kwargs):
        if hook.offload:
            fetched.append(names[module])
        return original(hook, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", counted)
    return fetched, names


def test_what_is_skipped_is_not_loaded(loads, tmp_path):
    fetched, names = loads
    model = wrap(plans=["PSFE"], **BRIDGES, keep_first_tokens=0)
    disk_offload(model.base, tmp_path, execution_device="cpu")
    names.update({module: name for name, module in model.base.named_modules()})
    cache = model(token_ids(), energy_budget=0.0).past_key_values
    layers = [[name.split(".", 3)[3] for name in fetched if name.startswith(f"model.layers.{i}.")] for i in range(LAYERS)]
    attention = [f"self_attn.{part}_proj" for part in "qkvo"]
    ffn = [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert sorted(layers[0]) == sorted([*attention, *ffn, "input_layernorm", "post_attention_layernorm"])
    assert layers[1] == layers[3] == []  # keys and values wait until a token needs them
    assert sorted(layers[2]) == sorted([*attention, "input_layernorm"])
    fetched.clear()
    model(token_ids(tokens=1), past_key_values=cache, energy_budget=1.0)
    late = [name for name in fetched if name.startswith("model.layers.1.")]
    assert late.count("model.layers.1.self_attn.k_proj") == 2  # for the tokens that wait, and for the new one
    assert late.count("model.layers.1.self_attn.q_proj") == late.count("model.layers.1.mlp.down_proj") == 1


@pytest.fixture
def folders(tmp_path):
    """A base, an artifact over it, and the model that was saved."""
    tiny_base().save_pretrained(tmp_path / "base")
    model = wrap(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), base_model_name_or_path=str(tmp_path / "base"), **PLANS
    )
    model.save_pretrained(tmp_path / "artifact")
    return tmp_path / "base", tmp_path / "artifact", model


@pytest.mark.parametrize("device_map", ["auto", "cpu", "sequential", {"": "cpu"}])
def test_device_maps_of_one_device(folders, device_map):
    base, artifact, expected = folders
    loaded = AutoModelForCausalLM.from_pretrained(artifact, trust_remote_code=True, device_map=device_map)
    check_same(loaded, expected)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    plain = AneeForCausalLM.from_base(base, device_map=device_map)
    torch.testing.assert_close(plain(token_ids()).logits, expected(token_ids(), energy_budget=1.0).logits)


def test_what_does_not_fit_goes_to_disk(folders, tmp_path):
    _, artifact, expected = folders
    size = sum(parameter.numel() * parameter.element_size() for parameter in expected.base.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(
        artifact,
        trust_remote_code=True,
        device_map="auto",
        max_memory={"cpu": size // 2},
        offload_folder=tmp_path / "offload",
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert not any(parameter.is_meta for parameter in (*loaded.bridges.parameters(), *loaded.controller.parameters()))
    check_same(loaded, expected)


def test_all_of_the_base_on_disk(folders, tmp_path):
    _, artifact, expected = folders
    loaded = AneeForCausalLM.from_pretrained(artifact, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    assert all(parameter.is_meta for parameter in loaded.base.parameters()) and loaded.device.type == "cpu"
    check_same(loaded, expected)


def test_layers_on_several_accelerators_are_refused():
    base = tiny_base()
    base.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cuda:0", "model.layers.2": "disk", "lm_head": 1}
    with pytest.raises(ValueError, match="device_map spreads the base over the devices 0, 1"):
        wrap(base)
    base.hf_device_map["lm_head"] = "cpu"
    wrap(base)
