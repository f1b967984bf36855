"""Settings of every test."""

import logging
import os

import pytest
import torch
from transformers.utils.logging import warning_once

from modeling_anee import execution

from .children import Forks


if "PYTEST_XDIST_WORKER" in os.environ:  # workers, and the processes that they start, share the cores
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


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


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Quickly made processes, by default without our package."""
    made = Forks(tmp_path_factory.mktemp("home"))
    yield made
    made.stop()
