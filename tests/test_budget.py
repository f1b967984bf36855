"""The dial: exact where it was calibrated, monotone between, and neutral where there is nothing to go by."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_anee.budget import Dial

from .fakes import relaxed


@st.composite
def tables(draw) -> dict:
    budgets = sorted(draw(st.sets(st.floats(0, 1, width=32), min_size=1, max_size=8)))
    count = len(budgets)
    settings = sorted(draw(st.lists(st.floats(-100, 100), min_size=count, max_size=count)), reverse=draw(st.booleans()))
    return {"budgets": budgets, "settings": settings}


@given(tables())
@relaxed
def test_calibrated_budgets_have_their_setting(table):
    found = Dial(table, neutral=7.0).setting(torch.tensor(table["budgets"], dtype=torch.float64))
    assert found.dtype == torch.float64 and found.tolist() == table["settings"]


@given(tables(), st.lists(st.floats(0, 1), min_size=2, max_size=20))
@relaxed
def test_it_is_monotone_and_stays_within_what_was_calibrated(table, budgets):
    found = Dial(table, neutral=7.0).setting(torch.tensor(sorted(budgets), dtype=torch.float64)).tolist()
    settings = table["settings"]
    assert found == sorted(found, reverse=settings[0] > settings[-1])
    assert min(settings) <= min(found) and max(found) <= max(settings)


def test_it_is_linear_between_calibrated_budgets():
    dial = Dial({"budgets": [0.2, 0.6, 0.8], "settings": [4.0, 2.0, 0.0], "cost": [0.2, 0.6, 0.8]}, neutral=7.0)
    found = dial.setting(torch.tensor([0.0, 0.2, 0.3, 0.5, 0.7, 0.8, 1.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([4.0, 4.0, 3.5, 2.5, 1.0, 0.0, 0.0]) and dial.calibrated


@pytest.mark.parametrize("table", [None, {"budgets": [0.5], "cost": [0.4]}])
def test_without_settings_it_is_neutral(table):
    dial = Dial(table, neutral=0.25)
    assert not dial.calibrated
    assert dial.setting(torch.linspace(0, 1, 5, dtype=torch.float64)).tolist() == [0.25] * 5


def test_it_is_made_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        dial = Dial({"budgets": [0.2, 0.6], "settings": [4.0, 2.0]}, neutral=7.0)
    assert dial.setting(torch.tensor([0.4], dtype=torch.float64)).tolist() == pytest.approx([3.0])
