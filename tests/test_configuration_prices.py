"""Costs in milliseconds and joules: at the prices of a configuration, as shares of the whole model."""

import copy

import pytest
import torch

from modeling_anee import AneeConfig, AneeForCausalLM
from modeling_anee.configuration_prices import PRICED, check_prices, hardware_of
from modeling_anee.hardware import HARDWARE, Hardware, gathering_pays
from modeling_anee.work import Work

from .tiny import LAYERS, tiny_base, token_ids, wrap


OF_A_VARIANT = {"flop": 0.0, "weight_byte": 2e-7, "context_byte": 1e-6, "launch": 0.01}
PRICES = {
    "unit": "ms",
    "machine": "a machine",
    "context": 100,
    "token": 0.5,
    "gathering_flops": 7.0,
    "variants": {
        "full": OF_A_VARIANT,
        "int8": OF_A_VARIANT | {"weight_byte": 4e-7, "launch": 0.005},
        "int4": OF_A_VARIANT | {"launch": 0.001},
    },
}


def priced(**fields):
    prices = PRICES | {"unit": fields.get("cost_unit", "ms")}
    return wrap(tiny_base(), **{"cost_unit": "ms", "prices": prices, "precisions": ["int8", "int4"]} | fields)


@pytest.mark.parametrize("unit", PRICED)
def test_all_layers_and_the_head_cost_one_and_the_total_is_in_the_unit(unit):
    costs = priced(cost_unit=unit).costs
    assert costs.unit == unit and float(costs.layers[:, 0].sum()) + costs.head == pytest.approx(1.0)
    full, work = costs.hardware, costs.works["full"]
    layers = sum(full.price(one.attention) + full.price(one.feed_forward) for one in work)
    assert costs.total == pytest.approx(layers + costs.head * costs.total) and costs.head * costs.total > PRICES["token"]


def test_every_variant_has_its_own_prices():
    model = priced()
    costs, table = model.costs, model.config.table
    for variant in ("int8", "int4"):
        own = Hardware("ms", **PRICES["variants"][variant])
        price = sum(own.price(one) for one in (costs.works[variant][1].attention, costs.works[variant][1].feed_forward))
        assert float(costs.layers[1, table.place_of(variant, variant)]) * costs.total == pytest.approx(price)
    mixed = [f"{LAYERS}*INT4 / int4", f"{LAYERS - 1}*INT4, INT8 / int8"]
    assert len(priced(plans=mixed).controller.table.costs) == 3


def test_a_budget_in_milliseconds_is_kept_and_reported():
    model = priced(budget_mode="strict", keep_first_tokens=0)
    budget = float(model.controller.table.costs[-2])
    trace = model(token_ids(), energy_budget=budget).execution
    assert trace.unit == "ms" and trace.mean_cost <= budget + 1e-6
    told = f"unit ms: {trace.mean_cost * model.costs.total:.3g} of {model.costs.total:.3g} a token"
    assert told in trace.summary()
    assert "a token" not in wrap(tiny_base())(token_ids()).execution.summary()


def test_prices_are_saved_with_an_artifact(tmp_path):
    model = priced(base_model_name_or_path=str(tmp_path / "base"))
    model.base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "artifact")
    loaded = AneeForCausalLM.from_pretrained(tmp_path / "artifact")
    assert loaded.config.prices == PRICES and torch.equal(loaded.costs.layers, model.costs.layers)


def test_a_variant_without_prices_is_an_error():
    prices = copy.deepcopy(PRICES)
    del prices["variants"]["int4"]
    with pytest.raises(ValueError, match="no prices in ms for the variant 'int4', only for full, int8"):
        priced(prices=prices)


def test_a_dial_keeps_the_unit_that_it_was_found_in(tmp_path):
    model = wrap(tiny_base(), "routed", calibration={"budgets": [0.5, 1.0], "settings": [1.0, 0.0]}, plans=["PPSP"])
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cost_unit='ms' is not allowed for a 'routed' controller"):
        AneeConfig.from_pretrained(tmp_path, cost_unit="ms", prices=PRICES)
    assert AneeConfig.from_pretrained(tmp_path, cost_unit="bytes").cost_unit == "bytes"
    assert AneeConfig.from_pretrained(tmp_path, controller="plan", cost_unit="ms", prices=PRICES).cost_unit == "ms"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": "joules"}, "prices in joules are not allowed with cost_unit='ms'"),
        ({"unit": "bytes"}, "unit.*must be one of 'ms', 'joules'"),
        ({"machine": 3}, "machine=3.*string"),
        ({"context": -1}, "context.*integer from 0"),
        ({"token": -0.1}, "token=-0.1.*a number from 0"),
        ({"gathering_flops": "many"}, "gathering_flops='many'.*a number from 0"),
        ({"variants": {"int8": OF_A_VARIANT}}, "'full' among them"),
        ({"variants": {"full": {"flop": 1.0}}}, "full=.*must be a dict of flop, weight_byte, context_byte, launch"),
        ({"variants": {"full": OF_A_VARIANT | {"launch": None}}}, "launch=None"),
        ({"contexts": 3}, r"did you mean 'context'\?"),
    ],
)
def test_bad_prices_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        check_prices(PRICES | change, "ms")
    with pytest.raises(ValueError, match="prices has no 'token'"):
        check_prices({name: value for name, value in PRICES.items() if name != "token"}, "ms")


def test_units_that_are_counted_need_no_prices():
    for unit in HARDWARE:
        assert hardware_of(unit, PRICES) is HARDWARE[unit]
        check_prices(None, unit)
    for unit in PRICED:
        with pytest.raises(ValueError, match=f"cost_unit='{unit}' needs prices: measure this machine with `anee profile`"):
            check_prices(None, unit)


def test_a_machine_that_was_measured_says_when_gathering_pays():
    assert hardware_of("ms", PRICES).gathering_flops == 7.0 and HARDWARE["bytes"].gathering_flops is None
    assert gathering_pays(7.0, torch.device("cpu"), 7.0) and not gathering_pays(6.9, torch.device("cpu"), 7.0)


def test_tokens_before_have_a_price():
    hardware = Hardware("ms", context_byte=2.0)
    assert hardware.price(Work(context_bytes=3.0)) == 6.0 and hardware.of("int8") is hardware


@pytest.mark.parametrize(("least", "anyway"), [(0.0, False), (1e30, True)])
def test_tokens_are_gathered_where_it_pays_on_the_machine_that_was_measured(least, anyway):
    prices = PRICES | {"gathering_flops": least}
    model = priced(prices=prices, precisions=[], plans=["PSSP", "PPSP"], keep_first_tokens=0)
    budget = float(model.controller.table.costs[:2].mean())
    trace = model(token_ids(1, 20), energy_budget=budget).execution
    assert trace.depth.unique().numel() > 1 and (trace.share_run_anyway > 0) == anyway
