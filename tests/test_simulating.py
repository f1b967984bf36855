"""Machines that need not be here: their descriptions, what is predicted of plans, and predictions beside a made-up clock."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_anee import layer_runner, timing
from modeling_anee.base_linear import JointLinear
from modeling_anee.costs import map_work
from modeling_anee.machines import measuring
from modeling_anee.machines.analytic import Analytic, kv_bytes
from modeling_anee.machines.checking import BATCHES, PREFILL_SHARE, check, errors_of, points_of
from modeling_anee.machines.description import FOLDER, Description
from modeling_anee.machines.energy import EnergyModel
from modeling_anee.machines.fitted import described, fitted, peaks_of
from modeling_anee.machines.measuring import measure
from modeling_anee.machines.prediction import PARTS
from modeling_anee.machines.simulating import LEVELS, Case, Machine, plans_at, roofline, simulate
from modeling_anee.machines.workload import Counter

from .profiles import BYTES, FLOPS, LAUNCH, profile_of
from .test_profile import LITTLE
from .tiny import BRIDGES, tiny_base, wrap


NAMES = sorted(file.stem for file in FOLDER.glob("*.json"))
SOME = replace(LITTLE, rows=(1, 2, 4, 8, 16), head_rows=(1, 2, 4, 8), batches=(1, 2, 4, 8), prompts=(2, 8, 16))


@pytest.fixture(scope="module")
def model():
    return wrap(tiny_base(), precisions=["int8", "int4"], **BRIDGES)


@pytest.fixture(scope="module")
def counter(model):
    return Counter.of(model)


@pytest.fixture(params=NAMES)
def machine(request):
    return Description.find(request.param)


def numbers(value):
    """All dicts with a source in a description."""
    if isinstance(value, dict):
        return [value] if "value" in value else [one for inner in value.values() for one in numbers(inner)]
    return []


def test_all_machines_that_were_asked_for_are_described():
    assert {"a100", "h100", "laptop-cpu", "made-up-accelerator", "phone-soc", "raspberry-pi-5"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_a_machine_has_a_source(name):
    found = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert found["name"] == name and len(numbers(found)) >= 9
    assert all(set(one) == {"value", "source"} and len(one["source"]) > 5 for one in numbers(found))
    assert {field for field, value in found.items() if not isinstance(value, dict)} == {"format", "name", "about"}


def test_what_is_there_runs_in_the_narrowest_arithmetic_that_is_not_too_narrow():
    made_up, board, gpu = (Description.find(name) for name in ("made-up-accelerator", "raspberry-pi-5", "h100"))
    assert made_up.precision_of("int4", "float32") == "int4" and board.precision_of("int4", "float32") == "int8"
    assert board.precision_of("full", "bfloat16") == "float32" and gpu.precision_of("full", "bfloat16") == "bfloat16"
    assert gpu.precision_of("full", "float16") == "float32" and gpu.precision_of("int8", "float32") == "int8"


def test_time_grows_with_everything_that_runs(machine, counter):
    by = Analytic(machine)
    full, cheap = counter.workload("4*PROCESS"), counter.workload("4*INT4 / int4")
    skipped = counter.workload("PROCESS, 3*SKIP")
    one = by.decode(full, 1, 10)
    assert list(one.parts) == list(PARTS) and min(one.parts.values()) >= 0
    assert one.total < by.decode(full, 1, 100).total and one.total < by.decode(full, 8, 10).total
    assert one.total > by.decode(cheap, 1, 10).total and by.prefill(full, 1, 64).total > by.prefill(full, 1, 8).total
    assert by.decode(skipped, 1, 10).parts["attention maps"] == pytest.approx(one.parts["attention maps"] / 4)
    assert one.parts["context"] * 8 == pytest.approx(by.decode(full, 8, 10).parts["context"])


@pytest.mark.parametrize("rows", [1, 64, 4096])
def test_a_linear_map_is_limited_by_bytes_or_by_arithmetic(machine, counter, rows):
    by, load = Analytic(machine), counter.workload("4*INT8 / int8")
    for kernel in load.kernels:
        ms = by.map_ms(kernel, rows) - by.launch_ms
        assert ms == pytest.approx(max(by.memory_ms(kernel, rows), by.arithmetic_ms(kernel, rows)))
        assert rows * kernel.flops / ms <= machine.ops_per_ms(machine.precision_of("int8", "float32")) * (1 + 1e-9)


def test_hardware_that_skips_by_itself_still_reads_the_flag(counter):
    made_up = Description.find("made-up-accelerator")
    load = counter.workload("PROCESS, 3*SKIP")
    free = replace(made_up, skip_us=replace(made_up.skip_us, value=0.0))
    more = Analytic(made_up).decode(load, 1, 1).total - Analytic(free).decode(load, 1, 1).total
    assert more == pytest.approx(6 * made_up.skip_us.value / 1e3)


def test_joules_are_time_bytes_and_operations(machine, counter):
    model, load = EnergyModel(machine), counter.workload("4*INT8 / int8")
    watts = machine.idle_watts.value
    assert model.joules(2.0, 0.0, {}) == pytest.approx(2 * watts)
    assert model.joules(0.0, 1e12, {"full": 1e12}) == pytest.approx(machine.byte_pj.value + machine.op_pj["float32"].value)
    found = model.of_call(load, 3.0, 4, 4, 40)
    flops = sum(kernel.flops for kernel in load.kernels)
    moved = load.weight_bytes + 40 * kv_bytes(load)
    assert found == pytest.approx(3e-3 * watts + moved * model.byte + 4 * flops * model.operation("int8"))


def test_a_measured_machine_reaches_its_own_roof(model, counter):
    profile = profile_of(model)
    own = described(profile, Description.find("server-cpu"))
    assert own.bandwidth_gb_s.value == pytest.approx(BYTES / 1e6)
    assert max(peaks_of(profile).values()) <= FLOPS / 1e6
    by = fitted(profile, own)
    for plan in ("4*PROCESS", "4*INT8 / int8", "4*INT4 / int4"):
        for kernel in counter.workload(plan).kernels:
            known = profile.map_of(kernel)
            for rows in known.rows:
                assert by.map_ms(kernel, rows) == pytest.approx(known.at(rows), rel=0.35)


def test_rows_of_a_simulation_say_how_they_are_known(model, counter):
    profile, machine = profile_of(model), Description.find("h100")
    machines = [Machine.described(machine, "float32"), Machine.profiled(profile, machine)]
    rows = simulate(counter, plans_at(model, [1.0, 0.3]), machines, Case(2, 10, 8))
    assert [row["level"] for row in rows] == ["analytic"] * 2 + [*LEVELS] * 2
    for row in rows:
        assert sum(row["decode_parts_ms"].values()) == pytest.approx(row["decode_ms"])
        assert row["tokens_per_second"] == pytest.approx(2e3 / row["decode_ms"]) and row["joules_per_token"] > 0
        assert row["fits"] and (row["plan"] == "4*PROCESS") == (row["budget"] == 1.0)
    small = replace(machine, memory_gb=replace(machine.memory_gb, value=1e-9))
    assert not simulate(counter, {1.0: "4*PROCESS"}, [Machine.described(small, "float32")], Case(1, 1, 1))[0]["fits"]


def test_plans_are_the_dearest_within_budgets(model):
    found = plans_at(model, [1.0, 0.5, 0.0])
    table = model.config.table
    costs = [float(model.costs.of_plans(*_numbers(table, plan))) for plan in found.values()]
    assert costs == sorted(costs, reverse=True) and costs[0] == pytest.approx(1.0) and costs[1] <= 0.5
    assert costs[2] == pytest.approx(model.controller.table.floor)


def _numbers(table, plan):
    return torch.tensor(table.plan(plan, 4), dtype=torch.uint8), torch.tensor(table.head_of(plan))


def test_points_under_a_roof_are_those_of_the_maps(model, counter):
    profile = profile_of(model)
    machine = Machine.profiled(profile, Description.find("h100"))
    points = roofline([counter.workload("4*INT8 / int8")], machine, (1, 64), profile)
    assert {point["rows"] for point in points if point["level"] == "measured"} == {1}
    for point in points:
        if point["level"] == "analytic":
            assert point["gops"] <= point["operations_per_byte"] * machine.description.bandwidth_gb_s.value * (1 + 1e-9)


@pytest.fixture
def roof_clock(monkeypatch):
    """Time passes in linear maps alone, as they take on the made-up machine; none runs by itself."""
    now, works, called = [0.0], {}, JointLinear.__call__
    ticks = iter(lambda: now.__setitem__(0, now[0] + 1e-12) or now[0], None)

    def timed(self, x, *args):
        if self not in works:
            works[self] = map_work([self])
        work, rows = works[self], x.numel() // x.shape[-1]
        now[0] += (LAUNCH + max(work.weight_bytes / BYTES, work.flops * rows / FLOPS)) / 1e3
        return called(self, x, *args)

    monkeypatch.setattr(JointLinear, "__call__", timed)
    monkeypatch.setattr(timing, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(layer_runner, "is_alone", lambda hidden, masks: False)
    monkeypatch.setattr(measuring, "READ", 1 << 16)


@pytest.mark.usefixtures("roof_clock")
def test_predictions_are_what_is_then_measured(monkeypatch):
    plain = wrap(tiny_base(), precisions=["int8", "int4"])
    profile = replace(measure(plain, lambda count: None, SOME), bandwidth=BYTES, launch_ms=LAUNCH)
    machine = Machine.profiled(profile, Description.find("server-cpu"))
    monkeypatch.setattr("modeling_anee.machines.checking.CONTEXTS", (2, 12))
    monkeypatch.setattr("modeling_anee.machines.checking.PROMPTS", (3, 15))
    points, done = points_of(plain, 12, 0, 30), []
    report = check(plain, machine.levels, points, 1, done.append)
    assert len(done) == len(report["points"]) == 12
    assert report["errors"]["measured"]["median"] < 0.02 and report["errors"]["measured"]["ninetieth"] < 0.05
    assert report["errors"]["fitted"]["median"] < 0.2


def test_points_are_of_plans_batches_and_lengths_at_random(model):
    points = points_of(model, 40, 3, 400)
    assert points == points_of(model, 40, 3, 400) != points_of(model, 40, 4, 400)
    assert sum(point.kind == "prefill" for point in points) == PREFILL_SHARE * 40
    assert {point.batch for point in points} <= set(BATCHES) and max(point.length for point in points) < 400
    assert len({point.plan for point in points}) > 3


@given(st.lists(st.floats(-0.5, 0.5), min_size=1, max_size=30))
def test_errors_are_relative_and_have_no_sign(deviations):
    found = errors_of([{"ms": 2.0, "measured": 2.0 * (1 + one)} for one in deviations], "measured")
    assert 0 <= found["median"] <= found["ninetieth"] <= 0.5 + 1e-9
    assert abs(found["ratio"] - 1) <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="x"), "format='x'"),
        (lambda d: d["bandwidth_gb_s"].update(source=" "), "bandwidth_gb_s: source='' is not allowed"),
        (lambda d: d["bandwidth_gb_s"].update(value=-1), "value=-1.0 is not allowed"),
        (lambda d: d["bandwidth_gb_s"].update(value=0), "bandwidth_gb_s=0 is not allowed"),
        (lambda d: d.update(memory_gb=8), "memory_gb=8 is not allowed: it must be an object"),
        (lambda d: d["peak_gops"].pop("float32"), "float32 among them"),
        (lambda d: d["op_pj"].update(int3={"value": 1, "source": "nobody"}), "int3"),
        (lambda d: d.pop("launch_us"), "no 'launch_us'"),
    ],
)
def test_what_is_no_description_is_refused(change, message, tmp_path):
    found = json.loads((FOLDER / "h100.json").read_text(encoding="utf-8"))
    change(found)
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=message):
        Description.find(str(file))


def test_an_unknown_machine_is_told_with_those_that_are_known():
    with pytest.raises(ValueError, match="hardware 'h1000' is not allowed: it must be a JSON file or one of a100, h100"):
        Description.find("h1000")


def test_what_is_narrow_is_a_part_of_what_was_measured():
    model = wrap(tiny_base(), precisions=["int8", "int4"], narrow=["int4_half"])
    profile, counter = profile_of(model), Counter.of(model)
    names = [name for name in model.config.table.names if "HALF" in name]
    (narrow, whole) = (counter.workload(f"{plan}, 3*INT4 / int8").layers[0] for plan in (names[0], "INT4"))
    machine = Machine.profiled(profile, Description.find("raspberry-pi-5"))
    for level in LEVELS:
        parts = [machine.levels[level].decode(counter.workload(f"4*{plan} / int8"), 1, 1) for plan in (names[0], "INT4")]
        assert parts[0].total < parts[1].total
    less = [a.weight_bytes < b.weight_bytes for a, b in zip(narrow.kernels, whole.kernels, strict=True)]
    assert any(less) and all(
        profile.ms_of(one, 1) < profile.ms_of(two, 1)
        for one, two, is_less in zip(narrow.kernels, whole.kernels, less, strict=True)
        if is_less
    )
