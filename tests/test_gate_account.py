"""A text keeps its capacity: what each layer has run moves its thresholds, for each sequence by itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_anee.gate_account import FEEDBACK, choose_in_turn

from .fakes import fewer, seeds
from .tiny import calibration_of_gates, tiny_base, token_ids, wrap


def gated(thresholds=(0.0, 0.0), **fields):
    model = wrap(tiny_base(), "gated", exit_layers=[], **fields)
    model.config.calibration = calibration_of_gates(model.config, thresholds=thresholds)
    model.controller.bind(model.costs)
    return model


@fewer
@given(data=st.data())
def test_tokens_are_chosen_in_turn_each_sequence_by_its_own_account(data):
    generator = torch.Generator().manual_seed(data.draw(seeds))
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    count = sum(lengths)
    row = torch.repeat_interleave(torch.arange(len(lengths)) * 3, torch.tensor(lengths))
    score, limits = torch.randn(count, generator=generator).double(), torch.randn(count, 2, generator=generator).double()
    limits = limits.sort(dim=1, descending=True).values
    shares, start = torch.rand(count, generator=generator).double(), 5 * torch.randn(len(lengths), generator=generator).double()
    asked = torch.rand(count, generator=generator) < 0.8
    chosen = choose_in_turn([1.0, 0.3, 0.0], score, limits, shares, row, start[row // 3], asked)
    over = start.tolist()
    for token in range(count):
        own = int(row[token]) // 3
        choice = int((score[token] <= limits[token] + FEEDBACK * over[own]).sum())
        assert int(chosen[token]) == choice
        over[own] += float(asked[token]) * ([1.0, 0.3, 0.0][choice] - float(shares[token]))


@torch.no_grad()
@pytest.mark.parametrize("wrong", [-1.0, 0.0, 1.0])
def test_a_text_is_kept_at_its_shares_whatever_the_calibration_text_was_like(wrong):
    model = gated((wrong, wrong))
    for budget, share in ((0.3, 0.3), (0.6, 0.55), (0.9, 0.8)):
        trace = model(token_ids(1, 600), energy_budget=budget, use_cache=False).execution
        ran = trace.actions[:, model.controller.keep_first :, model.controller.gated_layers] == 0
        assert float(ran.float().mean()) == pytest.approx(share, abs=0.04)
    del model.config.calibration["shares"]
    model.controller.bind(model.costs)
    trace = model(token_ids(1, 120), energy_budget=0.3).execution
    assert trace.account is None


@torch.no_grad()
@pytest.mark.parametrize("change", ["padding", "packed"])
def test_accounts_are_of_sequences(change):
    model, ids = gated(), token_ids(1, 12)
    alone = [model(part, energy_budget=0.5).execution for part in (ids[:, :5], ids[:, 5:])]
    if change == "packed":
        positions = torch.tensor([[*range(5), *range(7)]])
        both = model(ids, position_ids=positions, energy_budget=0.5, use_cache=False).execution
        for one, span in zip(alone, (slice(0, 5), slice(5, 12)), strict=True):
            assert torch.equal(one.actions, both.actions[:, span])
            torch.testing.assert_close(one.account, both.account[:, span])
    else:
        padded = torch.cat((torch.zeros(1, 2, dtype=torch.int64), ids[:, :5]), dim=1)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
        both = model(padded, attention_mask=mask, energy_budget=0.5).execution
        assert torch.equal(alone[0].actions, both.actions[:, 2:])
        torch.testing.assert_close(alone[0].account, both.account[:, 2:])


@torch.no_grad()
def test_only_those_that_are_asked_count():
    model, ids = gated(), token_ids(1, 6)
    budgets = torch.tensor([[0.5, 1.0, 0.5, 1.0, 1.0, 0.4]], dtype=torch.float64)
    account = model(ids, energy_budget=budgets).execution.account
    assert account.shape == (1, 6, 4) and (account[:, :, [0, 3]] == 0).all() and (account[:, :2] == 0).all()
    assert torch.equal(account[:, 2], account[:, 3]) and torch.equal(account[:, 3], account[:, 4])
    assert not torch.equal(account[:, 4], account[:, 5]) and (account[:, 2, 1:3] != 0).all()
    assert gated(budget_mode="strict")(ids, energy_budget=0.5).execution.account is None
