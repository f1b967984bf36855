"""Joint projections give what their modules give, and leave the modules' parameters as they are."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from modeling_anee.base_linear import GroupedLinear, JointLinear, is_plain, out_features

from .tiny import FAMILIES, tiny_base, token_ids, wrap


WIDTH = 8
relaxed = settings(deadline=None, derandomize=True, max_examples=60)


def linears(sizes: list[int], bias: bool = True, seed: int = 0) -> nn.ModuleList:
    torch.manual_seed(seed)
    return nn.ModuleList(nn.Linear(WIDTH, size, bias=bias) for size in sizes).requires_grad_(False)


def outputs(modules, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([module(x) for module in modules], dim=-1)


def storages(tensors) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def check(joint: JointLinear, modules, dtype: torch.dtype = torch.float32) -> None:
    """The joint equals the modules as they are now; this runs before their own outputs are computed."""
    x = torch.randn(3, 5, WIDTH, dtype=dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    found = joint(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, outputs(modules, x), **tolerance)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.booleans(), st.data())
@relaxed
def test_any_slice_is_that_of_the_modules(sizes, bias, data):
    modules = linears(sizes, bias)
    start = data.draw(st.integers(0, sum(sizes) - 1))
    stop = data.draw(st.none() | st.integers(start + 1, sum(sizes)))
    x = torch.randn(2, 3, WIDTH)
    expected = outputs(modules, x)[..., start:stop]
    torch.testing.assert_close(JointLinear(list(modules))(x, start, stop), expected)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
@relaxed
def test_any_slice_of_modules_that_run_themselves(sizes, data):
    torch.manual_seed(0)
    modules = [Doubled(WIDTH, size).requires_grad_(False) for size in sizes]
    start = data.draw(st.integers(0, sum(sizes) - 1))
    stop = data.draw(st.none() | st.integers(start + 1, sum(sizes)))
    x = torch.randn(2, 3, WIDTH)
    torch.testing.assert_close(JointLinear(modules)(x, start, stop), outputs(modules, x)[..., start:stop])


def test_only_the_modules_that_are_needed_run():
    called = []
    modules = [Doubled(WIDTH, 4) for _ in range(3)]
    for index, module in enumerate(modules):
        module.register_forward_hook(lambda *_, index=index: called.append(index))
    JointLinear(modules)(torch.randn(1, WIDTH), 4, 12)
    assert called == [1, 2]


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_become_views_of_one_storage_with_the_same_bits(bias):
    modules = linears([6, 3, 3], bias)
    before = {name: value.clone() for name, value in modules.state_dict().items()}
    parameters = dict(modules.named_parameters())
    check(JointLinear(list(modules)), modules)
    after = modules.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert all(dict(modules.named_parameters())[name] is parameter for name, parameter in parameters.items())
    assert len(storages(module.weight for module in modules)) == 1
    joint = modules[0].weight.untyped_storage()
    assert joint.nbytes() == 12 * WIDTH * 4  # and nothing else lies in it
    if bias:
        assert len(storages(module.bias for module in modules)) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_wrapping_and_running_leaves_the_base_bit_identical(family):
    base = tiny_base(family)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    wrap(base)(token_ids(), energy_budget=0.5)
    after = base.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_what_is_joined_is_not_joined_again():
    modules = linears([4, 4])
    check(JointLinear(list(modules)), modules)
    places = [parameter.data_ptr() for parameter in modules.parameters()]
    check(JointLinear(list(modules)), modules)
    assert [parameter.data_ptr() for parameter in modules.parameters()] == places


@pytest.mark.parametrize("modules", [linears([6, 3, 3]), nn.ModuleList([Conv1D(12, WIDTH)])], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_modules_that_were_cast_are_joined_again(modules, dtype):
    modules = copy.deepcopy(modules).requires_grad_(False)
    check(JointLinear(list(modules)), modules)
    for new in (dtype, torch.float32):
        modules.to(new)
        check(JointLinear(list(modules)), modules, new)
        assert len(storages(module.weight for module in modules)) == 1


def test_what_is_written_in_place_is_seen():
    modules = linears([6, 3, 3])
    joint = JointLinear(list(modules))
    modules[2].weight.mul_(3.0)
    modules[2].bias.add_(1.0)
    check(joint, modules)
    modules.load_state_dict(linears([6, 3, 3], seed=1).state_dict())
    check(joint, modules)


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "other class", "own forward", "trained"])
def test_a_module_that_must_run_itself_is_called(kind):
    modules = linears([6, 3, 3])
    if kind == "hook":
        modules[1].register_forward_hook(lambda module, args, output: output + 1)
    elif kind == "pre-hook":
        modules[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    elif kind == "own forward":
        modules[1].forward = lambda x: x[..., :3]
    elif kind == "trained":
        modules[1].weight.requires_grad_(True)
    else:
        modules[1] = Doubled(WIDTH, 3).requires_grad_(False)
    own = storages(modules.parameters())
    assert not is_plain(modules[1])
    check(JointLinear(list(modules)), modules)
    assert storages(modules.parameters()) == own  # nothing was moved
    assert len(own) == 6


def test_a_single_hooked_module_is_called():
    module = Conv1D(12, WIDTH).requires_grad_(False)
    module.register_forward_hook(lambda module, args, output: output * 2)
    check(JointLinear([module]), [module])


def test_modules_that_differ_are_called():
    mixed_bias = nn.ModuleList([*linears([4], bias=True), *linears([4], bias=False)])
    check(JointLinear(list(mixed_bias)), mixed_bias)
    assert len(storages(module.weight for module in mixed_bias)) == 2
    mixed_kind = nn.ModuleList([*linears([4]), Conv1D(4, WIDTH)]).requires_grad_(False)
    check(JointLinear(list(mixed_kind)), mixed_kind)


@pytest.mark.parametrize("slice_", [(0, None), (0, 4), (4, None), (3, 9)])
def test_conv1d(slice_):
    torch.manual_seed(0)
    module = Conv1D(12, WIDTH).requires_grad_(False)
    nn.init.normal_(module.bias)
    weight = module.weight.clone()
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(JointLinear([module])(x, *slice_), module(x)[..., slice(*slice_)])
    assert out_features(module) == 12 and torch.equal(module.weight, weight) and is_plain(module)


def test_weights_that_come_later():
    with torch.device("meta"):
        modules = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(2)).requires_grad_(False)
    assert JointLinear(list(modules))(torch.randn(2, WIDTH, device="meta")).is_meta
    modules.to_empty(device="cpu")
    modules.load_state_dict(linears([4, 4]).state_dict())
    check(JointLinear(list(modules)), modules)
    assert len(storages(module.weight for module in modules)) == 1


def test_joining_in_inference_mode_leaves_ordinary_parameters():
    modules = linears([6, 3, 3])
    with torch.inference_mode():
        joint = JointLinear(list(modules))
    assert not any(parameter.is_inference() for parameter in modules.parameters())
    x = torch.randn(2, WIDTH, requires_grad=True)
    joint(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.cat([module.weight for module in modules]).sum(dim=0).expand(2, -1))


def test_gradients_reach_the_input_in_training():
    modules = linears([6, 3])
    x = torch.randn(2, WIDTH, requires_grad=True)
    (JointLinear(list(modules))(x, 2, 8) ** 2).sum().backward()
    again = x.detach().clone().requires_grad_()
    (outputs(modules, again)[..., 2:8] ** 2).sum().backward()
    torch.testing.assert_close(x.grad, again.grad)


@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from(["linear", "no bias", "conv1d", "runs itself"]), st.data())
@relaxed
def test_any_slice_of_groups_is_that_of_the_module(groups, size, kind, data):
    torch.manual_seed(0)
    if kind == "conv1d":
        module = Conv1D(groups * size, WIDTH)
    else:
        module = (Doubled if kind == "runs itself" else nn.Linear)(WIDTH, groups * size, bias=kind != "no bias")
    grouped = GroupedLinear(module.requires_grad_(False), groups)
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.none() | st.integers(start + 1, size))
    x = torch.randn(2, 3, WIDTH)
    torch.testing.assert_close(grouped(x, start, stop), module(x).unflatten(-1, (groups, size))[..., start:stop])
    needed = 1.0 if kind == "runs itself" else ((size if stop is None else stop) - start) / size
    assert grouped.share(start, stop) == pytest.approx(needed)


@given(st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=4), st.data())
@relaxed
def test_share_counts_whole_modules_where_they_run_themselves(modules, data):
    """Work is counted by output; where one runs itself none can be joined, and each runs whole for any of its outputs."""
    width, together = sum(size for size, _ in modules), not any(runs_itself for _, runs_itself in modules)
    start = data.draw(st.integers(0, width - 1))
    stop = data.draw(st.none() | st.integers(start + 1, width))
    asked, begin, needed = range(width)[start:stop], 0, 0
    for size, _ in modules:
        own = [output for output in range(begin, begin + size) if output in asked]
        needed += len(own) if together else size * bool(own)
        begin += size
    kinds = [(Doubled if runs_itself else nn.Linear)(WIDTH, size).requires_grad_(False) for size, runs_itself in modules]
    assert JointLinear(kinds).share(start, stop) == pytest.approx(needed / width)


def test_gradients_reach_modules_that_are_trained():
    modules = linears([6, 3])
    modules[1].requires_grad_(True)
    JointLinear(list(modules))(torch.randn(2, WIDTH)).sum().backward()
    assert modules[1].weight.grad.abs().sum() > 0 and modules[0].weight.grad is None


def test_a_projection_of_unknown_width_is_refused():
    with pytest.raises(ValueError, match="class Identity.*out_features"):
        JointLinear([nn.Identity()])


def test_two_wrappers_of_one_base_share_its_storage():
    base, ids = tiny_base(), token_ids()
    first, second = wrap(base), wrap(base)
    first(ids)
    before = [parameter.data_ptr() for parameter in base.parameters()]
    expected = second(ids).logits
    torch.testing.assert_close(first(ids).logits, expected)
    assert [parameter.data_ptr() for parameter in base.parameters()] == before
