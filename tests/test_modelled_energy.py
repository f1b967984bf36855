"""Joules that no counter tells, as modelled: one definition for traces, simulations, prices, benchmarks and budgets."""

from pathlib import Path

import pytest
import torch

from modeling_anee import budget_sources
from modeling_anee.actions import FULL
from modeling_anee.budget_sources import Joules, Progress
from modeling_anee.evaluation.benchmark import Meters, cases_of, decode_rows
from modeling_anee.evaluation.benchmark_rows import energy_line
from modeling_anee.evaluation.energy import EnergyMeter
from modeling_anee.machines.energy import EnergyModel
from modeling_anee.machines.prediction import Predicted
from modeling_anee.machines.prices import joule_prices
from modeling_anee.machines.strict import cost_of, strict_plans
from modeling_anee.machines.workload import Counter

from .profiles import VARIANTS, profile_of
from .tiny import BRIDGES, LAYERS, tiny_base, token_ids, wrap
from .workshop import tiny_tokenizer


CPU = torch.device("cpu")
PLANS = [f"{LAYERS}*INT8 / int8", f"{LAYERS}*INT4 / int4", "PROCESS, INT8, INT4_SKIP_FFN, INT4 / int8"]


@pytest.fixture(scope="module")
def model():
    return strict_plans(wrap(tiny_base(), precisions=["int8", "int4"], **BRIDGES), PLANS)


@pytest.fixture(scope="module")
def energy():
    return EnergyModel.named("made-up-accelerator")


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
def test_a_trace_takes_what_a_simulation_of_its_plan_takes(model, energy, plan):
    ids, prompt = token_ids(1, 9), 6
    trace = model(ids, energy_budget=cost_of(model, plan)).execution
    load = Counter.of(model).workload(plan)
    steps = ids.shape[1] - prompt
    one = [energy.of_call(load, 0.0, 1, 1, place) for place in range(prompt, prompt + steps)]
    first = energy.of_call(load, 0.0, prompt, 1, 0)
    found = energy.of_trace(model, trace, prompt, 2.0)
    norms = 1 + 0.25 * (("INT4" in plan) or ("SKIP" in plan))  # of which a simulation counts no bytes
    expected = sum(one) + first + 2 * energy.machine.idle_watts.value
    assert expected <= found + 1e-12 and found - expected < 0.3 * norms * (sum(one) + first)


@torch.no_grad()
def test_rows_of_a_batch_share_what_is_read_and_not_what_is_done(model, energy):
    one, budget = token_ids(1, 9), cost_of(model, PLANS[0])
    two = one.expand(2, -1)
    traces = [model(ids, energy_budget=budget).execution for ids in (one, two)]
    single, double = (energy.of_trace(model, trace, 4, 0.0) for trace in traces)
    assert single < double < 2 * single
    padded = traces[1].keep(torch.tensor([[True] * 9, [False] * 9]))
    assert energy.of_trace(model, padded, 4, 0.0) == pytest.approx(single)


@pytest.mark.parametrize("plan", [PLANS[0], PLANS[1], f"{LAYERS}*PROCESS"])
def test_prices_in_joules_are_those_of_a_simulation(model, energy, plan):
    profile, context = profile_of(model), 20
    prices = joule_prices(profile, energy, context)
    assert prices["unit"] == "joules" and set(prices["variants"]) == set(VARIANTS) and "made-up" in prices["machine"]
    priced = wrap(model.base, precisions=["int8", "int4"], cost_unit="joules", prices=prices)
    load = Counter.of(priced).workload(plan)
    ms = Predicted.measured(profile).decode(load, 1, context).total
    asked = cost_of(priced, plan) * priced.costs.total
    assert asked == pytest.approx(energy.of_call(load, ms, 1, 1, context), rel=0.05)


def test_a_budget_of_joules_goes_by_the_costs_where_nothing_can_be_counted(model, energy, monkeypatch):
    def nothing(devices):
        return [], ["no counters"], ""

    monkeypatch.setattr(budget_sources, "find_counters", nothing)
    source, prices = Joules(5.0), joule_prices(profile_of(model), energy)
    with pytest.raises(ValueError, match="or load the model with cost_unit='joules'"):
        source.begin(model)
    priced = wrap(model.base, precisions=["int8", "int4"], cost_unit="joules", prices=prices)
    asked = source.begin(priced)
    assert asked.full == priced.costs.total
    begun = Progress(seconds=1.0, prompt_seconds=0.5, tokens=1, limit=11, budget=1.0, work=0.0)
    few = Joules(0.3 * 10 * priced.costs.total).begin(priced)
    assert few(begun) == pytest.approx(0.3, abs=1e-3)


@torch.no_grad()
def test_a_benchmark_models_joules_only_where_asked(tmp_path, energy):
    model, tokenizer = wrap(tiny_base(), precisions=["int8"]), tiny_tokenizer()
    cases = cases_of(model)[:2]
    with EnergyMeter([CPU], tmp_path) as meter:
        known, unknown = (decode_rows(cases, tokenizer, 1, 3, 1, Meters(meter, own)) for own in (energy, None))
    assert all(row.joules_per_token is None for row in unknown)
    assert all(row.joules_per_token > 0 for row in known) and known[0].case == "plain"
    said = {"counted": "", "reason": "no counters", "modelled": ""}
    assert energy_line(said) == "energy not known: no counters"
    assert energy_line(said | {"modelled": "h100"}) == "energy: modelled as h100 (not measured: no counters)"
    assert energy_line(said | {"reason": "", "counted": "CPU", "modelled": "h100"}) == "energy: of CPU"


def test_what_is_modelled_says_so(tmp_path):
    meter = EnergyMeter([CPU], tmp_path)
    told = meter.describe(4, lambda: 8.0, "h100")
    assert told.startswith("2 J per new token, modelled as h100 (not measured: no RAPL counters")
    assert meter.describe(4).startswith("energy not known")


def test_narrow_variants_compute_as_what_they_are_a_part_of(energy):
    assert energy.operation("int4_half") == energy.operation("int4") < energy.operation(FULL)


def test_the_page_on_costs_says_how_to_count_in_joules(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[1] / "docs" / "costs.md").read_text(encoding="utf-8")
    code = text.rpartition("```python\n")[2].partition("```")[0]
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    profile_of(wrap(base)).save(tmp_path / "anee_profile.json")
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "base"), "docs/costs.md", "exec"), {})
    assert "J, as modelled" in capsys.readouterr().out
