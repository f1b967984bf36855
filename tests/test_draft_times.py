"""How long drafts take: measured once per machine, and kept."""

import json

import pytest

from modeling_anee import draft_times
from modeling_anee.base_kernels import KERNELS_VARIABLE
from modeling_anee.draft_plans import draft_plans, full_plan
from modeling_anee.draft_policy import MOST
from modeling_anee.draft_times import VERIFIED, interpolated, times_of
from modeling_anee.folders import CACHE_VARIABLE

from .tiny import wrap


@pytest.fixture
def model():
    return wrap(precisions=["int8", "int4"])


def plans_of(model):
    return full_plan(model), draft_plans(model, ["4*INT8 / int8", "4*INT4 / int8"])


def test_without_measuring_tokens_take_as_long_as_they_read_bytes(model):
    first, second = times_of(model, *plans_of(model), rows=1)
    assert first.full[0] == 1.0 and len(first.full) == MOST + 1 and list(first.full) == sorted(first.full)
    assert first.draft > second.draft and first.draft < 0.5


def test_measured_times_are_kept_for_the_next_time(model, tmp_path, monkeypatch):
    monkeypatch.delenv(KERNELS_VARIABLE)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    calls = []
    measure = draft_times.measure
    monkeypatch.setattr(draft_times, "measure", lambda *given: calls.append(given) or measure(*given))
    found = times_of(model, *plans_of(model), rows=1)
    assert all(one.draft > 0 and len(one.full) == MOST + 1 for one in found)
    assert times_of(model, *plans_of(model), rows=1) == found and len(calls) == 1
    times_of(model, *plans_of(model), rows=2)
    times_of(model, *plans_of(model), rows=1, anew=True)
    assert len(calls) == 3
    (file,) = (tmp_path / "drafts").iterdir()
    assert any("2 rows" in name for name in json.loads(file.read_text()))
    file.write_text("no JSON")
    times_of(model, *plans_of(model), rows=1)
    assert len(calls) == 4 and len(json.loads(file.read_text())) == 3


def test_what_lies_between_is_interpolated_and_never_falls():
    seconds = [float(count) for count in VERIFIED]
    assert interpolated(seconds) == [float(count + 1) for count in range(MOST + 1)]
    assert interpolated([5.0] + seconds[1:])[:3] == [5.0, 5.0, 5.0]


def test_measuring_leaves_the_model_as_it_was(model):
    before = model.executor.layers
    assert len(draft_times.measure(model, *plans_of(model), rows=2)) == 3
    assert model.executor.layers is before
