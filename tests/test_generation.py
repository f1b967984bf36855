"""`generate`: the base's own tokens at budget 1, budgets that reach every token, traces that come back."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, TextIteratorStreamer

from modeling_anee import AneeForCausalLM
from modeling_anee.actions import Action
from modeling_anee.generation import AneeGenerateBeamOutput, AneeGenerateOutput

from .tiny import CONTROLLERS, FAMILIES, LAYERS, VOCABULARY, tiny_base, token_ids, wrap


NEW = 8
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def mask_of(ids: torch.Tensor, left: int = 0, right: int = 0) -> torch.Tensor:
    """A mask whose first row is padded."""
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    if right:
        mask[0, -right:] = 0
    return mask


def follow(model: AneeForCausalLM, sequence: torch.Tensor, prompt_length: int, budget: float, prompt_budget: float):
    """Trace of one sequence fed in a single forward with the budgets that `generate` gives its tokens."""
    fed = sequence[:, :-1]
    budgets = torch.full(fed.shape, budget)
    budgets[:, :prompt_length] = prompt_budget
    return model(fed, energy_budget=budgets).execution


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_budget_generates_the_bases_tokens(family, controller):
    base = tiny_base(family)
    ids = token_ids()
    mask = mask_of(ids, left=4)
    model = wrap(base, controller)
    for modes in (GREEDY, {**GREEDY, "num_beams": 3}, {**GREEDY, "use_cache": False}):
        expected = base.generate(ids, attention_mask=mask, **modes)
        assert torch.equal(model.generate(ids, attention_mask=mask, **modes), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_budget_samples_the_bases_tokens(family):
    base = tiny_base(family)
    ids = token_ids()
    model = wrap(base)
    mode = {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 2, "top_k": 20}
    torch.manual_seed(3)
    expected = base.generate(ids, attention_mask=torch.ones_like(ids), **mode)
    torch.manual_seed(3)
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **mode), expected)


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_generate_what_they_generate_alone(family, controller):
    model = wrap(tiny_base(family), controller)
    ids, left = token_ids(3), 5
    budgets = [0.9, 0.5, 0.75]
    mask = mask_of(ids, left=left)
    together = model.generate(ids, attention_mask=mask, energy_budget=budgets, return_dict_in_generate=True, **GREEDY)
    for row, budget in enumerate(budgets):
        start = left if row == 0 else 0
        alone = model.generate(ids[row : row + 1, start:], energy_budget=budget, return_dict_in_generate=True, **GREEDY)
        assert torch.equal(together.sequences[row, start:], alone.sequences[0])
        assert torch.equal(together.execution.actions[row, start:], alone.execution.actions[0])
        torch.testing.assert_close(together.execution.cost[row, start:], alone.execution.cost[0])
    assert not together.execution.valid[0, :left].any() and together.execution.cost[0, :left].sum() == 0


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_trace_of_generate_is_that_of_one_forward(controller, use_cache):
    model = wrap(controller=controller)
    ids = token_ids(2)
    output = model.generate(
        ids, energy_budget=0.6, prompt_energy_budget=0.9, use_cache=use_cache, return_dict_in_generate=True, **GREEDY
    )
    assert isinstance(output, AneeGenerateOutput)
    expected = follow(model, output.sequences, ids.shape[1], 0.6, 0.9)
    assert output.execution.actions.shape == (2, ids.shape[1] + NEW - 1, LAYERS)
    assert torch.equal(output.execution.actions, expected.actions)
    torch.testing.assert_close(output.execution.cost, expected.cost)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("controller", ["learned", "plan"])
def test_trace_of_beams_follows_the_returned_sequences(controller, use_cache):
    model = wrap(controller=controller)
    ids = token_ids(2)
    output = model.generate(
        ids,
        energy_budget=0.6,
        num_beams=4,
        num_return_sequences=3,
        max_new_tokens=NEW,
        use_cache=use_cache,
        return_dict_in_generate=True,
    )
    assert isinstance(output, AneeGenerateBeamOutput)
    trace = output.execution
    expected = follow(model, output.sequences, ids.shape[1], 0.6, 0.6)
    shape = trace.valid.shape
    assert shape[0] == 6 and shape[1] <= expected.actions.shape[1] + 1
    both = trace.valid[:, : expected.actions.shape[1]]
    assert both[:, : ids.shape[1]].all()
    assert torch.equal(trace.actions[:, : both.shape[1]][both], expected.actions[:, : both.shape[1]][both])


def test_beams_at_a_low_budget_are_the_same_with_and_without_cache():
    model = wrap(controller="learned")
    ids = token_ids(2)
    mode = {**GREEDY, "num_beams": 3, "energy_budget": 0.6, "num_return_sequences": 2}
    assert torch.equal(model.generate(ids, **mode), model.generate(ids, use_cache=False, **mode))


@pytest.mark.parametrize("cache", ["dynamic", "static", "dynamic_by_name", "empty_dynamic"])
@pytest.mark.parametrize("controller", ["learned", "plan"])
def test_user_caches_give_the_same_tokens_and_trace(controller, cache):
    model = wrap(controller=controller)
    ids = token_ids(2)
    mode = {**GREEDY, "energy_budget": 0.6, "return_dict_in_generate": True}
    expected = model.generate(ids, **mode)
    given = {
        "dynamic": lambda: {"past_key_values": DynamicCache(config=model.config.get_text_config())},
        "empty_dynamic": lambda: {"past_key_values": DynamicCache()},
        "static": lambda: {"cache_implementation": "static"},
        "dynamic_by_name": lambda: {"cache_implementation": "dynamic"},
    }[cache]()
    output = model.generate(ids, **given, **mode)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.execution.actions, expected.execution.actions)


def test_user_cache_is_filled_in_place():
    model, ids = wrap(), token_ids(1)
    cache = DynamicCache(config=model.config.get_text_config())
    model.generate(ids, past_key_values=cache, energy_budget=0.5, **GREEDY)
    assert cache.get_seq_length() == ids.shape[1] + NEW - 1
    assert all(layer.keys.shape[2] == ids.shape[1] + NEW - 1 for layer in cache.layers[:LAYERS])


def test_generation_goes_on_from_a_returned_cache():
    model, ids = wrap(controller="learned"), token_ids(2)
    whole = model.generate(ids, energy_budget=0.6, return_dict_in_generate=True, **{**GREEDY, "max_new_tokens": 2 * NEW})
    first = model.generate(ids, energy_budget=0.6, return_dict_in_generate=True, **GREEDY)
    second = model.generate(
        first.sequences, past_key_values=first.past_key_values, energy_budget=0.6, return_dict_in_generate=True, **GREEDY
    )
    assert torch.equal(second.sequences, whole.sequences)
    assert torch.equal(second.execution.actions, whole.execution.actions)


def test_chunked_prefill_changes_nothing():
    model, ids = wrap(controller="learned"), token_ids(2)
    mode = {**GREEDY, "energy_budget": 0.6, "prompt_energy_budget": 0.8, "return_dict_in_generate": True}
    expected, chunked = model.generate(ids, **mode), model.generate(ids, prefill_chunk_size=5, **mode)
    assert torch.equal(chunked.sequences, expected.sequences)
    assert torch.equal(chunked.execution.actions, expected.execution.actions)


@pytest.mark.parametrize("controller", ["learned", "plan"])
def test_assisted_decoding_gives_greedys_tokens_and_trace(controller):
    base = tiny_base()
    model = wrap(base, controller)
    ids = token_ids(1)
    expected = model.generate(ids, energy_budget=0.6, return_dict_in_generate=True, **GREEDY)
    cheap = wrap(base, energy_budget=0.5)
    for helper in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": base}, {"assistant_model": cheap}):
        output = model.generate(ids, energy_budget=0.6, return_dict_in_generate=True, **helper, **GREEDY)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.execution.actions, expected.execution.actions)


def test_a_cheap_wrapper_can_assist_the_plain_base():
    base, ids = tiny_base(), token_ids(1)
    expected = base.generate(ids, **GREEDY)
    assert torch.equal(base.generate(ids, assistant_model=wrap(base, energy_budget=0.5), **GREEDY), expected)


def test_prompt_budget_is_for_the_prompt_only():
    model, ids = wrap(), token_ids(2)
    output = model.generate(ids, energy_budget=0.5, prompt_energy_budget=1.0, return_dict_in_generate=True, **GREEDY)
    actions = output.execution.actions
    assert (actions[:, : ids.shape[1]] == Action.PROCESS).all()
    assert (actions[:, ids.shape[1] :] != Action.PROCESS).any(dim=-1).all()


def test_inputs_embeds_as_prompt():
    model, ids = wrap(), token_ids(2)
    mode = {**GREEDY, "energy_budget": 0.6, "prompt_energy_budget": 0.9}
    embeddings = model.get_input_embeddings()(ids)
    expected = model.generate(ids, **mode)[:, ids.shape[1] :]
    assert torch.equal(model.generate(inputs_embeds=embeddings, attention_mask=torch.ones_like(ids), **mode), expected)


def test_budget_comes_from_the_argument_then_generation_config_then_config():
    base, ids = tiny_base(), token_ids(1)
    mode = {**GREEDY, "return_dict_in_generate": True}
    model = wrap(base, energy_budget=0.9)
    cost = {budget: model.generate(ids, energy_budget=budget, **mode).execution.mean_cost for budget in (0.9, 0.7, 0.5)}
    assert cost[0.9] > cost[0.7] > cost[0.5]
    assert model.generate(ids, **mode).execution.mean_cost == cost[0.9]
    assert model.generate(ids, generation_config=GenerationConfig(energy_budget=0.7), **mode).execution.mean_cost == cost[0.7]
    model.generation_config.energy_budget = 0.7
    assert model.generate(ids, **mode).execution.mean_cost == cost[0.7]
    assert model.generate(ids, energy_budget=0.5, **mode).execution.mean_cost == cost[0.5]


def test_budget_of_generation_config_survives_saving(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    model = AneeForCausalLM.from_base(tmp_path / "base", controller="plan")
    model.generation_config.energy_budget = 0.5
    model.save_pretrained(tmp_path / "artifact")
    loaded = AneeForCausalLM.from_pretrained(tmp_path / "artifact")
    output = loaded.generate(token_ids(1), return_dict_in_generate=True, **GREEDY)
    assert output.execution.mean_cost < 0.6


def test_streaming_and_eos():
    class Words:
        def decode(self, ids, **kwargs):
            return "".join(f"{int(i)} " for i in ids)

    model, ids = wrap(), token_ids(1)
    streamer = TextIteratorStreamer(Words(), skip_prompt=True)
    output = model.generate(ids, streamer=streamer, energy_budget=0.7, **GREEDY)
    assert "".join(streamer).split() == [str(i) for i in output[0, ids.shape[1] :].tolist()]
    stop = int(output[0, ids.shape[1] + 2])
    short = model.generate(ids, energy_budget=0.7, eos_token_id=stop, max_new_tokens=NEW, do_sample=False)
    assert short.shape[1] <= ids.shape[1] + 3 and short[0, -1] == stop


def test_logits_processors_and_scores():
    model, ids = wrap(), token_ids(2)
    output = model.generate(
        ids,
        energy_budget=0.6,
        repetition_penalty=1.5,
        no_repeat_ngram_size=2,
        bad_words_ids=[[5]],
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        return_dict_in_generate=True,
        **GREEDY,
    )
    assert len(output.scores) == len(output.logits) == NEW and output.logits[0].shape == (2, VOCABULARY)
    assert len(output.hidden_states[0]) == LAYERS + 1
    assert 5 not in output.sequences[:, ids.shape[1] :]


@pytest.mark.parametrize(
    "budget, message",
    [
        (1.2, "energy_budget=1.2"),
        ([0.5, -1.0], "between 0 and 1"),
        ([0.5, 0.6, 0.7], "one for each of the 2 rows"),
        (True, "energy_budget=True"),
        (float("nan"), "energy_budget=nan"),
    ],
)
def test_bad_budgets_are_refused(budget, message):
    model, ids = wrap(), token_ids(2)
    with pytest.raises(ValueError, match=message):
        model.generate(ids, energy_budget=budget, **GREEDY)
    with pytest.raises(ValueError, match=message):
        model(ids, energy_budget=budget)


def test_misspelt_arguments_are_refused():
    with pytest.raises(ValueError, match="energy_bugdet"):
        wrap().generate(token_ids(1), energy_bugdet=0.5, **GREEDY)


def test_what_cannot_be_served_is_refused():
    model, ids = wrap(), token_ids(1)
    with pytest.raises(ValueError, match="output_attentions=True"):
        model.generate(ids, output_attentions=True, return_dict_in_generate=True, **GREEDY)
    with pytest.raises(NotImplementedError, match="continuous batching"):
        model.generate_batch([[1, 2, 3]])
    with pytest.raises(NotImplementedError, match="continuous batching"):
        model.generate(ids, cache_implementation="paged", **GREEDY)
