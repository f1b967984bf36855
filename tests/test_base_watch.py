"""A base that is changed after it was wrapped is followed, or refused by name; what it was given before counts too."""

import types

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from modeling_anee import AneeForCausalLM
from modeling_anee.base_watch import foreign_code
from modeling_anee.evaluation import rollout

from .tiny import BRIDGES, CONFIGS, LAYERS, VOCABULARY, tiny_base, token_ids, wrap


GREEDY = {"max_new_tokens": 4, "do_sample": False}


def check_follows(model: AneeForCausalLM, base: nn.Module, **tolerance) -> None:
    """At 1.0 the wrapper gives what the base gives now, in scoring and decoding; below it still runs."""
    ids = token_ids(tokens=8)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, energy_budget=1.0).logits, base(ids).logits, **tolerance)
    assert torch.equal(model.generate(ids, energy_budget=1.0, **GREEDY), base.generate(ids, **GREEDY))
    assert model(ids, energy_budget=0.5).logits.isfinite().all()


def layer_of(base: nn.Module, index: int = 1) -> nn.Module:
    """A decoder layer of any family."""
    return next(module for name, module in base.named_modules() if name.endswith(f".{index}") and len(name.split(".")) == 3)


def rest_of(linear: nn.Linear) -> nn.Linear:
    """Another linear map of the same shape."""
    other = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    other.weight.data.mul_(8.0)
    return other


class Halved(nn.Module):
    """Somebody's feed-forward or norm: half of another's output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 0.5 * self.inner(x)


def replaced_weight(base):
    layer_of(base).self_attn.k_proj.weight = nn.Parameter(torch.randn(16, 32), requires_grad=False)


def replaced_bias(base):
    layer_of(base).self_attn.q_proj.bias = nn.Parameter(torch.randn(32), requires_grad=False)


def replaced_data(base):
    layer_of(base).mlp.gate_proj.weight.data = torch.randn(48, 32)


def written_in_place(base):
    layer_of(base).mlp.up_proj.weight.data.mul_(3.0)


def assigned_state(base):
    base.load_state_dict(tiny_base("qwen2", seed=1).state_dict(), assign=True)


def unfrozen(base):
    base.requires_grad_(True)


def swapped_projection(base):
    layer_of(base).self_attn.v_proj = rest_of(layer_of(base).self_attn.v_proj)


def swapped_output(base):
    layer_of(base).self_attn.o_proj = rest_of(layer_of(base).self_attn.o_proj)


def swapped_feed_forward(base):
    layer_of(base).mlp = Halved(layer_of(base).mlp)


def swapped_norm(base):
    layer_of(base).input_layernorm = Halved(layer_of(base).input_layernorm)


def swapped_layers(base):
    base.model.layers[0], base.model.layers[2] = base.model.layers[2], base.model.layers[0]
    for index, layer in enumerate(base.model.layers):
        layer.self_attn.layer_idx = index


def swapped_decoder(base):
    base.set_decoder(tiny_base("qwen2", seed=1).model)


def swapped_embeddings(base):
    base.set_input_embeddings(nn.Embedding.from_pretrained(torch.randn(VOCABULARY, 32)))


def swapped_head(base):
    base.set_output_embeddings(rest_of(base.lm_head))


def replaced_head(base):
    base.lm_head = nn.Sequential(nn.Linear(32, VOCABULARY), Halved(nn.Identity()))


def resized(base):
    base.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)


def hooked(name):
    def change(base):
        base.get_submodule(name).register_forward_hook(lambda module, args, output: output * 1.5)

    change.__name__ = f"hook-{name.rsplit('.', 1)[-1]}"
    return change


def hooked_before(base):
    layer_of(base).post_attention_layernorm.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def own_forward(base):
    mlp = layer_of(base).mlp
    mlp.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), mlp)


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


def hooked_by_accelerate(base):
    for part in ("self_attn.k_proj", "mlp.up_proj", "input_layernorm"):
        add_hook_to_module(layer_of(base).get_submodule(part), Doubling())


def config_field(base):
    base.config.use_cache = False


def eager(base):
    base.set_attn_implementation("eager")


CHANGES = [
    replaced_weight,
    replaced_bias,
    replaced_data,
    written_in_place,
    assigned_state,
    unfrozen,
    swapped_projection,
    swapped_output,
    swapped_feed_forward,
    swapped_norm,
    swapped_layers,
    swapped_decoder,
    swapped_embeddings,
    swapped_head,
    replaced_head,
    resized,
    *(hooked(f"model.layers.1.self_attn.{name}_proj") for name in "qo"),
    *(hooked(f"model.layers.1.mlp{name}") for name in ("", ".gate_proj", ".down_proj", ".act_fn")),
    *(hooked(name) for name in ("model.layers.1.input_layernorm", "model.norm", "model.embed_tokens", "lm_head")),
    hooked_before,
    own_forward,
    hooked_by_accelerate,
    config_field,
    eager,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_base_is_followed(change):
    """Before it is wrapped, after it was, and after a first use."""
    base = tiny_base("qwen2")
    late, used = wrap(base, **BRIDGES), wrap(base, **BRIDGES)
    used(token_ids())
    change(base)
    early = wrap(base, **BRIDGES)
    for model in (early, late, used):
        check_follows(model, base)
    assert torch.equal(early.costs.layers, used.costs.layers) and early.executor.costs is early.costs
    for hooks in (m._forward_hooks for m in base.modules()):
        hooks.clear()
    check_follows(used, base)  # and back


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_base_that_is_cast_alone_is_followed(dtype):
    base = tiny_base()
    model = wrap(base)
    check_follows(model, base)
    base.to(dtype)
    check_follows(model, base)
    projections = layer_of(base).self_attn
    storages = {getattr(projections, f"{name}_proj").weight.untyped_storage().data_ptr() for name in "qkv"}
    assert model(token_ids()).logits.dtype == dtype and len(storages) == 1  # joined again


def test_a_decision_is_made_with_the_costs_of_the_base_as_it_is():
    model = wrap(plans=["PSFE", "FPSE"], cost_unit="bytes")
    before = model.costs.layers.clone()
    layer_of(model.base).mlp = nn.Linear(32, 32)
    trace = model(token_ids(), energy_budget=0.0).execution
    assert not torch.equal(model.costs.layers, before)
    expected = model.costs.of_plans(trace.actions).float()
    torch.testing.assert_close(trace.cost, expected)


@pytest.mark.parametrize("kinds", [("eager", "sdpa"), ("sdpa", "eager")])
@pytest.mark.parametrize("on", ["wrapper", "dict", "base", "config"])
def test_another_attention_implementation(kinds, on, said):
    base = tiny_base("qwen2", kinds[0])
    model = wrap(base)
    model(token_ids())
    if on == "config":
        base.config._attn_implementation = kinds[1]
    elif on == "dict":
        model.set_attn_implementation({"text_config": kinds[1]})
    else:
        (model if on == "wrapper" else base).set_attn_implementation(kinds[1])
    ids = token_ids(1, 8)
    whole = model(ids, energy_budget=1.0).logits
    torch.testing.assert_close(whole, tiny_base("qwen2", kinds[1])(ids).logits)
    torch.testing.assert_close(model(ids[:, :5], energy_budget=1.0).logits, whole[:, :5])  # causal
    assert model.config._attn_implementation == base.config._attn_implementation == kinds[1]
    assert not said
    check_follows(model, base)


def test_an_attention_implementation_that_is_not_ours_is_refused_and_the_old_one_kept():
    base = tiny_base("gemma2")
    model = wrap(base)
    for kind in ("flex_attention", "paged|eager"):
        with pytest.raises((ValueError, ImportError)):
            model.set_attn_implementation(kind)
        assert base.config._attn_implementation == model.config._attn_implementation == "eager"
        check_follows(model, base)
    base.config._attn_implementation = "flex_attention"  # past every check
    for _ in range(2):
        with pytest.raises(ValueError, match="attn_implementation='flex_attention' is not supported"):
            model(token_ids())
    base.config._attn_implementation = "eager"
    check_follows(model, base)


def test_embeddings_and_head_are_set_through_the_wrapper():
    base = tiny_base()
    model = wrap(base)
    model.set_input_embeddings(nn.Embedding.from_pretrained(torch.randn(VOCABULARY, 32)))
    model.set_output_embeddings(rest_of(base.lm_head))
    assert model.get_input_embeddings() is base.model.embed_tokens and model.get_output_embeddings() is base.lm_head
    check_follows(model, base)


# Paths of modules that never run: their parts do, or nothing of them is needed.
BYPASSED = {
    "llama": ("", "model", "model.layers", "model.layers.2", "model.layers.2.self_attn"),
    "gpt2": ("", "transformer", "transformer.drop", "transformer.h.1", "transformer.h.1.attn.attn_dropout"),
}


def put_hook(module):
    return module.register_forward_hook(lambda module, args, output: output).remove


def put_pre_hook(module):
    return module.register_forward_pre_hook(lambda module, args: None).remove


def put_forward(module):
    module.forward = types.MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), module)
    return lambda: vars(module).pop("forward")


def put_accelerate_hook(module):
    add_hook_to_module(module, ModelHook())
    return lambda: remove_hook_from_module(module)


PUTS = {
    put_hook: "a hook",
    put_pre_hook: "a hook",
    put_forward: "a forward of its own",
    put_accelerate_hook: "accelerate's ModelHook",
}


@pytest.mark.parametrize("put", PUTS, ids=lambda put: put.__name__)
@pytest.mark.parametrize("family, path", [(family, path) for family in BYPASSED for path in BYPASSED[family]])
def test_code_on_a_module_that_never_runs_is_refused_by_name(family, path, put):
    base = tiny_base(family)
    model = wrap(base)
    take_off = put(base.get_submodule(path))
    what = PUTS[put]
    with pytest.raises(ValueError, match=f"the base has {what} at '{path or 'its top'}'.*take it off"):
        wrap(base)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"the base has {what} at"):
            model(token_ids())
    take_off()
    check_follows(model, base)


def test_layers_that_are_loaded_as_a_whole_are_refused():
    base = tiny_base()
    cpu_offload(base, execution_device="cpu", preload_module_classes=["LlamaDecoderLayer"])
    with pytest.raises(ValueError, match="accelerate's AlignDevicesHook at 'model.layers.0'"):
        wrap(base)


def test_a_refused_base_is_left_as_it_was():
    base = tiny_base().train()
    base.model.norm.weight.requires_grad_(False)
    base.config._name_or_path = "somewhere"
    before = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    put_hook(base.model.layers[0])
    with pytest.raises(ValueError, match="a hook at"):
        wrap(base)
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == before
    assert base.training and base.config._name_or_path == "somewhere"


def test_classes_of_others_are_refused_where_they_would_not_run():
    base = tiny_base()
    model = wrap(base)
    kind = type(base.model.layers[1].self_attn)
    own = type("OwnAttention", (kind,), {"__module__": __name__, "forward": lambda self, *args, **kwargs: None})
    base.model.layers[1].self_attn.__class__ = type("SameAttention", (kind,), {"__module__": __name__})
    check_follows(wrap(base), base)  # it runs what its library wrote
    base.model.layers[1].self_attn = own(base.config, 1)
    for call in (lambda: wrap(base), lambda: model(token_ids())):
        with pytest.raises(ValueError, match="the class OwnAttention.*at 'model.layers.1.self_attn'"):
            call()


def test_the_hooks_by_which_transformers_captures_outputs_do_no_harm():
    base, ids = tiny_base(), token_ids()
    model = wrap(base)
    base(ids, output_hidden_states=True, output_attentions=False)
    assert any(module._forward_hooks for module in base.model.layers)
    for each in (model, wrap(base)):
        check_follows(each, base)
    put_hook(base.model.layers[0])  # one more than these
    with pytest.raises(ValueError, match="a hook at 'model.layers.0'"):
        model(ids)


def test_another_number_of_layers_is_refused():
    base = tiny_base()
    model = wrap(base)
    base.model.layers = base.model.layers[:-1]
    with pytest.raises(ValueError, match=f"the base has {LAYERS - 1} layers, and had {LAYERS} when it was wrapped"):
        model(token_ids())


def test_another_base_is_attached_not_assigned():
    model, other = wrap(), tiny_base(seed=1)
    model.base = other
    with pytest.raises(ValueError, match="attach_base"):
        model(token_ids())
    model.attach_base(other)
    check_follows(model, other)


def test_nothing_is_taken_apart_again_where_nothing_changed(monkeypatch):
    model, ids = wrap(controller="learned"), token_ids()
    prepared = []
    monkeypatch.setattr(type(model.stack), "prepare", lambda stack: prepared.append(stack))
    with torch.inference_mode():
        model(ids, energy_budget=0.5)
    model.generate(ids, energy_budget=0.5, num_beams=2, **GREEDY)
    model.train()(ids, labels=ids, energy_budget=0.5).loss.backward()
    model.eval()(ids, output_hidden_states=True)
    assert not prepared
    model.base.model.norm.weight.requires_grad_(True)
    model(ids)
    assert prepared == [model.stack]


def test_a_change_between_two_steps_counts_for_what_waits_in_the_cache():
    model, ids, more = wrap(plans=["PSSP"], keep_first_tokens=0), token_ids(), token_ids(2, 1, seed=7)
    late, early = (model(ids, energy_budget=0.0).past_key_values for _ in range(2))
    model(more, past_key_values=early, energy_budget=1.0)
    layer_of(model.base).self_attn.v_proj.weight = nn.Parameter(torch.randn(16, 32), requires_grad=False)
    model(more, past_key_values=late, energy_budget=1.0)
    assert not torch.allclose(late.layers[1].values[:, :, :-1], early.layers[1].values[:, :, :-1])


def test_a_base_prepared_in_inference_mode_can_be_trained_through():
    model, ids = wrap(plans=["PSSP"], **BRIDGES), token_ids()
    model.base.to(torch.float64).to(torch.float32)
    with torch.inference_mode():
        model(ids, energy_budget=0.0)
    model.train()(ids, energy_budget=0.0, labels=ids).loss.backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.bridges.parameters())


def test_weights_that_are_trained_get_the_gradients_that_they_get_in_the_base():
    gradients, ids = [], token_ids()
    for run in (tiny_base(), wrap()):
        run.requires_grad_(True)
        run(ids, labels=ids).loss.backward()
        gradients.append({name.removeprefix("base."): p.grad for name, p in run.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("family", CONFIGS)
def test_no_family_has_code_that_would_be_missed(family):
    assert not any(foreign_code(module) for module in tiny_base(family).modules())


@torch.no_grad()
def test_rollouts_see_a_weight_that_was_replaced():
    model, ids = wrap(tiny_base()), token_ids(1, 5)
    before = rollout.run(model, ids)
    layer = model.base.model.layers[1]
    layer.mlp.down_proj.weight = torch.nn.Parameter(-layer.mlp.down_proj.weight, requires_grad=False)
    after = rollout.run(model, ids)
    assert float((after - before).abs().max()) > 1e-2
    torch.testing.assert_close(model.stack.final_norm(after), model.base.model(ids).last_hidden_state, atol=1e-5, rtol=1e-4)
