"""The benchmark: its cases, and the share of the weights that each of them reads."""

import pytest
import torch

from modeling_anee.evaluation.benchmark import Meters, benchmark, cases_of, decode_rows, prefill_rows
from modeling_anee.evaluation.benchmark_rows import as_text, weights_read
from modeling_anee.evaluation.energy import EnergyMeter

from .tiny import BRIDGES, tiny_base, token_ids, wrap
from .workshop import tiny_tokenizer


UNIFORM = ["uniform INT8", "uniform INT4, INT8 head"]
OF_LAYERS = [f"budget {budget}" for budget in (1.0, 0.8, 0.6, 0.5, 0.3)]
OF_PRECISIONS = [f"budget {budget}" for budget in (1.0, 0.5, 0.26, 0.18, 0.12)]


@torch.no_grad()
def test_what_is_read_is_the_bytes_of_the_variants_that_ran():
    model = wrap(tiny_base(), "plan", precisions=["int8", "int4"], plans=["INT8, INT4, SKIP_INT4, SKIP / int8"])
    trace = model(token_ids(1, 9), energy_budget=0.0).execution.tokens(1, None)
    read, total, layers = weights_read(model, trace), model.costs.total, model.costs.layers
    table = model.config.table
    ran = float(layers[0, table.place("INT8")] + layers[1, table.place("INT4")])
    assert read == pytest.approx(ran + float(model.costs.heads[table.heads.index("int8")]))  # nothing of what was left out
    assert read < trace.mean_cost
    head, norm = model.base.lm_head.weight, model.base.model.norm.weight
    in_8_bits = head.numel() + 4 * len(head) + 4 * norm.numel()
    assert total * model.costs.heads[table.heads.index("int8")] == pytest.approx(in_8_bits)


@torch.no_grad()
def test_what_is_read_is_bytes_whatever_the_unit_and_without_deferred_keys():
    ids = token_ids(1, 9)
    shares = []
    for unit in ("bytes", "flops"):
        model = wrap(tiny_base(), "plan", cost_unit=unit, plans=["PSPS"], **BRIDGES)
        trace = model(ids, energy_budget=0.0).execution.tokens(1, None)
        shares.append(weights_read(model, trace))
    assert shares[0] == pytest.approx(shares[1])
    bare = wrap(tiny_base(), "plan", plans=["PSPS"])
    whole = weights_read(bare, bare(ids, energy_budget=1.0).execution)
    half = weights_read(bare, bare(ids, energy_budget=0.0).execution.tokens(1, None))
    assert whole == pytest.approx(1.0) and half == pytest.approx((1 + bare.costs.head) / 2)


@pytest.mark.parametrize(("precisions", "budgets"), [([], OF_LAYERS), (["int8", "int4"], OF_PRECISIONS)])
def test_cases_fit_the_model_and_the_base_in_one_precision_is_beside_them(tmp_path, precisions, budgets):
    model = wrap(tiny_base(), "plan", precisions=precisions)
    tokenizer, cases = tiny_tokenizer(), cases_of(model)
    assert [case.name for case in cases] == budgets + UNIFORM
    half = [] if precisions else ["half the layers"]
    with EnergyMeter([torch.device("cpu")], tmp_path) as meter:
        tables = [decode_rows(cases, tokenizer, batch, 3, 1, Meters(meter)) for batch in (1, 2)]
        tables.append(prefill_rows(cases, 20, 1, Meters(meter)))
    for rows, more in zip(tables, (half, half, []), strict=True):
        assert [row.case for row in rows] == ["plain", *budgets, *UNIFORM, *more]
        costs = {row.case: row.mean_cost for row in rows}
        assert all(costs[case.name] == case.cost for case in cases[-2:]) and costs[UNIFORM[0]] < 0.4
    for row in tables[0]:
        assert (row.weights_read is None) == (row.case == "plain")
        if row.case in UNIFORM:  # nothing is left out, so all that is charged is read
            assert row.weights_read == pytest.approx(row.mean_cost)
    assert tables[0][1].weights_read == pytest.approx(1.0)


@torch.no_grad()
def test_capacities_are_timed_instead_of_budgets_and_told(tmp_path):
    model = wrap(tiny_base(), "gated", precisions=["int8"], **BRIDGES)
    model.config.calibration |= {"budgets": [0.15, 0.25]}
    model.controller.bind(model.costs)
    cases = cases_of(model, [0.4, 0.8])
    assert [case.name for case in cases] == ["budget 1.0", "capacity 1", "capacity 0.8", "capacity 0.4", *UNIFORM]
    assert cases[1].budget == model.controller.top < 1.0
    with EnergyMeter([torch.device("cpu")], tmp_path) as meter:
        rows = {row.case: row.capacity for row in decode_rows(cases, tiny_tokenizer(), 1, 6, 1, Meters(meter))}
    assert rows["plain"] is None and rows["budget 1.0"] == rows["capacity 1"] == 1.0 and rows["capacity 0.4"] < 1.0
    assert [case.name for case in cases_of(wrap(model.base, "gated", **BRIDGES), [0.4])][:2] == ["budget 1.0", "capacity 0.4"]
    with pytest.raises(ValueError, match="capacity=1.0 is not possible with controller='plan'"):
        cases_of(wrap(), [0.5])


def test_uniform_costs_are_in_the_unit_of_the_model():
    model = wrap(tiny_base(), "plan", cost_unit="flops")
    uniform = cases_of(model)[-2:]
    assert [case.cost for case in uniform] == pytest.approx([1.0, 1.0]) and all(case.budget < 0.4 for case in uniform)


def test_a_report_is_text_with_a_line_per_case():
    model = wrap(tiny_base(), "plan", precisions=["int8"])
    report = benchmark(model, tiny_tokenizer(), new_tokens=2, repeats=1, batch=2, prefill=12)
    lines = as_text(report).splitlines()
    for name in ["plain", *OF_PRECISIONS, *UNIFORM]:
        assert sum(line.startswith(f"{name} ") for line in lines) == 3, name
