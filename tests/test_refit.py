"""Bridges solved along plans: what they have in common with the plain closed form, and what they do better."""

import pytest
import torch

from modeling_anee.evaluation.rollout import begin, run_layers, with_plan
from modeling_anee.training.run import Run
from modeling_anee.training.stages import closed_form, refit

from .tiny import LAYERS
from .workshop import make_workshop, recipe_of


FITTING = {"windows": 24, "ridge": 1e-6}
RANKS = {"bridge_rank": 32, "ffn_bridge_rank": 32, "controller": "plan"}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workshop")
    make_workshop(folder)
    return folder


def fitted(workshop, folder, plan, *stages):
    """A run with the bridges of the only plan, which begins with some letters, after some stages."""
    plan = plan.ljust(LAYERS, "P")
    settings = {"closed_form": FITTING, "refit": FITTING | {"budgets": [0.0]}}
    recipe = recipe_of(workshop, anee=RANKS | {"plans": [plan]}, stages=settings)
    run = Run.open(recipe, folder, workshop / "data")
    for stage in stages:
        stage.run_stage(run)
    return run


def errors(run, upto):
    """Weighted squared error after some layers of the plan's hidden states, on the windows fitted to."""
    model = run.model
    ids = run.windows("train")[: FITTING["windows"]]
    plan = torch.tensor(refit.chosen_plans(run, [0.0])[0], dtype=torch.uint8)
    hidden, step = begin(model, ids)
    base = run_layers(model, hidden, step, with_plan(model, ids, plan * 0), range(upto))
    ours = run_layers(model, hidden, step, with_plan(model, ids, plan), range(upto))
    return (base - ours)[:, model.config.keep_first_tokens :].square().sum().item()


@pytest.mark.parametrize(("plan", "kind"), [("PF", "skip_ffn"), ("PS", "skip")])
def test_what_is_left_out_first_is_the_plain_closed_form(workshop, tmp_path, plan, kind):
    plain = fitted(workshop, tmp_path / "a", plan, closed_form).own()
    along = fitted(workshop, tmp_path / "b", plan, refit).own()
    for name in (name for name in plain if name.startswith(f"bridges.{kind}.1.")):
        torch.testing.assert_close(along[name].abs(), plain[name].abs(), rtol=1e-3, atol=1e-4)  # signs of directions are free
        assert plain[name].abs().sum() > 0


def test_what_is_left_out_later_mends_what_was_missed_before(workshop, tmp_path):
    plain = errors(fitted(workshop, tmp_path / "a", "PFS", closed_form), 3)
    along = errors(fitted(workshop, tmp_path / "b", "PFS", closed_form, refit), 3)
    assert along < 0.95 * plain


def test_other_bridges_stay(workshop, tmp_path):
    before = fitted(workshop, tmp_path / "a", "PFS", closed_form).own()
    after = fitted(workshop, tmp_path / "b", "PFS", closed_form, refit).own()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("bridges.skip.2.") for name in changed)
