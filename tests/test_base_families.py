"""Every family and variant against its base: the same logits, whatever is left out, cached, padded or batched."""

import contextlib
import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from modeling_anee import AneeForCausalLM
from modeling_anee.actions import DEFAULT_TABLE, EXIT, PROCESS, SKIP, SKIP_FFN
from modeling_anee.base_families import FAMILIES, family_of
from modeling_anee.base_model import BaseStack

from .tiny import BRIDGES, CONFIGS, LAYERS, VARIANTS, tiny_base, token_ids, wrap


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
BUDGETS = [0.3, 0.75]  # of the two rows
TOKENS = 10
NAMES = [*CONFIGS, *VARIANTS]
EVERY = [(name, kind) for name in NAMES for kind in ("sdpa", "eager") if (name[:6], kind) != ("gemma2", "sdpa")]
PLANS = ["SFEE", "PEEE", "FPFS", "PFPS", "SPFP"]  # of different costs, so that every action is used

every_base = pytest.mark.parametrize("name, attention", EVERY)


@functools.cache
def model_of(name: str, attention: str) -> AneeForCausalLM:
    return wrap(tiny_base(name, attention), "plan", plans=PLANS, **BRIDGES)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def padded(side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions of two rows, the second shorter than the first."""
    ids, mask = token_ids(2, TOKENS), torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, slice(0, 3) if side == "left" else slice(-3, None)] = 0
    return ids.masked_fill(mask == 0, 0), mask, (mask.cumsum(dim=1) - 1).clamp(min=0)


class Reference:
    """Slow and plain: every layer of the base runs on every token, and what a token leaves out is replaced by hooks.

    SKIP and EXIT put the hidden state back that entered the layer, over the bridge; SKIP_FFN silences the feed-forward and
    adds the bridge to what attention left; the translator of the layer where a token left follows the last layer.
    """

    def __init__(self, model: AneeForCausalLM, actions: Tensor) -> None:
        self.bridges, self.actions, self.family = model.bridges, actions, family_of(model.base)
        self.layers = model.base.get_submodule(self.family.decoder).get_submodule(self.family.layers)

    def left_out(self, layer: int, action: int) -> Tensor:
        return (self.actions[..., layer] == action).unsqueeze(-1)

    def after_layer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> Tensor | tuple:
        entering = args[0] if args else kwargs["hidden_states"]
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = torch.where(self.left_out(layer, SKIP), self.bridges.of_skip(layer)(entering), hidden)
        hidden = torch.where(self.left_out(layer, EXIT), entering, hidden)
        attended = self.attended if self.family.norm_after_residual else hidden
        hidden = torch.where(self.left_out(layer, SKIP_FFN), self.bridges.of_skip_ffn(layer)(attended), hidden)
        if layer == LAYERS - 1:
            hidden = self.translated(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def translated(self, hidden: Tensor) -> Tensor:
        for layer in range(LAYERS):
            left_before = (self.actions[..., :layer] == EXIT).any(dim=-1, keepdim=True)
            leaves = self.left_out(layer, EXIT) & ~left_before
            hidden = torch.where(leaves, self.bridges.of_exit(layer)(hidden), hidden)
        return hidden

    def before_feed_forward(self, module: nn.Module, args: tuple) -> None:
        self.attended = args[0].view(*self.actions.shape[:2], -1)

    def after_feed_forward(self, layer: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output.masked_fill(self.left_out(layer, SKIP_FFN).view(*output.shape[:-1], 1), 0.0)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        names = self.family.feed_forward
        first, last = (names, names) if isinstance(names, str) else (names[0], names[-1])
        hooks = []
        for index, layer in enumerate(self.layers):
            hooks += [
                layer.register_forward_hook(functools.partial(self.after_layer, index), with_kwargs=True),
                layer.get_submodule(first).register_forward_pre_hook(self.before_feed_forward),
                layer.get_submodule(last).register_forward_hook(functools.partial(self.after_feed_forward, index)),
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def test_every_family_and_only_those_are_tested():
    assert set(CONFIGS) == {name for name, family in FAMILIES.items() if not family.encoder}
    assert {name.split("-")[0] for name in VARIANTS} <= set(FAMILIES)


@every_base
def test_full_budget_is_the_base(name, attention):
    model = model_of(name, attention)
    base, ids = model.base, token_ids(2, TOKENS)
    torch.testing.assert_close(model(ids).logits, base(ids).logits, **CLOSE)
    embeddings = base.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, base(inputs_embeds=embeddings).logits, **CLOSE)
    for side in ("left", "right"):
        ids, mask, positions = padded(side)
        for given in ({}, {"position_ids": positions}):
            found, expected = (run(ids, attention_mask=mask, **given).logits[mask.bool()] for run in (model, base))
            torch.testing.assert_close(found, expected, **CLOSE)


@every_base
def test_full_budget_generates_the_bases_tokens(name, attention):
    model = model_of(name, attention)
    for ids, mask in ((token_ids(2, TOKENS), torch.ones(2, TOKENS, dtype=torch.long)), padded("left")[:2]):
        tokens = [run.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False) for run in (model, model.base)]
        assert torch.equal(*tokens)


@every_base
def test_what_is_left_out_is_what_a_plain_reference_leaves_out(name, attention):
    model = model_of(name, attention)
    for side in ("left", "right"):
        ids, mask, positions = padded(side)
        inputs = {"attention_mask": mask, "position_ids": positions}
        output = model(ids, energy_budget=BUDGETS, **inputs)
        real, actions = mask.bool(), output.execution.actions
        assert len(actions[real].unique()) == len(DEFAULT_TABLE)
        with Reference(model, actions).attached():
            expected = model.base(ids, **inputs).logits
        torch.testing.assert_close(output.logits[real], expected[real], **CLOSE)


@every_base
def test_scoring_is_decoding(name, attention):
    """Token by token and in chunks, with our cache and with those that a user brings."""
    model, ids = model_of(name, attention), token_ids(2, TOKENS)
    whole = model(ids, energy_budget=BUDGETS)
    config = model.config.get_text_config()
    chunks = [3, 1, TOKENS - 4]
    for cuts, cache in (([1] * TOKENS, None), (chunks, None), (chunks, DynamicCache(config=config)), (chunks, DynamicCache())):
        logits = []
        for part in ids.split(cuts, dim=1):
            output = model(part, past_key_values=cache, energy_budget=BUDGETS)
            cache = output.past_key_values
            logits.append(output.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, **CLOSE)


@every_base
def test_a_row_depends_neither_on_its_batch_nor_on_padding(name, attention):
    model = model_of(name, attention)
    for side in ("left", "right"):
        ids, mask, positions = padded(side)
        batch = model(ids, attention_mask=mask, position_ids=positions, energy_budget=BUDGETS)
        for row, budget in enumerate(BUDGETS):
            real = mask[row].bool()
            alone = model(ids[row : row + 1, real], energy_budget=budget)
            assert torch.equal(batch.execution.actions[row, real], alone.execution.actions[0])
            torch.testing.assert_close(batch.logits[row, real], alone.logits[0], **CLOSE)


def flops(function, *args) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", NAMES)
def test_costs_are_what_blocks_run(name):
    base = tiny_base(name, "eager")
    stack, tokens = BaseStack(base.requires_grad_(False)), 5
    costs = stack.measure_costs("flops")
    hidden = torch.randn(1, tokens, base.config.hidden_size)
    rotations = stack.rotations(hidden, torch.arange(tokens).unsqueeze(0))
    for block, rotation, modelled in zip(stack.blocks, rotations, costs.layers * costs.total * tokens, strict=True):
        assert flops(block.keys_values, hidden, rotation) == pytest.approx(float(modelled[SKIP]))
        queries, keys_values = block.queries_keys_values(hidden, rotation)
        inputs = queries, *keys_values.chunk(2, dim=1)
        scores = 2 * 2 * tokens**2 * block.heads * block.head_size  # queries by keys, weights by values
        attention = flops(block.queries_keys_values, hidden, rotation) + flops(block.add_attention, hidden, *inputs, None)
        assert attention - scores == pytest.approx(float(modelled[SKIP_FFN]))
        process = attention - scores + flops(block.add_feed_forward, hidden, hidden)
        assert process == pytest.approx(float(modelled[PROCESS]))
        both = flops(block.queries, hidden, rotation) + flops(block.keys_values, hidden, rotation)
        if base.config.model_type != "falcon" or not base.config.bias:  # such a module runs whole, twice
            assert both == flops(block.queries_keys_values, hidden, rotation)


@pytest.mark.parametrize("name", NAMES)
def test_costs_are_what_torch_counts_in_a_whole_forward(name):
    """In the base's own, in ours, and in one that leaves much out; scores are counted by torch only in eager attention."""
    fields = {"cost_unit": "flops", "plans": ["PFSE"], "keep_first_tokens": 0}
    model, ids = wrap(tiny_base(name, "eager"), "plan", **fields, **BRIDGES), token_ids()
    tokens = ids.numel()
    scores = [4 * ids.shape[1] * tokens * block.heads * block.head_size for block in model.stack.blocks]
    whole = pytest.approx(model.costs.total * tokens + sum(scores))
    assert flops(model.base, ids) == whole and flops(model, ids) == whole
    run = functools.partial(model, past_key_values=DynamicCache(), energy_budget=0.0)  # of the user's, written at once
    cost = model(ids, energy_budget=0.0).execution.mean_cost
    assert flops(run, ids) == pytest.approx(cost * model.costs.total * tokens + sum(scores[:2]))


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_the_decoder_layers(name):
    base = tiny_base(name, "eager")
    family = family_of(base)
    layers = base.get_submodule(family.decoder).get_submodule(family.layers)
    costs = BaseStack(base.requires_grad_(False)).measure_costs("bytes")
    own = sum(p.numel() * p.element_size() for p in layers.parameters())
    assert float(costs.layers[:, PROCESS].sum()) * costs.total == pytest.approx(own)
    assert len(costs.layers) == LAYERS and (costs.layers[:, SKIP] < costs.layers[:, PROCESS]).all()


@pytest.mark.parametrize("name", ["gpt_neox", "gpt_neox-sequential", "falcon", "falcon-per_head"])
def test_keys_and_values_of_a_grouped_projection_are_the_same_bits_of_weights(name):
    """They come from a view of the base's weight: nothing is copied, and a change of the weight is seen."""
    base = tiny_base(name)
    block = BaseStack(base.requires_grad_(False)).blocks[0]
    hidden = torch.randn(2, 3, 32)
    whole = block.queries_keys_values(hidden, None)
    torch.testing.assert_close((block.queries(hidden, None), block.keys_values(hidden, None)), whole, **CLOSE)
    for parameter in block.qkv.modules[0].parameters():
        parameter.zero_()
    assert (block.keys_values(hidden, None) == 0).all()


REFUSED = [
    ("falcon", "alibi", True),
    ("falcon", "parallel_attn", False),
    ("falcon-multi_query", "num_ln_in_parallel_attn", 2),
    ("gemma2", "use_bidirectional_attention", True),
    ("gemma3_text", "use_bidirectional_attention", True),
    ("llama", "is_causal", False),
    ("gpt2", "add_cross_attention", True),
    ("gpt2", "reorder_and_upcast_attn", True),
]


@pytest.mark.parametrize("name, field, value", REFUSED)
def test_a_variant_that_cannot_be_exact_is_refused(name, field, value):
    base = tiny_base(name, "eager")
    setattr(base.config, field, value)
    # A value can be allowed by itself and not together with another field, which is then named.
    with pytest.raises(ValueError, match=f"({field}={value}|new_decoder_architecture=False).*(allowed|use)"):
        AneeForCausalLM.from_base(base)


def test_soft_caps_are_refused_where_the_kernel_has_none():
    base = tiny_base("gemma2", "eager")
    base.config._attn_implementation_internal = "sdpa"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'.*allowed: 'eager'"):
        AneeForCausalLM.from_base(base)
