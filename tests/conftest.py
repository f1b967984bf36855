"""Settings of every test."""

import logging
import os
import zlib

import pytest
import torch
import transformers
from transformers.utils.logging import warning_once

from modeling_anee import hardware

from .children import Forks
from .clocks import passes_with_cost


if "PYTEST_XDIST_WORKER" in os.environ:  # workers, and the processes that they start, share the cores
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


os.environ.setdefault("ANEE_KERNELS", "default")  # results that don't depend on what else runs here

AS_SHIPPED = hardware.GATHERING_FLOPS["cpu"]
SLOW_LIMIT = 1500  # seconds


def pytest_report_header():
    """What `make newest` and `make oldest` differ in."""
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(SLOW_LIMIT))


@pytest.fixture(autouse=True)
def gathering(request, monkeypatch):
    """Most tests gather always, since tiny models never would. A quarter, chosen by name, gather where it pays, as shipped."""
    always = zlib.crc32(request.node.nodeid.encode()) % 4 > 0
    monkeypatch.setitem(hardware.GATHERING_FLOPS, "cpu", 0.0 if always else AS_SHIPPED)
    request.node.add_report_section("setup", "gathering", "always" if always else "where it pays")


@pytest.fixture
def always_gather(gathering, monkeypatch):
    """For tests of what is run and what is not: where gathering does not pay, some runs for nobody."""
    monkeypatch.setitem(hardware.GATHERING_FLOPS, "cpu", 0.0)


@pytest.fixture
def clock(monkeypatch):
    """What stands in for the time where speed is measured, a list with the seconds: a token takes as many as it costs."""
    now = [0.0]

    def passes(cost):
        now[0] += float(cost.mean(dim=0).sum())

    passes_with_cost(monkeypatch, lambda: now[0], passes)
    return now


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
