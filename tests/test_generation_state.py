"""What runs inside `generate` runs at its budget, and what runs for a row after its end is not counted."""

import peft
import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from modeling_anee.compatibility import CACHE, cache_argument
from modeling_anee.generation_state import generation_of

from .tiny import BRIDGES, tiny_base, token_ids, wrap


FIELDS = {"plans": ["PSFP", "PSSP", "PFPP"], **BRIDGES}
MODE = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True}


def costs_of_forwards(model, monkeypatch) -> list[float]:
    """Mean cost of every forward from now on."""
    costs, run = [], model.executor.run

    def noting(*args):
        hidden, trace = run(*args)
        costs.append(trace.mean_cost)
        return hidden, trace

    monkeypatch.setattr(model.executor, "run", noting)
    return costs


def test_a_processor_that_calls_the_model_sees_the_budget_of_the_generation(monkeypatch):
    model, ids = wrap(**FIELDS), token_ids(2)
    costs = costs_of_forwards(model, monkeypatch)
    model.generate(ids, energy_budget=0.0, guidance_scale=1.5, **MODE)
    assert len(costs) > 6 and all(cost < 1.0 for cost in costs[2:])  # first tokens are kept in full


def test_a_processor_with_other_rows_is_refused_where_budgets_differ():
    class Asks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            model(token_ids(3))
            return scores

    model, ids = wrap(**FIELDS), token_ids(2)
    asks = LogitsProcessorList([Asks()])
    model.generate(ids, energy_budget=0.6, logits_processor=asks, **MODE)
    with pytest.raises(ValueError, match="3 rows inside a generation of 2 rows.*budgets differ"):
        model.generate(ids, energy_budget=[0.6, 0.9], logits_processor=asks, **MODE)
    assert generation_of(model) is None  # an error ends it


def test_an_assistant_that_is_the_model_itself_has_a_generation_of_its_own():
    model, ids = wrap(**FIELDS), token_ids(1)
    model.generation_config.energy_budget = 1.0
    alone = model.generate(ids, energy_budget=0.6, **MODE)
    assisted = model.generate(ids, energy_budget=0.6, assistant_model=model, **MODE)
    assert torch.equal(assisted.sequences, alone.sequences)
    torch.testing.assert_close(assisted.execution.cost, alone.execution.cost)


@pytest.mark.parametrize("cached", [True, False])
def test_what_runs_for_a_row_after_its_end_is_not_counted(cached):
    model, ids = wrap(**FIELDS), token_ids(2)
    free = model.generate(ids, energy_budget=0.6, eos_token_id=-1, **MODE)
    eos = int(free.sequences[0, ids.shape[1] + 1])
    mode = {**MODE, "energy_budget": 0.6, "eos_token_id": eos, "use_cache": cached}
    batch = model.generate(ids, **mode)
    for row in range(2):
        alone = model.generate(ids[row : row + 1], **mode).execution
        own = batch.execution.rows(torch.tensor([row]))
        assert int(own.valid.sum()) == alone.cost.shape[1]
        torch.testing.assert_close(own.row_cost, alone.row_cost)
    assert not batch.execution.valid.all()


def test_rows_given_as_embeddings_end_where_they_do_as_ids():
    model, ids = wrap(**FIELDS), token_ids(2)
    free = model.generate(ids, energy_budget=0.6, eos_token_id=-1, **MODE)
    mode = {**MODE, "energy_budget": 0.6, "eos_token_id": int(free.sequences[0, ids.shape[1] + 1])}
    expected = model.generate(ids, **mode).execution
    found = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **mode).execution
    assert torch.equal(found.valid, expected.valid) and torch.equal(found.cost, expected.cost)


def test_feedback_counts_from_the_prompt_s_end_after_a_prefix_that_the_base_cached():
    model, ids = wrap(**FIELDS), token_ids(1)
    mode = {**MODE, "energy_budget": 0.8, "budget_feedback": 1.0, "max_new_tokens": 20, "min_new_tokens": 20}
    expected = model.generate(ids, prompt_energy_budget=1.0, **mode)
    cache = DynamicCache()
    with torch.no_grad():
        model.base(ids[:, :-1], **cache_argument(cache))
    found = model.generate(ids, prompt_energy_budget=1.0, **cache_argument(cache), **mode)
    assert torch.equal(found.sequences, expected.sequences)
    new = expected.execution.cost.shape[1] - ids.shape[1]
    assert torch.equal(found.execution.cost[:, -new:], expected.execution.cost[:, -new:])


@pytest.mark.parametrize("name", ["compile_config", "assistant_early_exit"])
def test_what_would_be_ignored_is_refused(name):
    from transformers import CompileConfig

    value = CompileConfig() if name == "compile_config" else 2
    with pytest.raises(ValueError, match=f"{name}.*not supported"):
        wrap().generate(token_ids(1), **{name: value}, **MODE)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Position ids are not supported")  # peft's own
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_peft_prompts_generate_under_a_budget(kind):
    model, plain, ids = with_prompt(wrap(tiny_base(), **FIELDS), kind), with_prompt(tiny_base(), kind), token_ids(1)
    if kind == "prefix" and CACHE != "past_key_values":  # peft still gives it by the old name alone, beside generate's own
        with pytest.raises(ValueError, match="two names of one argument"):
            model.generate(input_ids=ids, energy_budget=1.0, **MODE)
        return
    expected = plain.generate(input_ids=ids, **MODE).sequences
    assert torch.equal(model.generate(input_ids=ids, energy_budget=1.0, **MODE).sequences, expected)
    assert model.generate(input_ids=ids, energy_budget=0.6, **MODE).execution.mean_cost < 0.95


def with_prompt(model, kind: str):
    shape = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    if kind == "prefix":
        shape |= {"num_layers": 4, "num_attention_heads": 2, "token_dim": 16, "num_transformer_submodules": 1}
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(**shape) if kind == "prompt" else peft.PrefixTuningConfig(**shape)
    return peft.get_peft_model(model, config).eval()
