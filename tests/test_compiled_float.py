"""The base's own weights in a compiled kernel: a row's outputs are the same bits in every number of rows."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_anee import compiled, compiled_float
from modeling_anee.base_kernels import KERNELS_VARIABLE, KernelTable, LinearKernel
from modeling_anee.cache import AneeCache
from modeling_anee.compiled_float import MOST, FloatLinear, full_linear, most_rows
from modeling_anee.draft_plans import full_plan
from modeling_anee.feed import Feed

from .tiny import tiny_base, token_ids, wrap


pytestmark = pytest.mark.skipif(not any(map(compiled.shutil.which, compiled.COMPILERS)), reason="needs a C compiler")
sizes = st.integers(1, 70)


@pytest.fixture(autouse=True, scope="module")
def kernels():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KERNELS_VARIABLE, "compiled")
        yield


@settings(max_examples=60, deadline=None)
@given(outputs=sizes, inputs=sizes, rows=st.integers(1, MOST), seed=st.integers(0, 99), bias=st.booleans())
def test_outputs_are_those_of_torch_and_no_row_sees_the_others(outputs, inputs, rows, seed, bias):
    torch.manual_seed(seed)
    weight, x = torch.randn(outputs, inputs), torch.randn(rows, inputs)
    linear = FloatLinear(weight, torch.randn(outputs) if bias else None, MOST)
    whole = linear(x)
    torch.testing.assert_close(whole, F.linear(x, weight, linear.bias), rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.cat([linear(x[n : n + 1]) for n in range(rows)]), whole)
    assert torch.equal(linear(x.view(1, rows, 1, inputs)).view(rows, outputs), whole)
    start = seed % outputs
    torch.testing.assert_close(linear.rows(start, None)(x), whole[:, start:])


def test_what_the_kernel_is_not_for_runs_as_before():
    weight = torch.randn(40, 64)
    linear, torchs = FloatLinear(weight, None, 4), LinearKernel(weight, None)
    for x in (torch.randn(5, 64), torch.randn(0, 64)):
        assert torch.equal(linear(x), torchs(x))
    trained = torch.randn(2, 64, requires_grad=True)
    linear(trained).sum().backward()
    torch.testing.assert_close(trained.grad, weight.sum(dim=0).expand(2, -1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.randn(2, 64)).dtype == torch.bfloat16


def test_what_is_not_row_major_or_has_another_dtype_is_not_taken():
    assert type(full_linear(torch.randn(8, 4), None)) is FloatLinear
    assert type(full_linear(torch.randn(4, 8).t(), None)) is LinearKernel
    assert type(full_linear(torch.randn(8, 4, dtype=torch.bfloat16), None)) is LinearKernel


def test_it_is_taken_up_to_the_rows_where_it_was_measured_to_be_faster(monkeypatch):
    for fastest, most in ((["compiled"] * 3 + ["torch"] * 3, 8), (["compiled"] * 6, MOST), (["torch"] * 6, 0)):
        monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
        monkeypatch.setattr(compiled_float, "machine_table", lambda: KernelTable(None))
        monkeypatch.setattr(compiled_float, "measure", lambda fastest=fastest: fastest)
        assert most_rows() == most
    assert len(fastest) == 6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_verified_together_have_the_logits_of_tokens_alone(family):
    model, ids = wrap(tiny_base(family)), token_ids(1)
    plan = full_plan(model)
    feeds = [Feed(model.stack, AneeCache(model.stack.blocks), torch.zeros(1, 1, dtype=torch.int64)) for _ in range(2)]
    together = feeds[0].run(ids, plan)
    alone = torch.cat([feeds[1].run(ids[:, n : n + 1], plan) for n in range(ids.shape[1])], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
