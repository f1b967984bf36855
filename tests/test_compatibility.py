"""Both names of the cache on every supported release of transformers; releases outside the window."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from modeling_anee.compatibility import CACHE_NAMES, NEWEST, OLDEST, check_release

from .tiny import tiny_base, token_ids, wrap


GREEDY = {"max_new_tokens": 5, "do_sample": False}
either_name = pytest.mark.parametrize("name", CACHE_NAMES)


def test_this_release_is_in_the_window(said):
    check_release(transformers.__version__)
    assert not said


@pytest.mark.parametrize("release", ["4.57.6", "5.22.2", "5.0.0.dev0"])
def test_an_older_release_is_an_error_that_names_both(release):
    with pytest.raises(ImportError, match=f"transformers {release} is too old.*{OLDEST[0]}.{OLDEST[1]} or newer"):
        check_release(release)


def test_a_newer_release_is_one_warning_that_names_both(said):
    release = f"{NEWEST[0]}.{NEWEST[1] + 1}.0.dev0"
    check_release(release)
    check_release(release)
    assert len(said) == 1 and release in said[0] and f"{NEWEST[0]}.{NEWEST[1]}," in said[0]


def test_a_patch_of_the_newest_release_is_no_newer_release(said):
    check_release(f"{NEWEST[0]}.{NEWEST[1]}.7")
    assert not said


@either_name
def test_a_forward_takes_and_answers_either_name(name):
    model, ids = wrap(), token_ids()
    cache = DynamicCache()
    first = model(ids[:, :7], energy_budget=0.6, **{name: cache})
    assert first.cache is cache and first.past_key_values is cache
    second = model(ids[:, 7:], energy_budget=0.6, **{name: cache})
    torch.testing.assert_close(second.logits, model(ids, energy_budget=0.6).logits[:, 7:])


@either_name
def test_generate_takes_and_answers_either_name(name):
    model, ids, cache = wrap(), token_ids(), DynamicCache()
    expected = model.generate(ids, energy_budget=0.6, **GREEDY)
    output = model.generate(ids, energy_budget=0.6, return_dict_in_generate=True, **{name: cache}, **GREEDY)
    assert torch.equal(output.sequences, expected)
    assert output.cache is cache and output.past_key_values is cache and cache.get_seq_length() > ids.shape[1]
    going_on = model.generate(output.sequences, energy_budget=0.6, **{name: cache}, **GREEDY)
    assert torch.equal(going_on, model.generate(output.sequences, energy_budget=0.6, **GREEDY))


def test_two_caches_under_two_names_are_refused():
    model, ids = wrap(), token_ids()
    with pytest.raises(ValueError, match="past_key_values and cache are two names"):
        model(ids, past_key_values=DynamicCache(), cache=DynamicCache())
    with pytest.raises(ValueError, match="past_key_values and cache are two names"):
        model.generate(ids, past_key_values=DynamicCache(), cache=DynamicCache(), **GREEDY)


def test_every_step_of_generate_sees_the_tokens_before(monkeypatch):
    """Where a cache is lost between steps, each of them sees its own token alone, and nothing says so."""
    model, ids, lengths = wrap(), token_ids(1), []
    run = model.executor.run

    def counting(hidden, step, *others):
        lengths.append((step.past, hidden.shape[1]))
        return run(hidden, step, *others)

    monkeypatch.setattr(model.executor, "run", counting)
    model.generate(ids, energy_budget=0.6, min_new_tokens=4, max_new_tokens=4, do_sample=False)
    assert lengths == [(0, 12), (12, 1), (13, 1), (14, 1)]


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"assistant": True}])
def test_other_ways_to_generate_are_the_base_s(how):
    base, ids = tiny_base(), token_ids(1)
    kwargs = dict(how)
    if kwargs.pop("assistant", False):
        kwargs["assistant_model"] = AutoModelForCausalLM.from_config(base.config).eval()
    assert torch.equal(wrap(base).generate(ids, **kwargs, **GREEDY), base.generate(ids, **kwargs, **GREEDY))
