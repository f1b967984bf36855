"""Timed decoding: every row has a time, the tokens are a text's own, one by one, and nothing is left of them."""

import pytest
import torch

from modeling_anee.data.windows import windows
from modeling_anee.evaluation.comparison import as_text, compare, with_times
from modeling_anee.evaluation.controls import Control, controls, follow
from modeling_anee.evaluation.decode_time import Timing, decode_times, feed_of, feed_of_control, feeds_of
from modeling_anee.evaluation.uniform import uniform_precisions

from .tiny import BRIDGES, tiny_base, token_ids, wrap


TIMING = Timing(tokens=5, repeats=2, context=4)
BUDGETS = [0.3, 0.2]
PLANS = ["4*INT8 / int8", "INT8, 2*SKIP_INT8, INT8 / int8"]


@pytest.fixture(scope="module")
def models():
    base = tiny_base()
    fields = {"precisions": ["int8", "int4"], **BRIDGES}
    return {"routed": wrap(base, "routed", min_layers=1, **fields), "mine": wrap(base, "plan", plans=PLANS, **fields)}


@pytest.fixture(scope="module")
def text():
    return windows(token_ids(1, 60)[0], 20)


@pytest.mark.parametrize("cost_unit", ["bytes", "flops"])
def test_every_row_of_a_comparison_has_a_time_unless_it_is_no_way_to_save(models, text, cost_unit):
    model = wrap(models["mine"].base, "plan", cost_unit=cost_unit, plans=["PPSP", "PSSP"])
    others, uniform = {"plan": model, "mine": models["mine"]}, uniform_precisions(model)
    oracle = Control("oracle", lambda ids, budget: follow(model, ids, torch.zeros(4, dtype=torch.uint8)))
    rows = compare(others, text, BUDGETS, [oracle], uniform=uniform)
    rows = with_times(rows, decode_times(feeds_of(others, BUDGETS, uniform, text, TIMING), TIMING))
    for row in rows:
        assert row["milliseconds"] is None if row["name"] == "oracle" else row["milliseconds"] > 0
    lines = as_text(rows).splitlines()
    assert lines[0].endswith("ms/token |") and {line.count("|") for line in lines} == {7}


@torch.no_grad()
def test_tokens_are_fed_one_by_one_and_forgotten_after_every_round(models, text):
    fed = []

    def counted(feed):
        def feed_and_count(places, cache):
            before = 0 if cache is None else cache.get_seq_length()
            cache = feed(places, cache)
            fed.append((places.start, places.stop))
            assert before == places.start and cache.get_seq_length() == places.stop
            return cache

        return feed_and_count

    feeds = feeds_of(models, BUDGETS, uniform_precisions(models["mine"]), text, TIMING)
    assert len(feeds) == 1 + 3 + len(BUDGETS) * (3 + 2) and {len(own) for own in feeds.values()} == {len(text)} == {3}
    times = decode_times({key: [counted(feed) for feed in own] for key, own in feeds.items()}, TIMING)
    assert times.keys() == feeds.keys()
    single = [(4, 5), (5, 6)]  # two tokens of each of three windows
    assert fed == [(0, 4)] * 3 * len(feeds) + single * 3 * len(feeds) * (1 + TIMING.repeats)


@pytest.mark.parametrize("count, taken, each", [(1, 1, 5), (2, 2, 3), (5, 5, 1), (7, 4, 2), (60, 5, 1)])
def test_tokens_come_from_windows_all_over_the_text(models, count, taken, each):
    feeds = feeds_of({"mine": models["mine"]}, [], [], windows(token_ids(1, 10 * count)[0], 10), TIMING)
    assert len(feeds["base", 1.0]) == taken and TIMING.places(taken) == range(4, 4 + each)


@pytest.mark.parametrize("place", range(3))
@torch.no_grad()
def test_a_control_is_decoded_as_it_is_scored(models, monkeypatch, place):
    model, ids = models["mine"], token_ids(1, 8)
    control = controls(model)[place]
    hidden, actions, head = control.run(ids, 0.25)
    expected, found = model.head_logits(model.stack.final_norm(hidden), head), []
    plain = type(model).head_logits
    monkeypatch.setattr(type(model), "head_logits", lambda self, *args: found.append(plain(self, *args)) or found[-1])
    feed = feed_of_control(model, control, ids, 0.25)
    cache = feed(slice(0, 1), None)
    for index in range(1, 8):
        cache = feed(slice(index, index + 1), cache)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=2e-3, rtol=1e-3)
    assert actions.shape == (1, 8, 4)


@torch.no_grad()
def test_a_model_decides_about_the_tokens_itself(models):
    model, ids = models["routed"], token_ids(1, 8)
    feed = feed_of(model, ids, 0.2)
    cache = feed(slice(0, 4), None)
    for index in range(4, 8):
        cache = feed(slice(index, index + 1), cache)
    traces = torch.cat([step.actions for step in cache.execution_log.steps], dim=1)
    assert torch.equal(traces, model(ids, energy_budget=0.2).execution.actions)
