"""`AneeForCausalLM` as a transformers model: forward, labels, hidden states, copies, casts, training mode."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

from modeling_anee import AneeConfig, AneeModel, ExecutionTrace, hardware
from modeling_anee.actions import SKIP, SKIP_FFN
from modeling_anee.cache import AneeCache
from modeling_anee.compatibility import cache_argument

from .tiny import BRIDGES, FAMILIES, LAYERS, VOCABULARY, tiny_base, token_ids, wrap


def test_forward_answers_like_the_base():
    base, ids = tiny_base(), token_ids()
    model = wrap(base)
    expected, output = base(ids, labels=ids), model(ids, labels=ids)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.logits, expected.logits)
    assert isinstance(output.execution, ExecutionTrace) and isinstance(output.past_key_values, AneeCache)
    assert model(ids, use_cache=False).past_key_values is None
    logits, cache, trace = model(ids, return_dict=False)
    torch.testing.assert_close(logits, expected.logits)
    assert cache.get_seq_length() == ids.shape[1] and trace.actions.shape == (2, ids.shape[1], LAYERS)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_the_bases(family):
    base, ids = tiny_base(family), token_ids()
    expected = base(ids, output_hidden_states=True).hidden_states
    found = wrap(base)(ids, output_hidden_states=True).hidden_states
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("keep", [1, 3, 0, torch.tensor([0, 5])])
def test_logits_to_keep(keep):
    base, ids = tiny_base(), token_ids()
    model = wrap(base, energy_budget=1.0)
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, base(ids, logits_to_keep=keep).logits)


def test_inputs_embeds_and_position_ids():
    base, ids = tiny_base("gpt2"), token_ids()
    model = wrap(base)
    positions = torch.arange(3, 15).unsqueeze(0)
    embeddings = base.get_input_embeddings()(ids)
    torch.testing.assert_close(
        model(inputs_embeds=embeddings, position_ids=positions).logits, base(ids, position_ids=positions).logits
    )
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(ids, inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()


def test_budget_per_row_and_per_token():
    model, ids = wrap(), token_ids()
    rows = model(ids, energy_budget=[1.0, 0.5])
    torch.testing.assert_close(rows.logits[:1], model(ids[:1], energy_budget=1.0).logits)
    torch.testing.assert_close(rows.logits[1:], model(ids[1:], energy_budget=0.5).logits)
    per_token = torch.full(ids.shape, 0.5)
    per_token[:, :6] = 1.0
    output = model(ids, energy_budget=per_token)
    torch.testing.assert_close(output.logits[:, :6], model(ids, energy_budget=1.0).logits[:, :6])
    assert (output.execution.cost[:, :6] == 1.0).all() and (output.execution.cost[:, 6:] < 1.0).all()


def test_attentions_are_refused_and_so_is_resizing():
    model = wrap()
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(token_ids(), output_attentions=True)
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        model.resize_token_embeddings(80)


def test_embeddings_dtype_and_device_are_the_bases():
    base = tiny_base()
    model = wrap(base, "learned")
    assert model.get_input_embeddings() is base.get_input_embeddings()
    assert model.get_output_embeddings() is base.get_output_embeddings()
    assert model.base_model is base and model.dtype == torch.float32
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    assert model(token_ids(), energy_budget=0.6).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casting_keeps_the_base_and_the_wrapper_together(family, dtype):
    base, ids = tiny_base(family), token_ids()
    model = wrap(base)
    model(ids)  # joins projections, which the cast must not leave behind
    model.to(dtype)
    with torch.no_grad():
        difference = (model(ids).logits - base(ids).logits).abs().max()
    assert difference <= (0.05 if dtype == torch.bfloat16 else 1e-9)


def test_a_copy_is_independent():
    model, ids = wrap(controller="learned"), token_ids()
    expected = model(ids, energy_budget=0.6).logits
    twin, revived = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for other in (twin, revived):
        torch.testing.assert_close(other(ids, energy_budget=0.6).logits, expected)
        assert other.executor.stack is other.stack and other.stack.base is other.base
    assert not torch.equal(model(ids, energy_budget=0.6).logits, expected)


def test_weights_changed_in_the_base_count():
    base, ids = tiny_base(), token_ids()
    model = wrap(base)
    model(ids)
    with torch.no_grad():
        base.model.layers[1].self_attn.q_proj.weight.mul_(2.0)
        base.model.layers[2].self_attn.k_proj.weight = torch.nn.Parameter(torch.randn(16, 32))
        torch.testing.assert_close(model(ids).logits, base(ids).logits)


def test_a_copied_cache_goes_its_own_way():
    model, ids = wrap(controller="learned"), token_ids()
    cache = model(ids, energy_budget=0.6).past_key_values
    twin = copy.deepcopy(cache)
    more = token_ids(2, 3, seed=7)
    first = model(more, past_key_values=cache, energy_budget=0.6)
    second = model(more, past_key_values=twin, energy_budget=0.6)
    torch.testing.assert_close(first.logits, second.logits)
    assert cache.get_seq_length() == twin.get_seq_length() == 15


def test_gradients_reach_what_is_ours_and_nothing_else():
    model, ids = wrap(controller="learned"), token_ids()
    embeddings = model.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=embeddings, energy_budget=0.6, labels=ids).loss.backward()
    assert embeddings.grad is not None and embeddings.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.base.parameters())


def test_bridges_have_the_same_gradients_gathered_or_not(monkeypatch):
    gradients, ids = [], token_ids()
    for flops in (0.0, 1e30):
        monkeypatch.setitem(hardware.GATHERING_FLOPS, "cpu", flops)
        model = wrap(plans=["PSFE", "FPSE", "SFPF"], **BRIDGES)
        output = model(ids, energy_budget=0.5, labels=ids)
        output.loss.backward()
        assert all(p.grad is None for p in model.base.parameters())
        gradients.append({name: p.grad for name, p in model.bridges.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)
    actions, names = output.execution.actions, {SKIP: "skip", SKIP_FFN: "skip_ffn"}
    used = {f"{names[a]}.{layer}" for a in names for layer in range(LAYERS) if (actions[..., layer] == a).any()}
    found = {name.removesuffix(".up.bias") for name, grad in gradients[0].items() if "up.bias" in name and grad.abs().sum() > 0}
    assert found == used | {"exit.3"}


def test_training_mode_leaves_the_base_alone():
    model = wrap(controller="learned").train()
    assert model.training and model.controller.training and not any(module.training for module in model.base.modules())
    assert not model.eval().controller.training


def test_config_survives_pickle_and_copy():
    config = wrap(controller="plan", plans=["PSSP", "PSEE"]).config
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), AneeConfig(**config.to_dict())):
        assert twin.to_dict() == config.to_dict()


def test_cache_is_left_alone_by_a_refused_call():
    model, ids = wrap(), token_ids()
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="energy_budget"):
        model(ids, past_key_values=cache, energy_budget=3.0)
    assert cache.get_seq_length() == ids.shape[1] and cache.execution_log.trace.cost.shape[1] == ids.shape[1]


def test_a_user_cache_made_by_the_base_goes_on():
    base, ids, more = tiny_base(), token_ids(), token_ids(2, 3, seed=7)
    cache = DynamicCache(config=base.config)
    base(ids, **cache_argument(cache))
    expected = base(torch.cat((ids, more), dim=1)).logits[:, -3:]
    torch.testing.assert_close(wrap(base)(more, past_key_values=cache).logits, expected)


def test_seeds_and_repeats_give_the_same_result():
    model, ids = wrap(controller="learned"), token_ids()
    torch.manual_seed(0)
    first = model(ids, energy_budget=0.5)
    torch.manual_seed(99)
    second = model(ids, energy_budget=0.5)
    assert torch.equal(first.logits, second.logits) and torch.equal(first.execution.actions, second.execution.actions)
    assert first.logits.shape == (2, 12, VOCABULARY)


@pytest.mark.parametrize("budget", [0.6, 1.0])
def test_a_compiled_model_gives_the_same(budget):
    model, ids = wrap(), token_ids()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids, energy_budget=budget).logits, model(ids, energy_budget=budget).logits)


@pytest.mark.parametrize("controller", ["plan", "learned", "routed"])
def test_given_actions_do_what_the_controller_s_do(controller):
    model, ids = wrap(controller=controller), token_ids()
    decided = model(ids, energy_budget=0.6)
    given = model(ids, energy_budget=0.6, actions=decided.execution.actions)
    assert torch.equal(given.logits, decided.logits) and torch.equal(given.execution.actions, decided.execution.actions)
    torch.testing.assert_close(given.execution.cost, model.costs.of_plans(given.execution.actions).float())


@pytest.mark.parametrize(
    "actions", [torch.zeros(2, 12, 3, dtype=torch.uint8), torch.zeros(2, 12, 4), torch.full((2, 12, 4), 9)]
)
def test_bad_given_actions_are_refused(actions):
    actions = actions.to(torch.uint8) if actions.any() else actions
    with pytest.raises(ValueError, match="actions (of shape|has 9)"):
        wrap()(token_ids(), actions=actions)


def test_the_core_gives_what_the_head_reads():
    model, ids = wrap(), token_ids()
    core = AneeModel.from_base(model.base, controller="plan")
    found = core(ids, energy_budget=0.6)
    whole = wrap()(ids, energy_budget=0.6)
    torch.testing.assert_close(model.base.lm_head(found.last_hidden_state), whole.logits)
    assert torch.equal(found.execution.actions, whole.execution.actions) and found.cache.get_seq_length() == ids.shape[1]
