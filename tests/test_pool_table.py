"""The table of policies: costs and losses add up, random choice lies on the hull, budgets are kept."""

import pytest
import torch

from modeling_anee.pool.config import PoolConfig, RungConfig
from modeling_anee.pool.gates import GatePolicy
from modeling_anee.pool.making import make_config
from modeling_anee.pool.measuring import summarise
from modeling_anee.pool.policies import CascadePolicy, FixedPolicy
from modeling_anee.pool.table import Table, as_text, lower_hull, play, shares_at

from .test_pool_policies import NAMES, cascade, sample


@pytest.fixture
def samples():
    torch.manual_seed(0)
    return [sample(i, 20 * (i % 2), 30.0 if i % 2 else 10.0, 10.0 if i % 2 else 11.0) for i in range(20)]


@pytest.fixture
def config(samples) -> PoolConfig:
    pytest.importorskip("simpful"), pytest.importorskip("sklearn")
    rungs = [RungConfig(name=name, model=name) for name in NAMES]
    return make_config(rungs, summarise(samples), samples, [0.1])


def test_hull_and_random_choice():
    points = {"a": (1.0, 3.0), "b": (2.0, 2.9), "c": (3.0, 1.0), "d": (4.0, 1.5)}
    hull = lower_hull(points)
    assert hull == [("a", 1.0), ("c", 3.0)]  # b lies above the line, d is dearer and worse
    assert shares_at(hull, 1.5) == {"a": 0.75, "c": 0.25}
    assert shares_at(hull, 0.5) == {"a": 1.0} and shares_at(hull, 9.0) == {"c": 1.0}


def test_controls_are_the_measured_rungs_and_gain_nothing(samples, config):
    table = Table(samples, config)
    for name in NAMES:
        row = table.row("always", name, FixedPolicy(name))
        assert row.loss == pytest.approx(config.measured[name].loss) and row.rungs == {name: 1.0}
        assert row.megabytes * 1e6 == pytest.approx(config.measured[name].bytes_per_text_byte)
        assert row.gain == pytest.approx(0.0) and row.error == pytest.approx(0.0)


def test_random_choice_has_no_gain_within_its_error(samples, config):
    torch.manual_seed(1)
    names = [NAMES[int(torch.rand(()) < 0.5)] for _ in samples]
    policy = FixedPolicy("small")
    left = iter(names)
    policy.choose = lambda case: FixedPolicy(next(left)).choose(case)
    row = Table(samples, config).row("random", "half", policy)
    assert abs(row.gain) < 3 * row.error


def test_every_policy_has_rows_and_energy_is_never_over_budget(samples, config):
    rows = Table(samples, config).rows()
    assert {row.policy for row in rows} == {"always", "energy", "complexity", "learned", "mixture", "cascade"}
    budgets = [row for row in rows if row.policy == "energy"]
    assert budgets and all(row.over == 0 for row in budgets)
    learned = next(row for row in rows if row.policy == "learned")
    assert learned.gain > 3 * learned.error  # the samples are made so
    assert as_text(rows).count("\n") == len(rows) + 1 and "over budget: 0" in as_text(rows)


def test_all_that_a_policy_runs_is_counted(samples, config):
    looked = play(FixedPolicy("small"), samples, config, NAMES)
    assert looked.work.tolist() == [100.0] * 20
    always = play(CascadePolicy(cascade(threshold=2.0)), samples, config, NAMES)
    assert always.work.tolist() == [500.0] * 20 and always.rungs == ["large"] * 20
    never = play(CascadePolicy(cascade(threshold=0.0)), samples, config, NAMES)
    assert never.work.tolist() == [100.0] * 20 and never.rungs == ["small"] * 20
    gate = play(GatePolicy(config.learned[0]), samples, config, NAMES)
    assert gate.work.tolist() == [105.0, 405.0] * 10  # a look reads 5
