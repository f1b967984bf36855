"""The `gated` controller: a router in every layer, exit gates at some."""

import pytest
import torch

from modeling_anee import AneeForCausalLM
from modeling_anee.configuration_gated import strategic_layers
from modeling_anee.gates import UNTRAINED

from .fakes import HIDDEN, build, random_costs, states
from .tiny import tiny_base, token_ids


CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def test_strategic_layers_are_in_proportion_to_the_depth():
    assert strategic_layers(22) == [4, 8, 12, 16, 19]
    assert strategic_layers(30) == [5, 11, 16, 22, 26]
    assert strategic_layers(1) == [] and strategic_layers(2) == [1] and strategic_layers(4) == [1, 2, 3]


@pytest.mark.parametrize("fields", [{}, {"exit_layers": [2]}, {"exit_layers": []}, {"precisions": ["int8"]}])
@torch.no_grad()
def test_untrained_nothing_is_left_out_whatever_was_saved_and_loaded(fields, tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    model, ids = AneeForCausalLM.from_base(tmp_path / "base", controller="gated", **fields), token_ids()
    for loaded in (model, None):
        if loaded is None:
            model.save_pretrained(tmp_path / "artifact")
            loaded = AneeForCausalLM.from_pretrained(tmp_path / "artifact")
        torch.testing.assert_close(loaded(ids, energy_budget=1.0).logits, loaded.base(ids).logits, **CLOSE)
        actions = loaded(ids, energy_budget=0.1).execution.actions
        assert loaded.config.table.complete[actions.long()].all()
    assert loaded.config.exit_layers == fields.get("exit_layers", [1, 2, 3])


@pytest.mark.parametrize(
    ("precisions", "variants", "names"),
    [
        (None, None, ["PROCESS", "SKIP_FFN"]),
        (["int8", "int4"], None, ["INT8", "INT8_SKIP_FFN"]),
        (["int8", "int4"], ["int8", "int4", "none"], ["INT8", "INT4", "INT4_SKIP_FFN"]),
        (["int4"], ["full", "int4"], ["PROCESS", "INT4"]),
    ],
)
def test_choices_are_the_actions_of_the_variants(precisions, variants, names):
    model = AneeForCausalLM.from_base(tiny_base(), controller="gated", precisions=precisions, gated_variants=variants)
    assert [model.config.table.names[place] for place in model.controller.choices.tolist()] == names


def test_scores_are_linear_in_the_normalised_hidden_state_and_have_gradients():
    controller = build("gated", random_costs(4), exit_layers=[1, 3])
    controller.reset_parameters()
    assert (controller.scores(2, states(5)) == UNTRAINED).all() and (controller.exit_scores(3, states(5)) == UNTRAINED).all()
    hidden = states(6).view(2, 3, HIDDEN)
    with torch.no_grad():
        controller.routers.weight[2] = torch.arange(HIDDEN, dtype=torch.float32)
    found = controller.requires_grad_(True).scores(2, hidden)
    normal = hidden * (hidden.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(found, normal @ torch.arange(HIDDEN, dtype=torch.float32) + UNTRAINED)
    found.sum().backward()
    assert controller.routers.weight.grad[2].any() and not controller.routers.weight.grad[1].any()
    with pytest.raises(ValueError):
        controller.exit_scores(2, hidden)
