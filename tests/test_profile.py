"""Profiles: measured, written, read again with a check, and what they predict; a clock that is made up."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_anee import timing
from modeling_anee.base_linear import JointLinear
from modeling_anee.machines import measuring
from modeling_anee.machines.choice import candidates, choose
from modeling_anee.machines.measuring import LEFT_OUT, VARIANTS, Effort, Plans, effort_for, measure
from modeling_anee.machines.prediction import PARTS, Predicted
from modeling_anee.machines.prices import fitted_line, prices_of
from modeling_anee.machines.profile import Profile, interpolated
from modeling_anee.machines.strict import cost_of
from modeling_anee.machines.workload import Counter

from .profiles import BYTES, LAUNCH, map_ms, profile_of
from .tiny import BRIDGES, FAMILIES, LAYERS, tiny_base, wrap


LITTLE = Effort(rows=(1, 2, 8), head_rows=(1, 2), batches=(1, 2), prompts=(4, 8), contexts=(3, 9), tokens=2, rounds=1)


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    monkeypatch.setattr(measuring, "READ", 1 << 16)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes in linear maps alone, one millisecond for each call and a hundredth for each row."""
    now, called = [0.0], JointLinear.__call__
    ticks = iter(lambda: now.__setitem__(0, now[0] + 1e-12) or now[0], None)

    def timed(self, x, *args):
        now[0] += 1e-3 + 1e-5 * (x.numel() // x.shape[-1])
        return called(self, x, *args)

    monkeypatch.setattr(JointLinear, "__call__", timed)
    monkeypatch.setattr(timing, "perf_counter", lambda: next(ticks))
    return now


@pytest.mark.parametrize("family", FAMILIES)
def test_a_machine_is_measured_for_any_family(family, tmp_path):
    steps = []
    made = measure(wrap(tiny_base(family)), steps.append, LITTLE)
    assert len(steps) == LITTLE.steps
    assert made.variants == list(VARIANTS) and [one.batch for one in made.decode] == [1, 2]
    assert [one.tokens for one in made.prompts] == [4, 8] and made.bandwidth > 0
    assert all(one.rows == ([1, 2] if one.name == "head" else [1, 2, 8]) for one in made.maps)
    made.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == made


def test_no_more_positions_are_measured_than_a_base_knows():
    effort = effort_for(wrap(tiny_base("gpt2")))
    assert max(effort.prompts) <= 128 and effort.contexts[1] + effort.tokens <= 128
    assert Effort().within(3).prompts == [3] and Effort().within(10**6).contexts == Effort().contexts


def test_measuring_changes_no_random_numbers_and_no_base(tmp_path):
    model = wrap(tiny_base())
    before, state = {name: p.clone() for name, p in model.base.named_parameters()}, torch.get_rng_state()
    measure(model, lambda count: None, LITTLE)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.base.named_parameters())


@pytest.mark.usefixtures("clock")
def test_linear_maps_are_told_from_what_is_around_them():
    made = measure(wrap(tiny_base()), lambda count: None, LITTLE)
    for one in made.maps:
        assert one.ms == pytest.approx([1 + 0.01 * rows for rows in one.rows])
    for step in made.decode:
        if step.batch > 1:  # alone, a token's maps are called otherwise
            assert list(step.layer_ms.values()) == pytest.approx([0.0] * len(VARIANTS), abs=1e-6)
            assert step.token_ms == pytest.approx(0.0, abs=1e-6) and step.context_ms == pytest.approx(0.0, abs=1e-6)
    for prompt in made.prompts:
        assert prompt.layer_ms["int8"] == pytest.approx(0.0, abs=1e-6)


def test_plans_that_are_measured_are_what_they_say():
    plans = Plans.over(wrap(tiny_base()))
    table = plans.model.controller.table
    for name, budget in plans.budgets.items():
        place = int(table.within(torch.tensor([budget], dtype=torch.float64)))
        names = {plans.model.config.table[action].attention for action in table.actions[place].tolist()}
        assert names == {LEFT_OUT if name == LEFT_OUT else name}


@pytest.fixture(scope="module")
def model():
    return wrap(tiny_base(), precisions=["int8", "int4"], **BRIDGES)


@pytest.fixture(scope="module")
def profile(model):
    return profile_of(model)


@pytest.mark.parametrize("plan", ["4*PROCESS", "PROCESS, INT8, SKIP_INT4, INT4_SKIP_FFN / int8", "4*SKIP_INT4 / int4"])
def test_predictions_are_the_sum_of_what_runs(model, profile, plan):
    load, by = Counter.of(model).workload(plan), Predicted.measured(profile)
    attending = sum(bool(layer.attention) for layer in load.layers)
    halves = attending + sum(bool(layer.feed_forward) for layer in load.layers)
    times = by.decode(load, 1, 10)
    maps = sum(map_ms(one, 1) if one.name != "bridge" else LAUNCH + one.weight_bytes / BYTES for one in load.kernels)
    assert times.total == pytest.approx(maps + 0.6 + halves * 0.01 + attending * 10 * 1e-4)
    assert list(times.parts) == list(PARTS)
    prompt = by.prefill(load, 2, 8)
    assert prompt.parts["context"] == pytest.approx(2 * attending * 64e-4) and prompt.parts["token"] == pytest.approx(0.3)
    assert by.decode(load, 4, 10).total > by.decode(load, 2, 10).total > times.total


def test_a_workload_counts_what_the_costs_count(model):
    counter, costs, table = Counter.of(model), model.costs, model.config.table
    for plan in ("4*PROCESS", "4*INT4 / int8", "2*INT8, SKIP, INT4_SKIP_FFN / int4"):
        load = counter.workload(plan)
        norms = sum(p.numel() for layer in model.base.model.layers for n, p in layer.named_parameters() if "norm" in n) * 4
        whole = cost_of(model, plan) * costs.total
        skipped = sum(table[action].attention == "none" for action in table.plan(plan, LAYERS))
        keys = skipped * costs.works["full"][0].keys_values.weight_bytes
        assert load.weight_bytes <= whole <= load.weight_bytes + norms + keys


def test_prices_are_those_of_a_machine_whose_maps_are_bytes_and_calls(model, profile):
    prices = prices_of(profile, context=100)
    for variant in VARIANTS:
        own = prices["variants"][variant]
        assert own["context_byte"] == pytest.approx(100 * 1e-4 / profile.kv_bytes)
        assert own["weight_byte"] == pytest.approx(1 / BYTES, rel=0.2) and own["launch"] == pytest.approx(0.015, rel=0.5)
    made = wrap(model.base, precisions=["int8", "int4"], cost_unit="ms", prices=prices)
    counter, by = Counter.of(made), Predicted.measured(profile)
    for plan in ("4*PROCESS", "4*INT8 / int8", "4*INT4 / int4"):
        asked = cost_of(made, plan) * made.costs.total
        assert asked == pytest.approx(by.decode(counter.workload(plan), 1, 100).total, rel=0.05)


@given(st.floats(0, 10), st.floats(0.001, 10))
def test_a_line_is_found_again(start, slope):
    found = fitted_line([(x, start + slope * x) for x in (1.0, 2.0, 5.0)])
    assert found == pytest.approx((start, slope), rel=1e-3, abs=1e-3)


def test_a_line_never_falls_below_zero():
    assert fitted_line([]) == (0.0, 0.0)
    for points in ([(1.0, 3.0), (2.0, 1.0)], [(1.0, 1.0), (2.0, 9.0)]):
        assert min(fitted_line(points)) >= 0.0


@given(st.floats(0.5, 40))
def test_what_lies_between_is_interpolated(place):
    assert interpolated([1, 4, 16], [2.0, 5.0, 17.0], place) == pytest.approx(max(place, 1.0) + 1.0)
    assert interpolated([3], [2.0], place) == 2.0


def test_the_best_plan_that_is_fast_enough_is_chosen(model, profile):
    listed = candidates(model, Predicted.measured(profile), 1, 10, lambda count: None)
    assert listed[0].plan == f"{LAYERS}*PROCESS" and listed[0].budget == pytest.approx(1.0)
    for one in listed:
        chosen = choose(listed, one.times.total)
        assert chosen.times.total <= one.times.total and listed.index(chosen) <= listed.index(one)
    with pytest.raises(ValueError, match="no plan is predicted to take 0.0001 ms or less: the fastest of"):
        choose(listed, 1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "format='other' is not allowed: it must be 'anee-profile-1'"),
        (lambda d: d.pop("maps"), "the file has no 'maps'"),
        (lambda d: d.update(mapz=[]), r"the unknown field 'mapz' \(did you mean 'maps'\?\)"),
        (lambda d: d["maps"][2].update(rows=[1, 1]), r"maps\[2\]: rows=\[1, 1\] are not allowed"),
        (lambda d: d["maps"][0]["ms"].__setitem__(0, "fast"), r"maps\[0\].ms\[0\]='fast' is not allowed: it must be a finite"),
        (lambda d: d["decode"][0].update(layer_ms=[3]), r"decode\[0\].layer_ms=\[3\] is not allowed: it must be an object"),
        (lambda d: d.update(prompts=[]), "not allowed to be empty"),
        (lambda d: d.update(bandwidth=0), "bandwidth=0.0 is not allowed: it must be above 0"),
    ],
)
def test_what_is_no_profile_is_refused(profile, change, message, tmp_path):
    file = tmp_path / "profile.json"
    profile.save(file)
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=message) as refused:
        Profile.load(file)
    assert str(file) in str(refused.value)
    file.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        Profile.load(file)


def test_the_page_on_costs_says_how_to_count_in_milliseconds(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[1] / "docs" / "costs.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    profile_of(wrap(base)).save(tmp_path / "anee_profile.json")
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "base"), "docs/costs.md", "exec"), {})
    assert "a token in full takes" in capsys.readouterr().out
