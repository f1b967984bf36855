"""The base's own weights in a compiled kernel: a row's outputs are the same bits in every number of rows."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from modeling_anee import compiled, compiled_float
from modeling_anee.base_kernels import KERNELS_VARIABLE, KernelTable, LinearKernel
from modeling_anee.cache import AneeCache
from modeling_anee.compiled_float import MOST, FloatLinear, full_linear, most_rows
from modeling_anee.draft_plans import full_plan
from modeling_anee.draft_policy import DraftPolicy
from modeling_anee.feed import Feed

from .tiny import GROUPED, tiny_base, token_ids, wrap


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
        monkeypatch.setattr(compiled, "machine_table", lambda: KernelTable(None))
        monkeypatch.setattr(compiled_float, "measure", lambda fastest=fastest: fastest)
        assert most_rows() == most
    assert len(fastest) == 6


def feed_of(model):
    return Feed(model.stack, AneeCache(model.stack.blocks), torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("family", ["llama", "qwen2", "smollm3", "gpt2", "gemma3_text", "mistral-full"])
def test_tokens_verified_together_have_the_logits_of_tokens_alone(family):
    model, ids = wrap(tiny_base(family)), token_ids(1, 20)
    plan, feeds = full_plan(model), [feed_of(model) for _ in range(3)]
    together = torch.cat([feeds[0].run(ids[:, :16], plan), feeds[0].run(ids[:, 16:], plan)], dim=1)
    some = torch.cat([feeds[1].run(part, plan) for part in ids.split((1, 3, 7, 2, 7), dim=1)], dim=1)
    alone = torch.cat([feeds[2].run(ids[:, n : n + 1], plan) for n in range(20)], dim=1)
    torch.testing.assert_close(together, model.base(ids).logits, rtol=1e-4, atol=1e-4)
    for other in (some, alone):
        torch.testing.assert_close(together, other, rtol=1e-4, atol=1e-4)
        assert plan.together is None or torch.equal(together, other)
    assert (plan.together is not None) == (family in ("llama", "qwen2", "smollm3", "mistral-full"))


def test_heads_of_every_size_are_attended_alike():
    for size in (8, 16, 64, 96, 128):
        base = AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED | {"head_dim": size})).eval()
        model, ids = wrap(base), token_ids(1, 16)
        torch.testing.assert_close(feed_of(model).run(ids, full_plan(model)), base(ids).logits, rtol=1e-4, atol=1e-5)


def test_greedy_text_is_that_of_plain_decoding_to_the_bit(monkeypatch):
    monkeypatch.setattr(DraftPolicy, "pays", True)  # whatever this machine is fast at
    monkeypatch.setattr(DraftPolicy, "goes_on", lambda self, drafted, chance, most: drafted < min(most, 5))
    model, options = wrap(precisions=["int4"]), {"max_new_tokens": 40, "eos_token_id": None, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(token_ids(1), energy_budget=1.0, **options)
    lossless = model.generate(token_ids(1), lossless=True, **options)
    assert lossless.execution.lossless.drafted and torch.equal(plain.sequences, lossless.sequences)
    assert all(map(torch.equal, plain.logits, lossless.logits))
