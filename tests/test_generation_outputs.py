"""What `generate` returns, field by field: at full budget the base's own, whatever the way of decoding and the cache."""

import pytest
import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.utils import ModelOutput

from modeling_anee.compatibility import CACHE, cache_argument

from .tiny import LAYERS, tiny_base, token_ids, wrap


NEW = 3
IDS = token_ids(2, 7)
EVERYTHING = {"output_scores": True, "output_logits": True, "output_hidden_states": True, "return_dict_in_generate": True}
MODES = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 10},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams without cache": {"num_beams": 3, "use_cache": False},
    "sampled beams": {"do_sample": True, "num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "beams in a static cache": {"cache_implementation": "static", "num_beams": 2},
    "chunks": {"prefill_chunk_size": 3},
    "guidance": {"guidance_scale": 1.5},
}
ONE_ROW = {"lookup": {"prompt_lookup_num_tokens": 2}, "sampled lookup": {"prompt_lookup_num_tokens": 2, "do_sample": True}}


def assert_same(found, expected, name="output"):
    """The same structure and values; a sliding window of the base's has only the last of our tokens."""
    if isinstance(expected, torch.Tensor):
        assert found.shape == expected.shape and found.dtype == expected.dtype, name
        torch.testing.assert_close(found, expected, msg=lambda message: f"{name}: {message}")
    elif isinstance(expected, Cache):
        assert len(found) == len(expected) == LAYERS and found.get_seq_length() == expected.get_seq_length(), name
        for index, (own, other) in enumerate(zip(found.layers, expected.layers, strict=True)):
            kept = [x[:, :, -other.keys.shape[2] :] for x in (own.keys, own.values)]
            assert_same(kept, [other.keys, other.values], f"{name}, layer {index}")
    elif isinstance(expected, ModelOutput):
        assert [field for field in found if field != "execution"] == list(expected), name
        for field in expected:
            assert_same(found[field], expected[field], f"{name}.{field}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), name
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{name}[{index}]")
    else:
        assert found == expected, name


def generated(model, ids=IDS, **mode):
    torch.manual_seed(0)
    mode = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | EVERYTHING | mode
    return model.generate(ids, attention_mask=torch.ones(len(IDS if ids is None else ids), 7, dtype=torch.long), **mode)


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt2"])
def models(request):
    base = tiny_base(request.param)
    return base, wrap(base)


@pytest.mark.parametrize("mode", MODES)
def test_outputs_are_the_bases(models, mode):
    expected, found = (generated(model, **MODES[mode]) for model in models)
    assert_same(found, expected)
    assert found.execution is not None


@pytest.mark.parametrize("mode", ONE_ROW)
def test_outputs_of_candidates_are_the_bases(models, mode):
    expected, found = (generated(model, IDS[:1], **ONE_ROW[mode]) for model in models)
    assert_same(found, expected)


@pytest.mark.parametrize("mode", ["greedy", "beams", "static cache"])
def test_outputs_from_embeddings_are_the_bases(models, mode):
    expected, found = (
        generated(model, None, inputs_embeds=models[0].get_input_embeddings()(IDS), **MODES[mode]) for model in models
    )
    assert_same(found, expected)


@pytest.mark.parametrize("kind", ["dynamic", "empty", "static"])
def test_a_users_cache_comes_back_as_the_base_leaves_it(models, kind):
    config = models[0].config
    make = {
        "dynamic": lambda: DynamicCache(config=config),
        "empty": DynamicCache,
        "static": lambda: StaticCache(config=config, max_cache_len=16),
    }[kind]
    caches = make(), make()
    expected, found = (generated(model, **cache_argument(cache)) for model, cache in zip(models, caches, strict=True))
    assert found[CACHE] is caches[1] and len(caches[1]) == len(caches[0])
    for own, other in zip(caches[1].layers, caches[0].layers, strict=True):
        assert_same((own.keys, own.values), (other.keys, other.values))
    assert torch.equal(found.sequences, expected.sequences)


def test_beams_are_scored_as_the_bases(models):
    scores = []
    for model in models:
        output = generated(model, num_beams=3)
        scores.append(model.compute_transition_scores(output.sequences, output.scores, output.beam_indices))
    torch.testing.assert_close(*scores)


def test_a_prompt_of_nothing_begins_with_bos(models):
    expected, found = (model.generate(max_new_tokens=NEW, do_sample=False) for model in models)
    assert torch.equal(found, expected)
