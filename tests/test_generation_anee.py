"""`generate`: the base's own tokens at budget 1, budgets that reach every token, traces that come back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, GenerationConfig, TextIteratorStreamer

from modeling_anee import AneeForCausalLM
from modeling_anee.actions import PROCESS
from modeling_anee.budget import budget_tensor, moved_budget
from modeling_anee.generation_anee import AneeGenerateBeamOutput, AneeGenerateOutput

from .tiny import BRIDGES, CONTROLLERS, FAMILIES, LAYERS, VOCABULARY, tiny_base, token_ids, wrap


NEW = 8
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
# More of both together are in `test_invariants`, every family in `test_base_families`.
few_models = pytest.mark.parametrize(
    "family, controller", [*(("llama", kind) for kind in CONTROLLERS), ("gpt2", "plan"), ("gpt_neox", "learned")]
)


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


@few_models
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


@few_models
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
@pytest.mark.parametrize("controller", ["learned", "plan", "routed"])
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
@pytest.mark.parametrize("controller", ["learned", "plan", "routed"])
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


@pytest.mark.parametrize("controller", ["learned", "plan", "routed"])
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
    assert (actions[:, : ids.shape[1]] == PROCESS).all()
    assert (actions[:, ids.shape[1] :] != PROCESS).any(dim=-1).all()


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
    mode = {**GREEDY, "return_dict_in_generate": True}
    found = loaded.generate(token_ids(1), **mode).execution.mean_cost
    assert found == loaded.generate(token_ids(1), energy_budget=0.5, **mode).execution.mean_cost < 1.0


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


# Feedback


def fed_back(asked: float, feedback: float, cost: torch.Tensor) -> list[float]:
    """Budgets of new tokens with these costs, one after the other."""
    budgets, owed = [], 0.0
    for spent in cost.tolist():
        budgets.append(1.0 if asked == 1.0 else min(max(asked + feedback * owed, 0.0), 1.0))
        owed += asked - spent
    return budgets


CALIBRATED = {"controller": "confidence", "exit_layers": [1, 2], "calibration": {"budgets": [0.4, 1.0], "settings": [1.0, 0.4]}}
KINDS = {kind: {"controller": kind} for kind in ("learned", "budget", "routed")} | {"confidence": CALIBRATED, "plan": {}}


@pytest.mark.parametrize("kind", KINDS)
def test_feedback_moves_each_rows_budget_by_what_it_owes(kind):
    model, ids = wrap(**KINDS[kind], **BRIDGES), token_ids(3)
    mask, budgets, feedback = mask_of(ids, left=5), [0.6, 0.75, 1.0], [0.5, 0.1, 0.5]
    call = {"energy_budget": budgets, "prompt_energy_budget": 0.9, "budget_feedback": feedback}
    output = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **call, **GREEDY)
    cost = output.execution.cost[:, ids.shape[1] :].double()
    new = [fed_back(*row) for row in zip(budgets, feedback, cost, strict=True)]
    assert len({round(budget, 6) for budget in new[0]}) > 2 and new[2] == [1.0] * (NEW - 1)
    per_token = torch.cat((torch.full(ids.shape, 0.9, dtype=torch.float64), torch.tensor(new, dtype=torch.float64)), dim=1)
    whole = torch.cat((mask, torch.ones(3, NEW - 1, dtype=torch.long)), dim=1)
    positions = (whole.cumsum(dim=1) - 1).clamp(min=0)
    expected = model(output.sequences[:, :-1], attention_mask=whole, position_ids=positions, energy_budget=per_token)
    assert torch.equal(output.execution.actions, expected.execution.actions)
    torch.testing.assert_close(output.execution.cost, expected.execution.cost)
    logits = expected.logits[:, ids.shape[1] - 1 :].detach()
    logits[..., 2] = -torch.inf  # the end is held back
    assert torch.equal(logits.argmax(dim=-1), output.sequences[:, ids.shape[1] :])
    for row, budget in enumerate(budgets):  # and alone as in the batch
        start = 5 if row == 0 else 0
        call = {"energy_budget": budget, "prompt_energy_budget": 0.9, "budget_feedback": feedback[row]}
        alone = model.generate(ids[row : row + 1, start:], **call, **GREEDY)
        assert torch.equal(alone[0], output.sequences[row, start:])


def test_feedback_brings_the_mean_cost_to_the_budget():
    model, ids = wrap(**CALIBRATED), token_ids(2)
    mode = {"max_new_tokens": 80, "min_new_tokens": 80, "do_sample": True, "return_dict_in_generate": True}
    for budget in (0.75, 0.9):
        off = []
        for feedback in (0.0, 0.3):
            torch.manual_seed(0)
            output = model.generate(ids, energy_budget=budget, budget_feedback=feedback, **mode)
            off.append((output.execution.cost[:, ids.shape[1] :].mean(dim=1) - budget).abs().max())
        assert off[1] < 0.03 < off[0]


@pytest.mark.parametrize("kind", KINDS)
def test_without_feedback_nothing_changes(kind):
    model, ids = wrap(**KINDS[kind]), token_ids(2)
    mode = {"energy_budget": 0.6, "return_dict_in_generate": True, **GREEDY}
    expected = model.generate(ids, **mode)
    for value in (0.0, [0.0, 0.0]):
        output = model.generate(ids, budget_feedback=value, **mode)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.execution.actions, expected.execution.actions)


def test_feedback_comes_from_the_argument_then_generation_config_then_config():
    ids, mode = token_ids(1), {"energy_budget": 0.6, "return_dict_in_generate": True, **GREEDY}

    def actions(model, **kwargs):
        return model.generate(ids, **mode, **kwargs).execution.actions

    plain = wrap(**CALIBRATED)
    with_feedback = actions(plain, budget_feedback=1.0)
    assert not torch.equal(with_feedback, actions(plain))
    assert torch.equal(actions(plain, generation_config=GenerationConfig(budget_feedback=1.0)), with_feedback)
    configured = wrap(**CALIBRATED, budget_feedback=1.0)
    assert torch.equal(actions(configured), with_feedback)
    assert torch.equal(actions(configured, budget_feedback=0.0), actions(plain))


@pytest.mark.parametrize("kind", ["learned", "confidence", "routed"])
def test_feedback_with_other_caches_chunks_and_a_cache_that_goes_on(kind):
    model, ids = wrap(**KINDS[kind]), token_ids(2)
    mode = {"energy_budget": 0.6, "budget_feedback": 0.5, "return_dict_in_generate": True, **GREEDY}
    expected = model.generate(ids, **mode)
    for how in ({"past_key_values": DynamicCache()}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}):
        output = model.generate(ids, **how, **mode)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.execution.actions, expected.execution.actions)
    first = model.generate(ids, **{**mode, "max_new_tokens": 3, "min_new_tokens": 3})
    second = model.generate(first.sequences, past_key_values=first.past_key_values, **mode)  # begins to count anew
    cost = second.execution.cost[:, ids.shape[1] + 3 :].double()
    per_token = torch.full(second.execution.cost.shape, 0.6, dtype=torch.float64)
    for start, part in ((ids.shape[1], first.execution.cost[:, ids.shape[1] :].double()), (ids.shape[1] + 3, cost)):
        for row in range(2):
            per_token[row, start : start + part.shape[1]] = torch.tensor(fed_back(0.6, 0.5, part[row]), dtype=torch.float64)
    # The last token of the first call is run by the second, as a part of its prompt.
    assert torch.equal(model(second.sequences[:, :-1], energy_budget=per_token).execution.actions, second.execution.actions)


def test_feedback_goes_with_beams_sampling_and_assistants():
    model, ids = wrap(**CALIBRATED), token_ids(2)
    mode = {"energy_budget": 0.6, "budget_feedback": 0.5, "return_dict_in_generate": True, "max_new_tokens": NEW}
    for more in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}):
        output = model.generate(ids, **more, **mode)
        assert len(output.sequences) == len(output.execution.cost) == 2 * more["num_return_sequences"]
    assert model.generate(ids[:1], prompt_lookup_num_tokens=3, **mode).execution.cost.shape[0] == 1
    one_row = {**mode, "energy_budget": [0.6, 1.0]}
    expected = model.base.generate(ids, max_new_tokens=NEW, do_sample=False)[1]
    sequence = model.generate(ids, do_sample=False, **one_row).sequences[1]
    assert torch.equal(sequence[: len(expected)], expected[: len(sequence)])


def test_feedback_is_refused_in_strict_mode():
    model, ids = wrap(budget_mode="strict"), token_ids(1)
    with pytest.raises(ValueError, match="budget_feedback.*strict"):
        model.generate(ids, budget_feedback=0.5, energy_budget=0.6, **GREEDY)
    assert model.generate(ids, energy_budget=0.6, return_dict_in_generate=True, **GREEDY).execution.cost.max() <= 0.6


def test_feedback_without_a_cache_is_refused():
    with pytest.raises(ValueError, match="budget_feedback.*use_cache=False"):
        wrap().generate(token_ids(1), budget_feedback=0.5, energy_budget=0.6, use_cache=False, **GREEDY)


@given(st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=5), st.integers(0, 50))
def test_a_moved_budget_stays_a_budget(rows, tokens):
    budget, feedback, share = torch.tensor(rows, dtype=torch.float64).unbind(dim=1)
    moved = moved_budget(budget, feedback, share * tokens, tokens)
    assert ((moved >= 0) & (moved <= 1)).all()
    assert torch.equal(moved[budget == 1.0], budget[budget == 1.0])
    still = (feedback == 0) | (tokens == 0)
    torch.testing.assert_close(moved[still], budget[still])
    asked_less = (share > budget) & (budget < 1)
    assert (moved[asked_less] <= budget[asked_less]).all()


@pytest.mark.parametrize("value, message", [(1.5, "budget_feedback=1.5"), ([0.5] * 3, "each of the 2 rows"), (True, "=True")])
def test_bad_feedback_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        wrap().generate(token_ids(2), budget_feedback=value, **GREEDY)


# What is refused


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


@pytest.mark.parametrize("budget", [0.0, 0.1, 0.6, 0.7])
def test_a_list_of_budgets_is_exactly_its_numbers(budget):
    assert torch.equal(budget_tensor([budget] * 2, 2), budget_tensor(budget, 2))
    assert budget_tensor([budget], 1).tolist() == [budget]


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
