"""Budgets that follow the machine's load and its battery, with what psutil tells faked."""

import importlib
from types import SimpleNamespace

import psutil
import pytest

from modeling_anee import timing
from modeling_anee.budget_sources import Progress
from modeling_anee.processors import Processors
from modeling_anee.resources import Battery, SystemLoad

from .tiny import token_ids, wrap


def progress(seconds):
    return Progress(seconds, 0.0, 1, 10, 1.0, 0.0)


@pytest.mark.parametrize("kind", [SystemLoad, Battery])
def test_the_budget_is_the_share_that_is_free_between_the_bounds(kind):
    free = iter([1.0, 0.5, 0.0, 2.0, -1.0])
    ask = kind(read=lambda: next(free), every=1.0, lowest=0.2, highest=0.8).begin(None)
    assert [ask(progress(seconds)) for seconds in (0.0, 0.5, 1.1, 2.0, 2.2, 3.5, 5.0)] == [0.8, 0.8, 0.5, 0.5, 0.2, 0.8, 0.2]


def test_a_generation_follows_it():
    free = iter([1.0] * 3 + [0.7] * 10)
    model = wrap(keep_first_tokens=0)
    mode = {"max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True}
    output = model.generate(token_ids(1, 4), energy_budget=SystemLoad(read=lambda: next(free), every=1e-12), **mode)
    assert output.execution.budget[0].tolist() == [1.0] * 6 + [0.7] * 3


def test_what_others_use_is_not_free(monkeypatch):
    clock, others, own = [0.0], [0.0], [0.0]
    monkeypatch.setattr(timing, "perf_counter", lambda: clock[0])

    class Times(tuple):
        idle, iowait, guest, guest_nice = 5.0, 0.0, 0.0, 0.0

    fake = SimpleNamespace(
        cpu_count=lambda: 4,
        cpu_times=lambda: Times((others[0] + own[0], 5.0)),
        Process=lambda: SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=own[0], system=0.0)),
    )
    read = Processors(fake).free
    assert read() == 1.0
    for seconds, used, ours, free in (
        (1.0, 0.0, 2.0, 1.0),
        (1.0, 1.0, 3.0, 0.75),
        (2.0, 8.0, 0.0, 0.0),
        (0.001, 0.0, 0.0, 0.0),
    ):
        clock[0], others[0], own[0] = clock[0] + seconds, others[0] + used, own[0] + ours
        assert read() == pytest.approx(free)


def test_this_machine_can_be_read():
    assert 0.0 <= SystemLoad().begin(None)(progress(0.0)) <= 1.0


@pytest.mark.parametrize(("plugged", "percent", "budget"), [(True, 20, 1.0), (False, 20, 0.2), (False, 100, 1.0)])
def test_a_battery_counts_only_while_it_is_used(plugged, percent, budget, monkeypatch):
    battery = SimpleNamespace(power_plugged=plugged, percent=percent)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    assert Battery().begin(None)(progress(0.0)) == budget


@pytest.mark.parametrize("missing", [True, False])
def test_a_machine_without_a_battery_says_so(missing, monkeypatch):
    if missing:
        monkeypatch.delattr(psutil, "sensors_battery", raising=False)
    else:
        monkeypatch.setattr(psutil, "sensors_battery", lambda: None, raising=False)
    with pytest.raises(ValueError, match="psutil finds no battery"):
        Battery()


@pytest.mark.parametrize("kind", [SystemLoad, Battery])
def test_without_psutil_it_says_what_to_install(kind, monkeypatch):
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: real("no_such_module" if name == "psutil" else name))
    with pytest.raises(ImportError, match=rf"{kind.__name__} needs psutil: pip install 'modeling-anee\[resources\]'"):
        kind()
    kind(read=lambda: 0.5)


def test_a_time_between_readings_must_be_above_zero():
    with pytest.raises(ValueError, match="every=0"):
        SystemLoad(read=lambda: 0.5, every=0)
