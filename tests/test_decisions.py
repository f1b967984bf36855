"""What is recorded of windows: the model's own traces, and how sure its controller is."""

import pytest
import torch

from modeling_anee.data.windows import Window
from modeling_anee.evaluation.decisions import Listener, counted_from, record
from modeling_anee.evaluation.entropy import entropy

from .tiny import CONTROLLERS, token_ids, wrap


TOKENS, BUDGET = 20, 0.6


def windows_of(count=3, tokens=TOKENS):
    return [Window(row, 1) for row in token_ids(count, tokens)]


@pytest.mark.parametrize("precisions", [None, ["int8", "int4"]])
@pytest.mark.parametrize("kind", CONTROLLERS)
def test_what_is_recorded_is_what_the_model_does(kind, precisions):
    model, windows = wrap(controller=kind, precisions=precisions), windows_of()
    before = model.executor.controller
    done, first = [], counted_from(model, windows)
    recorded = record(model, windows, BUDGET, done.append)
    with torch.no_grad():
        trace = model(torch.stack([window.ids for window in windows]), energy_budget=BUDGET).execution
    assert torch.equal(recorded.actions, trace.actions[:, first:].flatten(0, 1))
    heads = torch.zeros_like(trace.actions[..., 0]) if trace.head is None else trace.head
    assert torch.equal(recorded.heads, heads[:, first:].flatten())
    torch.testing.assert_close(recorded.cost, trace.cost[:, first:].flatten())
    assert done == [1] * len(windows) and model.executor.controller is before
    asks = kind == "learned" or (kind == "gated" and precisions is None)  # with them gated plans are fixed at this budget
    assert bool(recorded.router_entropy) == asks


def test_the_entropy_of_a_router_is_that_of_its_probabilities_over_the_counted_tokens():
    model, windows = wrap(controller="learned", decision_interval=2, keep_first_tokens=4), windows_of()
    heard = []

    class Loud(type(model.controller)):
        def probabilities(self, segment, seen):
            heard.append((segment, seen.index, super().probabilities(segment, seen)))
            return heard[-1][-1]

    model.controller.__class__ = Loud
    recorded = record(model, windows, BUDGET)
    assert counted_from(model, windows) == 4
    for segment, (start, stop) in enumerate(model.controller.segments):
        own = torch.cat([likely[index >= 4] for place, index, likely in heard if place == segment])
        for layer in range(start, stop):
            assert recorded.router_entropy[layer] == pytest.approx(float(entropy(own[:, layer - start]).mean()))


def test_one_choice_for_a_segment_is_told_of_its_first_layer():
    model = wrap(controller="routed", precisions=["int4"])
    start = model.controller.segments[1][0]

    class Even(type(model.controller)):
        def probabilities(self, segment, seen):
            return None if segment == 0 else torch.full((len(seen.index), 1, 4), 0.25)

    model.controller.__class__ = Even
    assert record(model, windows_of(), 0.9 * model.controller.top).router_entropy == {start: 2.0}


def test_at_a_budget_of_one_nobody_is_asked():
    recorded = record(wrap(controller="learned"), windows_of(), 1.0)
    assert not recorded.actions.any() and recorded.router_entropy == {}


def test_a_listener_is_its_controller_to_everybody_else():
    controller = wrap(controller="plan").controller
    listener = Listener(controller, 0)
    assert listener.segments is controller.segments and listener.floor == controller.floor
    with pytest.raises(AttributeError):
        listener.nothing  # noqa: B018


def test_windows_that_have_nothing_to_count_and_hidden_states_that_are_no_numbers_are_refused():
    model = wrap(keep_first_tokens=4)
    with pytest.raises(ValueError, match="windows of 4 tokens have none to count: the first 4 never are"):
        record(model, windows_of(tokens=4), BUDGET)
    with pytest.raises(ValueError, match="windows is empty"):
        record(model, [], BUDGET)
    with torch.no_grad():
        model.base.lm_head.weight.fill_(torch.nan)
        model.base.model.norm.weight.fill_(torch.nan)
        model.base.model.embed_tokens.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"window 1 of 3 at budget 0.6 has hidden states that are not finite"):
        record(model, windows_of(), BUDGET)
