"""Kernels that are compiled here: the same integers as torch's kernels, to 16 bits, in every number of rows."""

import platform
import subprocess
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from modeling_anee import compiled, compiled_choice
from modeling_anee.base_compiled import CompiledInt4, CompiledInt8, pack4, pack8, unpack4, unpack8
from modeling_anee.base_int4 import Int4Linear
from modeling_anee.base_int8 import Int8Linear
from modeling_anee.base_kernels import KERNELS_VARIABLE, KernelTable

from .tiny import tiny_base, token_ids, wrap


pytestmark = pytest.mark.skipif(not any(map(compiled.shutil.which, compiled.COMPILERS)), reason="needs a C compiler")
KINDS = {CompiledInt8: Int8Linear, CompiledInt4: Int4Linear}
sizes, seeds = st.integers(1, 70), st.integers(0, 99)


@pytest.fixture(autouse=True, scope="module")
def kernels():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KERNELS_VARIABLE, "compiled")
        yield


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(outputs=sizes, inputs=sizes, rows=st.integers(1, 20), seed=seeds, bias=st.booleans())
def test_maps_are_their_rounded_weights_and_no_row_sees_the_others(kind, outputs, inputs, rows, seed, bias):
    torch.manual_seed(seed)
    weight, x = torch.randn(outputs, inputs), torch.randn(rows, inputs) * torch.rand(rows, 1) * 100
    linear = kind.of(weight, torch.randn(outputs) if bias else None)
    numbers = linear.dequantised(torch.float32)
    assert torch.equal(numbers, KINDS[kind](weight, None).dequantised(torch.float32))
    whole = linear(x)
    largest = x.abs().amax(dim=1, keepdim=True) * numbers.abs().sum(dim=1)
    assert ((whole - F.linear(x, numbers, linear.bias)).abs() <= 3e-5 * largest + 1e-5).all()
    assert torch.equal(torch.stack([linear.row(row) for row in x]), whole)
    start = seed % outputs
    assert torch.equal(linear.rows(start, None)(x), whole[:, start:])
    assert torch.equal(linear.rows(0, start + 1)(x), whole[:, : start + 1])


@settings(max_examples=40, deadline=None)
@given(outputs=sizes, inputs=sizes, seed=seeds)
def test_what_is_packed_comes_back(outputs, inputs, seed):
    torch.manual_seed(seed)
    eight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    four = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    assert torch.equal(unpack8(pack8(eight))[:outputs, :inputs], eight)
    assert torch.equal(unpack4(pack4(four))[:outputs, :inputs], four)


def test_sums_never_leave_32_bits():
    linear = CompiledInt8.of(torch.ones(2, 20000), None)
    torch.testing.assert_close(linear(torch.ones(1, 20000)), torch.full((1, 2), 20000.0))


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_run_in_torchs_kernels_where_these_are_faster(kind):
    linear, x = kind.of(torch.randn(40, 64), torch.randn(40)), torch.randn(9, 64)
    whole = linear(x)
    linear.most = 8
    torch.testing.assert_close(linear(x), whole, atol=0.02, rtol=0.001)
    assert torch.equal(linear(x[:8]), whole[:8])
    assert linear.rows(0, 16).most == 8


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_rounded_weights(kind):
    linear, x = kind.of(torch.randn(5, 40), torch.randn(5)), torch.randn(3, 40, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.dequantised(torch.float32).sum(dim=0).expand(3, -1))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "qwen3", "phi", "cohere"])
@pytest.mark.parametrize("plan", ["4*PROCESS", "4*INT8 / int8", "INT8, INT4_SKIP_FFN, SKIP_INT4, INT4 / int4"])
@torch.no_grad()
def test_decoding_in_compiled_halves_is_scoring_and_what_torch_does(family, plan, monkeypatch):
    model = wrap(tiny_base(family), controller="plan", plans=[plan], precisions=["int8", "int4"], keep_first_tokens=0)
    budget, ids = (1.0 if plan == "4*PROCESS" else 0.0), token_ids(1, 12)
    whole = model(ids, energy_budget=budget).logits
    torch.testing.assert_close(decoded(model, ids, budget), whole, atol=1e-3, rtol=1e-3)
    monkeypatch.setenv(KERNELS_VARIABLE, "default")
    torchs = wrap(tiny_base(family), controller="plan", plans=[plan], precisions=["int8", "int4"], keep_first_tokens=0)
    torch.testing.assert_close(torchs(ids, energy_budget=budget).logits, whole, atol=2e-2, rtol=1e-2)


def decoded(model, ids, budget):
    parts, cache = [], None
    for part in ids.split((4, *[1] * (ids.shape[1] - 4)), dim=1):
        parts.append(model(part, cache=cache, energy_budget=budget, use_cache=True))
        cache = parts[-1].cache
    return torch.cat([part.logits for part in parts], dim=1)


@pytest.mark.parametrize("hidden_act", ["silu", "gelu_pytorch_tanh", "gelu"])
@torch.no_grad()
def test_activations(hidden_act):
    base = tiny_base("llama")
    for layer in base.model.layers:
        layer.mlp.act_fn = ACT2FN[hidden_act]
    model = wrap(base, controller="plan")
    ids = token_ids(1, 8)
    torch.testing.assert_close(decoded(model, ids, 1.0), model.base(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the names are those of x86")
@pytest.mark.parametrize("instructions", [pytest.param("x86-64", marks=pytest.mark.slow), "x86-64-v3"])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_for_fewer_instructions_give_the_same(kind, instructions, monkeypatch, tmp_path):
    weight, x = torch.randn(21, 70), torch.randn(11, 70)
    usual = kind.of(weight, None)(x)
    monkeypatch.setenv("ANEE_CACHE", str(tmp_path))
    flags = [f"-march={instructions}" if flag.startswith("-march") else flag for flag in compiled.FLAGS]
    monkeypatch.setattr(compiled, "FLAGS", tuple(flags))
    monkeypatch.setattr(compiled, "_loaded", cache(compiled._loaded.__wrapped__))
    linear = kind.of(weight, None)
    assert torch.equal(torch.stack([linear.row(row) for row in x]), linear(x))
    torch.testing.assert_close(linear(x), usual, atol=1e-5, rtol=1e-5)


def test_a_machine_without_a_compiler_runs_torchs_kernels(monkeypatch):
    monkeypatch.setattr(compiled, "COMPILERS", ())
    monkeypatch.setattr(compiled, "_loaded", compiled._loaded.__wrapped__)
    assert compiled.library() is None
    assert isinstance(compiled_choice.int8_linear(torch.randn(4, 32), None), Int8Linear)
    assert isinstance(compiled_choice.int4_linear(torch.randn(4, 32), None), Int4Linear)


def test_what_does_not_compile_says_so_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("ANEE_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled, "SOURCE", "this is no C")
    with pytest.raises(subprocess.SubprocessError, match="says:"):
        compiled.built(compiled.shutil.which("cc") or "cc")
    assert list(tmp_path.rglob("*.so")) == []
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_which_kernels_run_is_measured_once(monkeypatch):
    monkeypatch.delenv(KERNELS_VARIABLE)
    table, calls = KernelTable(None), []
    monkeypatch.setattr(compiled, "machine_table", lambda: table)

    def times(*functions):
        calls.append(len(functions))
        return [1.0, 0.5 if len(calls) > 3 else 1.0]

    monkeypatch.setattr(compiled_choice, "best_times", times)
    made = compiled_choice.int8_linear(torch.randn(4, 32), None)
    assert isinstance(made, CompiledInt8) and made.most == 8  # the third of the numbers of rows
    assert compiled_choice.int8_linear(torch.randn(4, 32), None).most == 8 and len(calls) == 6


def test_the_number_of_threads_changes_no_bits():
    model, before = wrap(keep_first_tokens=0, precisions=["int8", "int4"]), torch.get_num_threads()
    mode = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

    def logits(threads):
        def source(progress):
            torch.set_num_threads(threads[progress.tokens % len(threads)])
            return [1.0, 0.6, 0.3, 0.2][progress.tokens % 4]

        return torch.stack(model.generate(token_ids(1, 5), energy_budget=source, **mode).logits)

    try:
        assert torch.equal(logits([1]), logits([3, 1, 2, 4, 2]))
    finally:
        torch.set_num_threads(before)
