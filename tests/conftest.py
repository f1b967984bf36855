"""Settings of every test."""

import logging

import pytest
from transformers.utils.logging import warning_once

from modeling_anee import execution


@pytest.fixture(autouse=True)
def always_gather(monkeypatch):
    """Tiny models would never gather; `test_execution` tests the choice."""
    monkeypatch.setitem(execution.GATHERING_FLOPS, "cpu", 0.0)


@pytest.fixture
def said():
    """What transformers' logger passes on from now on, what is said only once included."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    warning_once.cache_clear()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
