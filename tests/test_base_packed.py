"""Quantised bases: what can't be read is called, costs what it keeps, and is known by its shape. Fakes, and torch's own."""

import copy
import warnings

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from modeling_anee.actions import PROCESS, SKIP_FFN
from modeling_anee.base_linear import JointLinear
from modeling_anee.base_packed import is_ordinary, is_packed, stored_bytes
from modeling_anee.cache import AneeCache
from modeling_anee.compatibility import cache_argument
from modeling_anee.fingerprint import fingerprint, same_base
from modeling_anee.hardware import HARDWARE
from modeling_anee.work import work_of

from .tiny import BRIDGES, tiny_base, token_ids, wrap


GREEDY = {"max_new_tokens": 4, "do_sample": False}
PLANS = {"plans": ["PSFP", "FPSP"], **BRIDGES}


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [out, in] as int8, and the scale [out, 1] of each row."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


class InBuffers(nn.Module):
    """As in GPTQ and AWQ: no weight, but `qweight` and `scales` among the buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None
        for name, value in zip(("qweight", "scales"), rounded(linear.weight.data), strict=True):
            self.register_buffer(name, value)
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.qweight * self.scales, self.bias)


class InItsState(nn.Module):
    """As in HQQ: a packed parameter, and what belongs to it in a dict that only the state shows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = rounded(linear.weight.data)
        self.W_q = nn.Parameter(weight, requires_grad=False)
        self.meta, self.bias = {"scale": scale, "axis": 1}, linear.bias

    def state_dict(self, *args, **kwargs):
        return {"W_q": self.W_q, **self.meta, "bias": self.bias}

    def forward(self, x):
        return nn.functional.linear(x, self.W_q * self.meta["scale"], self.bias)


class Packed(nn.Parameter):
    """A parameter of a class of its own, whose shape is not that of the weight."""


class InAParameter(nn.Linear):
    """As in bitsandbytes: a linear layer whose weight is packed flat."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        weight, scale = rounded(linear.weight.data)
        self.weight, self.bias = Packed(weight.view(torch.uint8).view(-1, 1), requires_grad=False), linear.bias
        self.register_buffer("scale", scale)

    def forward(self, x):
        weight = self.weight.data.view(torch.int8).view(self.out_features, self.in_features)
        return nn.functional.linear(x, weight * self.scale, self.bias)


class Quantised(torch.Tensor):
    """As in torchao and quanto: a tensor that seems to be a float matrix, and is made of an int8 one and scales."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, device=data.device)

    def __init__(self, data, scale):
        self.data_, self.scale = data, scale

    def __tensor_flatten__(self):
        return ["data_", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Quantised(inner["data_"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return Quantised(function(args[0].data_), function(args[0].scale))
        if function in (torch.ops.aten.select.int, torch.ops.aten.cat.default):
            raise NotImplementedError(f"{function} of a quantised tensor")
        plain = tree_map(lambda x: x.data_ * x.scale if isinstance(x, Quantised) else x, (args, kwargs or {}))
        return function(*plain[0], **plain[1])


def in_a_tensor(linear: nn.Linear) -> nn.Linear:
    """The same module with another kind of weight."""
    linear.weight = nn.Parameter(Quantised(*rounded(linear.weight.data)), requires_grad=False)
    return linear


def replaced(base: nn.Module, make) -> nn.Module:
    """A base whose linear maps are quantised, the head as well, but for the tied ones."""
    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, make(child))
    return base


def dynamic(base: nn.Module) -> nn.Module:
    """torch's own; the weights are in an object that is no tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(base, {nn.Linear}, dtype=torch.qint8)


KINDS = {
    "buffers": lambda base: replaced(base, InBuffers),
    "state": lambda base: replaced(base, InItsState),
    "parameter": lambda base: replaced(base, InAParameter),
    "tensor": lambda base: replaced(base, in_a_tensor),
    "dynamic": dynamic,
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_family = pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "opt"])


def linears(base: nn.Module) -> list[nn.Module]:
    return [module for module in base.modules() if is_packed(module)]


@every_kind
@every_family
def test_a_quantised_base_is_run_as_it_runs(family, kind):
    base, ids = KINDS[kind](tiny_base(family)), token_ids()
    assert len(linears(base)) > 12
    model = wrap(base, **PLANS)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, energy_budget=1.0).logits, base(ids).logits)
    assert torch.equal(model.generate(ids, energy_budget=1.0, **GREEDY), base.generate(ids, **GREEDY))
    low = model(ids, energy_budget=0.0)
    assert low.logits.isfinite().all() and low.execution.mean_cost < 1.0
    torch.testing.assert_close(copy.deepcopy(model)(ids, energy_budget=0.0).logits, low.logits)


def test_nothing_rounds_otherwise_where_activations_are_rounded():
    """The last bit of what enters a map that rounds it can decide a whole step of it: logits are the base's, bit by bit."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = LlamaConfig(num_hidden_layers=4, vocab_size=256, initializer_range=0.1, **sizes)
    base, ids = dynamic(AutoModelForCausalLM.from_config(config).eval()), token_ids(1, 56)
    model, logits = wrap(base), []
    for run, cache in ((base, DynamicCache()), (model, AneeCache(model.stack.blocks))):
        with torch.no_grad():
            steps = [run(part, **cache_argument(cache)).logits for part in ids.split([24] + [1] * 32, dim=1)]
        logits.append(torch.cat(steps, dim=1))
    assert torch.equal(*logits)


@every_kind
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_costs_are_the_flops_of_the_weights_and_the_bytes_that_are_kept(family, kind):
    plain, base = wrap(tiny_base(family), cost_unit="flops"), KINDS[kind](tiny_base(family))
    flops = wrap(base, cost_unit="flops").costs
    for action in (PROCESS, SKIP_FFN):
        torch.testing.assert_close(flops.layers[:, action], plain.costs.layers[:, action])
    assert flops.total == plain.costs.total and flops.head == plain.costs.head
    layers = next(module for module in base.modules() if isinstance(module, nn.ModuleList))
    packed = sum(map(stored_bytes, linears(layers)))
    inside = {id(parameter) for linear in linears(layers) for parameter in linear.parameters()}
    others = sum(4 * parameter.numel() for parameter in layers.parameters() if id(parameter) not in inside)
    costs = wrap(base, cost_unit="bytes").costs
    assert float(costs.layers[:, PROCESS].sum()) * costs.total == pytest.approx(packed + others)
    floats = sum(4 * parameter.numel() for parameter in tiny_base(family).get_submodule(name_of(base, layers)).parameters())
    assert packed + others < 0.5 * floats


def name_of(base: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in base.named_modules() if module is part)


@every_kind
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])  # the last two with a head that is the embeddings
def test_it_has_the_fingerprint_of_what_it_was_made_of(family, kind):
    exact, base = fingerprint(tiny_base(family)), KINDS[kind](tiny_base(family))
    assert same_base(exact, fingerprint(base)) and fingerprint(base) == fingerprint(KINDS[kind](tiny_base(family)))
    assert not same_base(exact, fingerprint(KINDS[kind](tiny_base(family, seed=1))))


@every_kind
def test_an_artifact_holds_nothing_of_it_and_its_state_is_not_made(kind, tmp_path, monkeypatch):
    model = wrap(KINDS[kind](tiny_base("qwen2")), base_model_name_or_path="somewhere", **PLANS)
    made = []
    monkeypatch.setattr(type(model.base), "state_dict", lambda *args, **kwargs: made.append(args))
    model.save_pretrained(tmp_path)
    wrap(model.base)
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        assert weights.keys() and not [name for name in weights.keys() if name.startswith("base.")]  # noqa: SIM118
    assert not made


def test_the_state_of_a_trainer_is_saved_without_the_base(tmp_path):
    model = wrap(dynamic(tiny_base()), base_model_name_or_path="somewhere", **PLANS)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        assert all(name.startswith(("bridges.", "controller.")) for name in weights.keys())  # noqa: SIM118


def test_names_to_leave_out_are_those_of_the_state():
    for family in ("llama", "gpt2", "opt"):
        model = wrap(tiny_base(family))
        names = {name for name in model.state_dict() if name.startswith("base.")}
        assert model._keys_to_ignore_on_save == names


@every_kind
def test_projections_are_called_whole_and_never_joined(kind):
    attention = KINDS[kind](tiny_base()).model.layers[0].self_attn
    modules = [attention.q_proj, attention.k_proj, attention.v_proj]
    joint, x = JointLinear(modules), torch.randn(2, 3, 32)
    assert joint.runs_modules and joint.out_features == 64 and joint.share(32) == 0.5
    torch.testing.assert_close(joint(x, 40, 60), torch.cat([module(x) for module in modules], dim=-1)[..., 40:60])


def test_an_adapter_around_a_packed_map_costs_both():
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 8, 4
            self.base_layer, self.down = InBuffers(nn.Linear(8, 4, bias=False)), nn.Linear(8, 2, bias=False)

    module = Adapted()
    assert not is_packed(module) and is_packed(module.base_layer)
    assert work_of([module]).weight_bytes == 8 * 4 + 4 * 4 + 4 * 8 * 2
    assert work_of([module]).flops == 2 * 8 * 4 + 2 * 8 * 2


def test_what_keeps_nothing_has_no_bytes():
    class Hidden(nn.Module):
        in_features = out_features = 8

    assert HARDWARE["flops"].price(work_of([Hidden()])) == 128
    with pytest.raises(ValueError, match="bytes of a Hidden can't be counted.*cost_unit='flops'"):
        HARDWARE["bytes"].price(work_of([Hidden()]))


def test_what_is_ordinary():
    weight = nn.Parameter(torch.randn(2, 3))
    assert is_ordinary(weight) and not is_ordinary(weight.data) and not is_ordinary(None)
    assert not is_ordinary(nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False))
    assert not is_ordinary(nn.Parameter(weight.data.to_sparse()))
    assert not any(is_packed(module) for family in ("llama", "gpt2", "falcon") for module in tiny_base(family).modules())


def test_a_base_that_is_quantised_after_it_was_wrapped_is_followed():
    model, ids = wrap(tiny_base("qwen2"), cost_unit="bytes"), token_ids()
    before = stack_bytes(model)
    replaced(model.base, InBuffers)
    torch.testing.assert_close(model(ids, energy_budget=1.0).logits, model.base(ids).logits)
    assert stack_bytes(model) < 0.5 * before


def stack_bytes(model) -> float:
    return float(model.costs.layers[:, PROCESS].sum()) * model.costs.total
