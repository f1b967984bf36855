"""The stages `flips`, `routers` and `gates`: what they learn, and that an interrupted fit makes the same."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_anee.controller_gated import GatedController
from modeling_anee.evaluation.rollout import run as run_tokens
from modeling_anee.hardware import GATHERING_FLOPS
from modeling_anee.training import mixing, sensitivity
from modeling_anee.training.capacities import understated
from modeling_anee.training.checkpoint import read_tensors
from modeling_anee.training.fit import fit
from modeling_anee.training.losses import kl_divergence
from modeling_anee.training.mixing import run_mixed, run_routed, scores_of
from modeling_anee.training.recipe import Recipe
from modeling_anee.training.run import Run
from modeling_anee.training.stages import closed_form, flips, gates, routers

from .tiny import LAYERS
from .workshop import assert_same_run, fit_killed_in, make_workshop, recipe_of


AS_SHIPPED = GATHERING_FLOPS["cpu"]  # the other process has it, and so has the module's fixture
ANEE = {
    "controller": "gated",
    "min_layers": 0,
    "keep_last_layers": 0,
    "ffn_bridge_rank": 4,
    "exit_translator_rank": 4,
    "exit_layers": [1, 3],
}
STAGES = {
    "closed_form": {"windows": 12, "ridge": 0.001},
    "flips": {"windows": 14, "layers": 3, "ridge": 0.1, "checkpoint_every": 2},
    "routers": {"steps": 60, "learning_rate": 0.003, "batch_windows": 4, "checkpoint_every": 2},
    "gates": {"steps": 60, "learning_rate": 0.01, "batch_windows": 4, "checkpoint_every": 2},
}


def recipe(folder, **changes) -> Recipe:
    sources = {
        "train": [{"file": "text.txt", "tokens": 400, "stop": 0.6}],
        "choose": [{"file": "text.txt", "tokens": 200, "start": 0.6}],
    }
    return recipe_of(folder, **{"length": 16, "text": sources, "anee": ANEE, "stages": STAGES} | changes)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workshop")
    make_workshop(folder)
    fit(recipe(folder), folder / "run", folder / "data")
    return folder


@pytest.fixture
def run(fitted):
    return Run.open(recipe(fitted), fitted / "run", fitted / "data")


def logged(folder, stage):
    rows = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == stage]


# What is measured


def test_flipping_a_gate_is_leaving_out_one_feed_forward(run):
    model, ids = run.model, run.windows("train")[:2]
    seen = sensitivity.sensitivities(model, ids, torch.Generator().manual_seed(0))
    with torch.no_grad():
        target = model.stack.logits(run_tokens(model, ids))
        for layer in (0, 2, 3):
            loss = flips.flipped(model, seen, layer)
            plan = torch.zeros(LAYERS, dtype=torch.uint8)
            plan[layer] = model.config.table.place("SKIP_FFN")
            expected = kl_divergence(target, model.stack.logits(run_tokens(model, ids, plan.expand(*ids.shape, -1).clone())))
            torch.testing.assert_close(loss, expected.unsqueeze(0), atol=1e-5, rtol=1e-3)


def test_one_backward_tells_what_small_changes_lose(run):
    """On the mean over draws, the divergence of all tokens from that on, where bridges miss little."""
    model, ids = run.model, run.windows("train")[:1]
    layer, token, generator = 2, 9, torch.Generator().manual_seed(0)
    small = 0.05

    def shrunk(model, variant, layer, hidden, attended, step):
        full = mixing.fed_in(model, "full", layer, hidden, attended)
        return full + small * (mixing.in_variant(model, variant, layer, hidden, attended, step) - full)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "in_variant", shrunk)
        draws = [sensitivity.sensitivities(model, ids, generator) for _ in range(400)]
    entering = []
    with torch.no_grad():
        target = model.stack.logits(run_tokens(model, ids, keep=entering))
        torch.testing.assert_close(draws[0].entering[layer], entering[layer], atol=1e-5, rtol=1e-4)
        gate = torch.ones(ids.shape)
        gate[0, token] = 1.0 - small
        hidden = run_mixed(model, ids, lambda number, hidden: gate if number == layer else None)
        expected = kl_divergence(target, model.stack.logits(hidden)).sum()
    found = torch.stack([draw.losses[layer][0, token] for draw in draws]).mean()
    assert abs(float(found / expected) - 1.0) < 0.25


def test_every_layer_is_flipped_as_often(run):
    seen = [layer for number in range(8) for layer in flips.layers_of(run, number)]
    assert {seen.count(layer) for layer in run.model.controller.gated_layers} <= {5, 6, 7}
    assert flips.layers_of(run, 3) == flips.layers_of(run, 3)


def test_a_regression_finds_what_the_logarithm_of_the_loss_follows():
    generator = torch.Generator().manual_seed(0)
    read, weight = torch.randn(4000, 8, generator=generator), torch.randn(8, generator=generator) / 4
    noise = torch.randn(4000, generator=generator) / 2
    loss = (read @ weight - 3.0 + noise).exp()
    sums = flips.Regressions.of(2, 8, 2, torch.device("cpu"))
    sums.add(1, read[:1000], 5 * loss[:1000])  # up to a factor
    sums.add(1, read[1000:], 5 * loss[1000:])
    sums.add_flips(1, loss[None])
    found, bias = sums.solve(1, 1e-4)
    torch.testing.assert_close(found.float(), weight, atol=0.03, rtol=0.1)
    said = (read.double() @ found + bias).exp().mean()
    assert abs(float(said / loss.mean()) - 1.0) < 0.05


def test_what_middle_variants_lose_is_noted_as_a_share(fitted, tmp_path):
    fields = ANEE | {"precisions": ["int8", "int4"], "gated_variants": ["int8", "int4", "none"]}
    run = Run.open(recipe(fitted, anee=fields), tmp_path / "run", fitted / "data")
    closed_form.run_stage(run)
    flips.run_stage(run)
    relative = run.model.controller.relative
    assert relative.shape == (1, LAYERS) and len(relative.unique()) == LAYERS and bool((relative < 0).all())


def test_routers_that_have_learned_may_be_kept_while_variants_are_compared(fitted, tmp_path):
    fields = ANEE | {"precisions": ["int8"], "gated_variants": ["full", "int8", "none"]}
    stages = STAGES | {"flips": STAGES["flips"] | {"keep_trained": True}}
    run = Run.open(recipe(fitted, anee=fields, stages=stages), tmp_path / "run", fitted / "data")
    torch.nn.init.constant_(run.model.controller.routers.weight, 0.5)
    flips.run_stage(run)
    assert (run.model.controller.routers.weight == 0.5).all()
    assert len(run.model.controller.relative.unique()) == LAYERS


@torch.no_grad()
def test_a_cheaper_variant_has_its_attention_in_it_too(fitted, tmp_path):
    fields = ANEE | {"precisions": ["int8"], "gated_variants": ["full", "int8"]}
    run = Run.open(recipe(fitted, anee=fields), tmp_path / "run", fitted / "data")
    model, ids = run.model, run.windows("train")[:2]
    actions = torch.full((*ids.shape, LAYERS), model.config.table.place("INT8"), dtype=torch.uint8)
    shut = run_mixed(model, ids, lambda layer, hidden: torch.zeros(ids.shape, dtype=torch.bool))
    torch.testing.assert_close(shut, run_tokens(model, ids, actions), atol=1e-5, rtol=1e-4)


def test_scores_are_understated_by_what_gates_lose_together():
    capacities, gates = (0.9, 0.7, 0.4), 10
    numbers = {f"capacity_at_{one:g}": one for one in capacities}
    numbers |= {"threshold_at_0.9": -4.0, "threshold_at_0.7": -2.0, "threshold_at_0.4": 0.0}
    kl = {0.9: 0.1}
    for high, low, said in ((0.9, 0.7, -3.0), (0.7, 0.4, -1.0)):
        kl[low] = kl[high] + (high - low) * gates * math.exp(said + 0.5)
    numbers |= {f"kl_at_{one:g}": kl[one] for one in capacities}
    assert math.isclose(understated(numbers, capacities, gates), 0.5, abs_tol=1e-6)
    assert understated(numbers | {"kl_at_0.7": 0.0, "kl_at_0.4": 0.0}, capacities, gates) == 0.0


# The stack with gates


def test_open_and_shut_gates_are_the_base_and_a_plan(run):
    model, ids = run.model, run.windows("train")[:2]
    with torch.no_grad():
        for value, plan in ((1.0, "PROCESS"), (0.0, "SKIP_FFN")):
            actions = torch.full((*ids.shape, LAYERS), model.config.table.place(plan), dtype=torch.uint8)
            expected = run_tokens(model, ids, actions)
            for gate in (torch.full(ids.shape, value), torch.full(ids.shape, bool(value))):
                found = run_mixed(model, ids, lambda layer, hidden, gate=gate: gate)
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(run_mixed(model, ids, lambda layer, hidden: None), run_tokens(model, ids))


@pytest.mark.parametrize("capacity", [0.3, 0.6, 0.9])
def test_routers_run_the_asked_share(run, capacity):
    model, ids, entering, routed = run.model, run.windows("train")[:8], [], []
    with torch.no_grad():
        run_tokens(model, ids, keep=entering)
        _, share, limit = run_routed(model, ids, capacity, entering, routed)
    assert abs(share - capacity) < 0.05 and len(routed) == LAYERS
    assert abs(float((scores_of(model, routed) > limit).float().mean()) - share) < 1e-6
    assert scores_of(model, routed).shape == (8, 16 - model.config.keep_first_tokens, LAYERS)


def test_layers_without_a_bridge_have_no_gate(fitted, tmp_path):
    fields = ANEE | {"ffn_bridge_layers": [0, 2], "keep_last_layers": 1}
    run = Run.open(recipe(fitted, anee=fields), tmp_path / "run", fitted / "data")
    assert {layer for number in range(8) for layer in flips.layers_of(run, number)} == {0, 2}


def test_bridges_that_have_learned_may_stay(fitted, tmp_path):
    keeping = {"closed_form": STAGES["closed_form"] | {"keep_trained": True}}
    run = Run.open(recipe(fitted, stages=keeping), tmp_path / "run", fitted / "data")
    bridges = run.model.bridges.skip_ffn
    with torch.no_grad():
        bridges["2"].up.bias.fill_(0.5)
    closed_form.run_stage(run)
    assert [closed_form.has_learned(bridges[str(layer)]) for layer in range(LAYERS)] == [True] * LAYERS
    assert not bridges["2"].up.weight.any() and (bridges["2"].up.bias == 0.5).all()


# What is learned


def test_an_artifact_with_routers_and_gates(fitted):
    model = AutoModelForCausalLM.from_pretrained(fitted / "run" / "artifact", dtype="float32")
    assert isinstance(model.controller, GatedController)
    assert all(bank.weight.abs().sum() > 0 for bank in (model.controller.routers, model.controller.gates))


def test_the_base_is_bit_identical(fitted):
    before = AutoModelForCausalLM.from_pretrained(fitted / "base").state_dict()
    after = AutoModelForCausalLM.from_pretrained(fitted / "run" / "artifact", dtype="float32").base.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_log_has_what_each_part_of_the_training_reached(fitted):
    before, *steps, after = logged(fitted, "routers")
    names = [f"{name}_at_{capacity:g}" for capacity in routers.MEASURED for name in ("kl", "capacity")]
    assert set(names) < set(before) and set(names) < set(after) and len(steps) == 60
    assert all(abs(line[f"capacity_at_{capacity:g}"] - capacity) < 0.1 for line in (before, after) for capacity in (0.9, 0.55))
    assert sum(after[f"kl_at_{one:g}"] for one in routers.MEASURED) < sum(before[f"kl_at_{one:g}"] for one in routers.MEASURED)
    *steps, last = logged(fitted, "gates")
    supervised = next(line for line in steps if "kl_leaving_0.1" in line)
    assert supervised["step"] == 42 and {"kl_leaving_0.4", "saved_leaving_0.4"} < set(last)
    assert last["others_1"] > 0 and last["others_3"] == pytest.approx(0.0, abs=1e-6)  # nobody sees the last layer's
    assert supervised["saved_leaving_0.4"] > supervised["saved_leaving_0.1"] > 0


def test_routers_learn_which_feed_forwards_are_missed(fitted, run):
    """What they say of a token goes up and down with what leaving one out loses, on the text they learned from."""
    run.load_own(read_tensors(fitted / "run" / "own-flips.safetensors")[0])
    model, ids, generator = run.model, run.windows("train"), torch.Generator().manual_seed(1)
    draws = [sensitivity.sensitivities(model, ids, generator) for _ in range(20)]
    with torch.no_grad():
        for layer in (1, 3):
            said = model.controller.scores(layer, draws[0].entering[layer])
            lost = torch.stack([draw.losses[layer] for draw in draws]).mean(dim=0).clamp(min=1e-6).log()
            pair = torch.stack((said, lost))[:, :, model.config.keep_first_tokens :].flatten(1)
            assert torch.corrcoef(pair)[0, 1] > 0.1


def test_translators_lose_less_than_none(run, fitted):
    model, ids, entering = run.model, run.windows("train")[:8], []
    with torch.no_grad():
        target = model.stack.logits(run_tokens(model, ids, keep=entering))
        for layer in ANEE["exit_layers"]:
            with_it, without = (model.stack.logits(h) for h in (model.bridges.of_exit(layer)(entering[layer]), entering[layer]))
            assert kl_divergence(target, with_it).mean() < kl_divergence(target, without).mean()


def test_translators_begin_in_closed_form(fitted, tmp_path):
    run = Run.open(recipe(fitted), tmp_path / "run", fitted / "data")
    model, ids, entering = run.model, run.windows("train")[:8], []
    with torch.no_grad():
        final = run_tokens(model, ids, keep=entering)
        before = [(final - entering[layer]).square().mean() for layer in ANEE["exit_layers"]]
        gates.start_translators(run, ids)
        after = [(final - model.bridges.of_exit(layer)(entering[layer])).square().mean() for layer in ANEE["exit_layers"]]
    assert all(b < 0.9 * a for a, b in zip(before, after, strict=True))


def test_gates_say_what_leaving_loses(run):
    """In the mean over the text, and with some relation to each token."""
    with torch.no_grad():
        gates.solve_gates(run, run.windows("train"), torch.zeros(2))
        seen = gates.exits_of(run.model, run.windows("train")[:20], 0.7, 1.0, torch.Generator().manual_seed(0))
    for exit in range(2):
        said, lost = seen.scores[:, exit], seen.loss[:, exit]
        assert abs(float(said.exp().mean() / lost.mean()) - 1.0) < 0.3
        assert torch.corrcoef(torch.stack((said, lost.log())))[0, 1] > 0.1


def test_exits_cost_what_is_lost_and_save_what_is_left_out(run):
    loss = torch.tensor([[3.0, 2.0, 0.0], [1.0, 0.1, 0.0]])
    seen = gates.Exits(torch.zeros(2, 2, 4), loss, loss[:, :2].log(), torch.tensor([0.6, 0.2]))
    assert [float(x) for x in seen.outcome(torch.zeros(2, 2))] == [0.0, 0.0]
    found = seen.outcome(torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(torch.stack(found), torch.tensor([0.05, 0.1]))
    leaves = seen.logits(seen.price(0.5)) > 0
    assert leaves.any(dim=1).tolist() == [False, True]
    saved = gates.saved_of(run.model)
    assert 0 < saved[1] < saved[0] < 1


# Runs


@pytest.mark.parametrize("stage", ["flips", "routers", "gates"])
def test_a_fit_killed_and_resumed_makes_the_same(fitted, forks, stage, tmp_path, monkeypatch):
    monkeypatch.setitem(GATHERING_FLOPS, "cpu", AS_SHIPPED)
    fit_killed_in(forks, stage, recipe(fitted), tmp_path / "run", fitted / "data")
    fit(recipe(fitted), tmp_path / "run", fitted / "data")
    assert_same_run(tmp_path / "run", fitted / "run")


@pytest.mark.parametrize("stage", [flips, routers, gates])
def test_another_kind_has_no_gates(fitted, tmp_path, stage):
    other = Run.open(recipe(fitted, anee={"controller": "learned"}), tmp_path / "run", fitted / "data")
    with pytest.raises(ValueError, match="controller='learned' has no gates"):
        stage.run_stage(other)


def test_gates_need_exits(fitted, tmp_path):
    without = Run.open(recipe(fitted, anee=ANEE | {"exit_translator_rank": 0}), tmp_path / "run", fitted / "data")
    with pytest.raises(ValueError, match="exit_translator_rank=0 leaves nothing to train"):
        gates.run_stage(without)
