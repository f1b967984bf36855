"""Settings of every test."""

import pytest

from modeling_anee import execution


@pytest.fixture(autouse=True)
def always_gather(monkeypatch):
    """Tiny models would never gather; `test_execution` tests the choice."""
    monkeypatch.setitem(execution.GATHERING_FLOPS, "cpu", 0.0)
