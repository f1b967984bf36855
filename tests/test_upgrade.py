"""Artifacts of format version 1, whose costs were shares of the stack, choose the same plans in terms of the whole model."""

import math

import pytest
import torch

from modeling_anee import AneeConfig

from .tiny import BRIDGES, tiny_base, token_ids, wrap


PLANS = ["PSFP", "PSSP", "PFPP"]
TABLE = {"budgets": [0.5, 0.9], "settings": [2.0, -1.0], "cost": [0.52, 0.9], "perplexity_ratio": [1.5, 1.1]}


def of_version(version: int, controller: str, **fields):
    fields = {"format_version": version, "controller": controller, "plans": PLANS, "calibration": TABLE, **BRIDGES} | fields
    return wrap(tiny_base(), **fields)


@pytest.mark.parametrize("controller", ["learned", "routed", "plan"])
def test_what_was_measured_is_in_terms_of_the_whole_model(controller):
    model = of_version(1, controller)
    config, head = model.config, model.costs.head
    assert config.format_version == 2 and 0 < head < 1
    assert config.calibration["budgets"] == pytest.approx([b * (1 - head) + head for b in TABLE["budgets"]])
    assert config.calibration["cost"] == pytest.approx([c * (1 - head) + head for c in TABLE["cost"]])
    assert config.calibration["perplexity_ratio"] == TABLE["perplexity_ratio"]
    settings = {
        "learned": [price / (1 - head) for price in TABLE["settings"]],
        "routed": [price - math.log(1 - head) for price in TABLE["settings"]],
        "plan": TABLE["settings"],
    }
    assert config.calibration["settings"] == pytest.approx(settings[controller])
    assert AneeConfig(**config.to_dict()).calibration == config.calibration  # once only


def test_a_later_version_is_left_alone():
    assert of_version(2, "routed").config.calibration == TABLE


def test_a_router_keeps_its_plans():
    old = of_version(1, "routed", router_budgets=[0.9, 0.6])
    stack = 1.0 - old.costs.head
    costs = old.costs.of_actions(old.controller.plans) / stack  # as version 1 had them
    for budget, cost, plan in zip((0.9, 0.6), costs[1:].tolist(), old.controller.plans[1:], strict=True):
        dearer = [c for c in (old.costs.of_actions(torch.tensor(p)) / stack for p in plans_of(old)) if c <= budget + 1e-9]
        assert not dearer or cost == pytest.approx(float(max(dearer))), plan
    assert old(token_ids(), energy_budget=0.7).execution.mean_cost < 1.0


def plans_of(model) -> list[list[int]]:
    return [model.config.table.plan(plan, 4) for plan in model.config.plans]
