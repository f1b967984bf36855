"""Nothing that is given to a forward is swallowed."""

import pytest
import torch

from .tiny import LAYERS, tiny_base, token_ids, wrap


@pytest.mark.parametrize("name, near", [("energy_bugdet", "energy_budget"), ("atention_mask", "attention_mask"), ("zzz", None)])
def test_an_unknown_keyword_is_an_error_that_names_it(name, near):
    with pytest.raises(TypeError, match=f"{name!r}" + (f".*did you mean {near!r}" if near else "$")):
        wrap()(token_ids(), **{name: 0.5})


def test_token_types_are_refused_where_the_base_would_embed_them():
    ids = token_ids()
    with pytest.raises(TypeError, match="token_type_ids"):
        wrap(tiny_base("gpt2"))(ids, token_type_ids=torch.zeros_like(ids))


@pytest.mark.parametrize("keywords", [{"is_causal": False}, {"output_router_logits": True}, {"max_length_q": 5}])
def test_what_would_change_the_result_is_refused(keywords):
    with pytest.raises(ValueError, match=f"{next(iter(keywords))}.*not supported"):
        wrap()(token_ids(), **keywords)


def test_what_means_nothing_here_is_taken():
    model, ids = wrap(), token_ids()
    taken = model(ids, is_causal=True, output_router_logits=False, token_type_ids=None, num_items_in_batch=None)
    assert torch.equal(taken.logits, model(ids).logits)


@pytest.mark.parametrize("selection", [True, False, 0, -1, [0, -1], [1, 9], []])
def test_hidden_states_are_selected_as_the_base_does(selection):
    base, ids = tiny_base(), token_ids()
    expected = base(ids, output_hidden_states=selection).hidden_states
    found = wrap(base)(ids, output_hidden_states=selection).hidden_states
    assert (found is None) == (expected is None)
    for own, other in zip(found or (), expected or (), strict=True):
        assert (own is None) == (other is None)
        if own is not None:
            torch.testing.assert_close(own, other, atol=2e-5, rtol=1e-4)


def test_the_configuration_s_answers_count_as_arguments():
    model, ids = wrap(tiny_base(attn_implementation="eager")), token_ids()  # others don't let it be set
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == LAYERS + 1
    assert model(ids, output_hidden_states=False).hidden_states is None
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(ids)


def test_the_loss_takes_its_own_keywords():
    model, ids = wrap(), token_ids()
    plain = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=44).loss, plain * (2 * 11) / 44)
