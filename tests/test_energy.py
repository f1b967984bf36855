"""Joules from counters that stand in for the machine's: a folder for RAPL's, a module for NVML."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modeling_anee.energy_counters import Counter, devices_of, rapl_counters
from modeling_anee.evaluation import energy
from modeling_anee.evaluation.benchmark import metered_runs
from modeling_anee.evaluation.energy import EnergyMeter


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
RANGE = 1_000_000


def zone(powercap: Path, place: str, name: str, value: int = 0) -> Path:
    """One RAPL domain, at 0 to `RANGE` microjoules."""
    folder = powercap / place
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (folder / "energy_uj").write_text(f"{value}\n")
    return folder / "energy_uj"


class FakeNvml:
    """The part of `pynvml` that is used, with one GPU."""

    class NVMLError(Exception):
        pass

    def __init__(self, problem: str = "", supported: bool = True) -> None:
        self.problem, self.supported, self.millijoules = problem, supported, 5000

    def nvmlInit(self):
        if self.problem:
            raise self.NVMLError(self.problem)

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return uuid

    def nvmlDeviceGetName(self, handle):
        return f"Toy {handle}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if not self.supported:
            raise self.NVMLError("Not Supported")
        return self.millijoules


@pytest.fixture
def use_nvml(monkeypatch):
    def use(nvml):
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
        return nvml

    return use


def test_joules_between_entering_and_leaving(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", "package-0", 200_000)
    with EnergyMeter([CPU], tmp_path) as meter:
        assert meter.joules == 0.0
        file.write_text("450000")
        assert meter.joules == pytest.approx(0.25)
        file.write_text("500000")
    file.write_text("900000")
    assert meter.joules == pytest.approx(0.3) and meter.sources == ("CPU package-0",) and not meter.reason
    assert meter.describe(3) == "0.1 J per new token (CPU package-0, whatever else ran there included)"
    with meter:
        assert meter.joules == 0.0  # counted anew


def test_a_counter_that_wraps_around(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    with EnergyMeter([CPU], tmp_path) as meter:
        file.write_text("100000")
    assert meter.joules == pytest.approx(0.2)


def test_turns_are_not_missed_while_nobody_asks(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "READ_EVERY", 0.01)
    file = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    with EnergyMeter([CPU], tmp_path) as meter:
        for value, total in ((300_000, 0.4), (950_000, 1.05), (100_000, 1.2)):
            (tmp_path / "new").write_text(str(value))
            (tmp_path / "new").replace(file)
            until = time.monotonic() + 20
            while meter._total < total - 1e-9 and time.monotonic() < until:
                time.sleep(0.01)
    assert meter.joules == pytest.approx(1.2)  # more than one turn
    assert meter._thread is None


def test_domains_within_others_are_not_counted_twice(tmp_path):
    files = {
        place: zone(tmp_path, place, name)
        for place, name in {
            "intel-rapl:0": "package-0",
            "intel-rapl:0:0": "core",
            "intel-rapl:0:1": "uncore",
            "intel-rapl:0:2": "dram",
            "intel-rapl:1": "package-1",
            "intel-rapl:1:0": "dram",
            "intel-rapl:2": "psys",
            "intel-rapl-mmio:0": "package-0",
        }.items()
    }
    (tmp_path / "intel-rapl").mkdir()  # the control type itself
    names = [counter.name for counter in rapl_counters(tmp_path)]
    assert names == ["CPU package-0", "memory of CPU 0", "CPU package-1", "memory of CPU 1"]
    with EnergyMeter([CPU], tmp_path) as meter:
        for i, file in enumerate(files.values()):
            file.write_text(str(10**i))  # a sum tells its parts
    counted = ("intel-rapl:0", "intel-rapl:0:2", "intel-rapl:1", "intel-rapl:1:0")
    assert meter.joules == pytest.approx(1e-6 * sum(10 ** list(files).index(place) for place in counted))


def test_without_counters_nothing_is_guessed(tmp_path):
    with EnergyMeter([CPU], tmp_path) as meter:
        pass
    assert meter.joules is None and meter.sources == () and meter.counted == ""
    assert meter.describe(10) == f"energy not known: no RAPL counters in {tmp_path}"


def test_counters_that_may_not_be_read(tmp_path, monkeypatch):
    """Root may read everything, so the refusal is made up."""
    file = zone(tmp_path, "intel-rapl:0", "package-0")
    read = Path.read_text

    def refuse(self, *args, **kwargs):
        if self == file:
            raise PermissionError(13, "Permission denied", str(self))
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    meter = EnergyMeter([CPU], tmp_path)
    assert meter.joules is None and f"{file} may not be read by this user" in meter.describe(1)


def test_a_file_that_is_no_counter(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0").write_text("much")
    with pytest.raises(OSError, match="is not a number: 'much'"):
        rapl_counters(tmp_path)


def test_a_counter_that_fails_in_between_ends_the_counting(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", "package-0")
    with EnergyMeter([CPU], tmp_path) as meter:
        file.write_text("1000")
        assert meter.joules == pytest.approx(0.001)
        file.unlink()
        assert meter.joules is None
    assert meter.joules is None and "energy_uj" in meter.reason
    with pytest.raises(OSError, match="counter of it was reset"):
        Counter("it", lambda: 0, 1.0).joules(5, 3)


def test_a_gpu_is_counted_with_the_cpu_where_that_can_be_read(tmp_path, use_nvml):
    nvml = use_nvml(FakeNvml())
    with EnergyMeter([GPU], tmp_path) as meter:
        nvml.millijoules += 1500
    assert meter.joules == pytest.approx(1.5) and meter.sources == ("GPU 0 Toy GPU-12-34",)
    assert meter.describe(3).startswith("0.5 J per new token (GPU 0 Toy GPU-12-34, whatever else ran there included; without")
    assert f"without the CPU: no RAPL counters in {tmp_path}" in meter.describe(3)
    file = zone(tmp_path, "intel-rapl:0", "package-0")
    with EnergyMeter([GPU, GPU], tmp_path) as meter:
        nvml.millijoules += 1500
        file.write_text("500000")
    assert meter.joules == pytest.approx(2.0) and meter.sources == ("CPU package-0", "GPU 0 Toy GPU-12-34")


@pytest.mark.parametrize(
    ("nvml", "reason"),
    [
        (None, "pip install 'modeling-anee\\[energy\\]'"),
        (FakeNvml(problem="Driver Not Loaded"), "NVML can't be used for cuda:0: Driver Not Loaded"),
        (FakeNvml(supported=False), "GPU 0 Toy GPU-12-34 does not tell its energy: Not Supported"),
    ],
)
def test_a_gpu_that_can_not_be_read_makes_it_unknown(tmp_path, use_nvml, nvml, reason):
    """The CPU's joules alone would be taken for the whole."""
    zone(tmp_path, "intel-rapl:0", "package-0")
    use_nvml(nvml)
    meter = EnergyMeter([CPU, GPU], tmp_path)
    assert meter.joules is None
    with pytest.raises(OSError, match=reason):
        raise OSError(meter.reason)


def test_other_devices_and_none(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0")
    assert EnergyMeter([torch.device("mps")], tmp_path).reason == "no energy counter is known for mps"
    assert EnergyMeter([], tmp_path / "none").joules is None


def test_devices_of_a_model():
    assert devices_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))) == {CPU}


def test_the_benchmark_gives_every_case_its_own_joules(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", "package-0")

    def spend(microjoules):
        file.write_text(str((int(file.read_text()) + microjoules) % RANGE))

    cases = {"dear": lambda: spend(300_000), "cheap": lambda: spend(100_000)}
    with EnergyMeter([CPU], tmp_path) as meter:
        runs = metered_runs(cases, 3, meter)
    assert [run.joules for run in runs["dear"]] == pytest.approx([0.3] * 3)
    assert [run.joules for run in runs["cheap"]] == pytest.approx([0.1] * 3)
    with EnergyMeter([CPU], tmp_path / "none") as meter:
        assert [run.joules for run in metered_runs(cases, 1, meter)["dear"]] == [None]
