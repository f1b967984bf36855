"""Kernels chosen by measuring give what torch's ordinary ones give, and what was measured is kept."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from modeling_anee import base_kernels as kernels
from modeling_anee.base_kernels import FEW_TOKENS, LARGEST, ONEDNN, ROWS, TORCH, WIDE, KernelTable, LinearKernel, machine, span


needs_onednn = pytest.mark.skipif(kernels._onednn_linear is None, reason="this build of torch has no oneDNN")


@pytest.fixture
def onednn_calls(monkeypatch):
    calls, original = [], kernels._onednn_linear

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(kernels, "_onednn_linear", counted)
    return calls


@pytest.fixture
def measured(monkeypatch):
    """Kernels are measured, and oneDNN's is found to be faster for 4 to 16 rows."""
    shapes = []

    def measure(outputs, inputs):
        shapes.append((outputs, inputs))
        return [TORCH, ONEDNN, ONEDNN, ONEDNN, TORCH, TORCH]

    monkeypatch.delenv(kernels.KERNELS_VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "measure", measure)
    return shapes


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, FEW_TOKENS), (2, 40), ()])
@pytest.mark.parametrize("outputs", [WIDE - 1, WIDE, WIDE + 3])
def test_unmeasured_wide_maps_of_few_rows_take_onednn(outputs, shape, bias, onednn_calls):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 48), torch.randn(outputs, 48)
    bias = torch.randn(outputs) if bias else None
    torch.testing.assert_close(LinearKernel(weight, bias)(x), F.linear(x, weight, bias), atol=1e-4, rtol=1e-5)
    assert bool(onednn_calls) == (outputs >= WIDE and x.numel() // 48 <= FEW_TOKENS)


@needs_onednn
def test_each_number_of_rows_takes_what_was_faster(measured, onednn_calls, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "machine_table", lambda: KernelTable(tmp_path / "table.json"))
    kernel = LinearKernel(torch.randn(512, 256), None)
    assert measured == [(512, 256)]
    for rows in (1, 2, 4, 5, 16, 17, 64, 600):
        onednn_calls.clear()
        x = torch.randn(1, rows, 256)
        torch.testing.assert_close(kernel(x), F.linear(x, kernel.weight), atol=1e-3, rtol=1e-4)
        assert bool(onednn_calls) == (2 <= rows <= 16)


@needs_onednn
def test_other_dtypes_layouts_gradients_and_autocast_take_the_ordinary_kernel(onednn_calls):
    weight = torch.randn(WIDE, 32)
    LinearKernel(weight.bfloat16(), None)(torch.randn(1, 32).bfloat16())
    LinearKernel(torch.randn(32, WIDE).t(), None)(torch.randn(1, 32))
    x = torch.randn(1, 32, requires_grad=True)
    LinearKernel(weight, None)(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(dim=0, keepdim=True), atol=1e-3, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert LinearKernel(weight, None)(torch.randn(1, 32)).dtype == torch.bfloat16
    assert not onednn_calls
    with torch.no_grad():
        LinearKernel(weight, None)(x)
    assert len(onednn_calls) == 1


def test_torch_builds_without_onednn_work(monkeypatch):
    monkeypatch.setattr(kernels, "_onednn_linear", None)
    x, weight = torch.randn(1, 32), torch.randn(WIDE, 32)
    assert torch.equal(LinearKernel(weight, None)(x), F.linear(x, weight))


@given(st.lists(st.sampled_from([TORCH, ONEDNN]), min_size=len(ROWS), max_size=len(ROWS)))
def test_a_span_holds_only_rows_for_which_onednn_was_faster(fastest):
    low, high = span(fastest)
    assert (low <= high) == (ONEDNN in fastest)
    for rows, kernel in zip(ROWS, fastest, strict=True):
        assert kernel == ONEDNN or not low <= rows <= high
    assert high == LARGEST or high in ROWS or high == 0


@needs_onednn
def test_a_measurement_names_a_kernel_for_every_number_of_rows():
    assert set(kernels.measure(256, 256)) <= {TORCH, ONEDNN}
    assert len(kernels.measure(8, 1 << 20)) == len(ROWS)  # the last ones would take too long


def test_what_was_measured_is_kept_and_joined_with_what_others_found(measured, tmp_path):
    file = tmp_path / "kernels" / "machine.json"
    first, second = KernelTable(file), KernelTable(file)
    first.limits("512x256", lambda: kernels.measure(512, 256), ONEDNN)
    second.limits("640x256", lambda: kernels.measure(640, 256), ONEDNN)
    assert set(json.loads(file.read_text())) == {"512x256", "640x256"}
    assert KernelTable(file).limits("512x256", lambda: kernels.measure(512, 256), ONEDNN) == (2, 16) and len(measured) == 2
    assert [path.name for path in file.parent.iterdir()] == ["machine.json"]


@pytest.mark.parametrize("content", ["{", "[]", '{"512x256": ["torch"]}', '{"512x256": 3}'])
def test_a_damaged_table_is_measured_anew(measured, tmp_path, content):
    file = tmp_path / "machine.json"
    file.write_text(content)
    KernelTable(file).limits("512x256", lambda: kernels.measure(512, 256), ONEDNN)
    assert len(measured) == 1 and len(json.loads(file.read_text())["512x256"]) == len(ROWS)


def test_a_table_that_cannot_be_kept_still_serves(measured, tmp_path, said):
    (tmp_path / "file").write_text("")
    table = KernelTable(tmp_path / "file" / "machine.json")
    ask = partial(table.limits, "512x256", lambda: kernels.measure(512, 256), ONEDNN)
    assert ask() == ask() == (2, 16)
    assert len(measured) == 1 and "can't be kept" in said[0]


def test_a_machine_is_a_file_name():
    assert f"{torch.get_num_threads()}threads" in machine() and "/" not in machine() and " " not in machine()
