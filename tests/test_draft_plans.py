"""Plans that draft."""

import pytest
import torch

from modeling_anee.cache import AneeCache
from modeling_anee.draft_plans import draft_plans, draft_texts, full_plan
from modeling_anee.feed import Feed, why_not

from .tiny import BRIDGES, CONFIGS, tiny_base, token_ids, wrap


def test_every_precision_is_tried_with_its_own_head_and_with_the_dearest():
    assert draft_texts(["int8", "int4"], 4) == ["4*INT8 / int8", "4*INT4 / int8", "4*INT4 / int4"]
    assert draft_texts(None, 30) == draft_texts([], 30) == ["30*INT8 / int8"]


def test_costs_are_those_of_the_model_and_in_bytes():
    model = wrap(precisions=["int8"], cost_unit="flops")
    (plan,) = draft_plans(model, ["4*INT8 / int8"])
    assert plan.cost == pytest.approx(1.0) and plan.weights_read < 0.5
    full = full_plan(model)
    assert full.cost == full.weights_read == 1.0


def test_a_plan_that_leaves_the_stack_early_is_refused():
    with pytest.raises(ValueError, match="leaves the stack early"):
        draft_plans(wrap(), ["2*PROCESS, 2*EXIT"])


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("text", ["4*PROCESS", "4*INT8 / int8", "INT8, SKIP, SKIP_FFN, INT8 / int8"])
def test_feeding_tokens_gives_what_a_forward_gives(family, text):
    """One by one, several at once, and after some were forgotten again; past the window of layers that have one."""
    model = wrap(tiny_base(family), precisions=["int8", "int4"], **BRIDGES)
    ids, (plan,) = token_ids(2), draft_plans(model, [text])
    actions = torch.tensor(plan.actions, dtype=torch.uint8).expand(*ids.shape, -1).contiguous()
    step_hidden, step = model.begin(input_ids=ids, cache=AneeCache(model.stack.blocks))
    expected, _ = model.executor.run(step_hidden, step, given=actions)
    expected = plan.head(expected)
    feed = Feed(model.stack, AneeCache(model.stack.blocks), torch.zeros(1, 1, dtype=torch.int64))
    found = [feed.run(ids[:, :3], plan), *(feed.run(ids[:, n : n + 1], plan) for n in range(3, 6)), feed.run(ids[:, 6:], plan)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=2e-3, atol=2e-3)
    feed.rewind(8)
    torch.testing.assert_close(feed.run(ids[:, 4:], plan), expected[:, 4:], rtol=2e-3, atol=2e-3)


def test_why_tokens_can_not_be_fed():
    model = wrap()
    assert why_not(model.stack, AneeCache(model.stack.blocks)) == ""
    assert "no cache" in why_not(model.stack, None)
    longrope = wrap(tiny_base("phi3-longrope"))
    assert "length of the text" in why_not(longrope.stack, AneeCache(longrope.stack.blocks))
