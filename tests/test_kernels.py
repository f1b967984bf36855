"""Kernels chosen by shape give what torch's ordinary ones give."""

import pytest
import torch
import torch.nn.functional as F

from modeling_anee import kernels
from modeling_anee.kernels import FEW_TOKENS, WIDE, linear


@pytest.fixture
def onednn_calls(monkeypatch):
    if kernels._onednn_linear is None:
        pytest.skip("this build of torch has no oneDNN")
    calls = []

    def counted(*args):
        calls.append(args)
        return original(*args)

    original = kernels._onednn_linear
    monkeypatch.setattr(kernels, "_onednn_linear", counted)
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, FEW_TOKENS), (2, 40), ()])
@pytest.mark.parametrize("outputs", [WIDE - 1, WIDE, WIDE + 3])
def test_linear_is_f_linear(outputs, shape, bias, onednn_calls):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 48), torch.randn(outputs, 48)
    bias = torch.randn(outputs) if bias else None
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-4, rtol=1e-5)
    tokens = x.numel() // 48
    assert bool(onednn_calls) == (outputs >= WIDE and tokens <= FEW_TOKENS)


def test_slices_of_a_weight_and_strided_inputs():
    weight, x = torch.randn(WIDE + 100, 32), torch.randn(2, 5, 64)[..., ::2]
    torch.testing.assert_close(linear(x, weight[50:], None), F.linear(x, weight[50:]), atol=1e-4, rtol=1e-5)


def test_other_dtypes_layouts_and_gradients_take_the_ordinary_kernel(onednn_calls):
    weight = torch.randn(WIDE, 32)
    linear(torch.randn(1, 32).bfloat16(), weight.bfloat16(), None)
    linear(torch.randn(1, 32), torch.randn(32, WIDE).t(), None)
    x = torch.randn(1, 32, requires_grad=True)
    linear(x, weight, None).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(dim=0, keepdim=True), atol=1e-3, rtol=1e-4)
    assert not onednn_calls
    with torch.no_grad():
        linear(x, weight, None)
    assert len(onednn_calls) == 1


def test_torch_builds_without_onednn_work(monkeypatch):
    monkeypatch.setattr(kernels, "_onednn_linear", None)
    x, weight = torch.randn(1, 32), torch.randn(WIDE, 32)
    assert torch.equal(linear(x, weight, None), F.linear(x, weight))
