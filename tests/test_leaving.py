"""What those that stay lose when others leave."""

import torch

from modeling_anee.evaluation.rollout import run as run_tokens
from modeling_anee.training.leaving import SHARE, lost_by_others
from modeling_anee.training.losses import kl_divergence

from .tiny import LAYERS, token_ids, wrap


IDS = token_ids(2, 24)


def test_nobody_sees_those_who_leave_before_the_last_layer():
    """Its keys and values are of what enters it, and that is the same whether they leave or stay."""
    model = wrap(controller="gated", exit_translator_rank=0, exit_layers=[1, LAYERS - 1])
    with torch.no_grad():
        lost, left = lost_by_others(model, IDS)
    assert lost[0] > 1e-6 and abs(float(lost[1])) < 1e-9
    tokens = IDS.numel() - len(IDS) * model.config.keep_first_tokens
    assert left[0] == left[1] and abs(float(left[0]) / tokens - SHARE) < 0.05


def test_it_is_the_loss_of_all_others_beside_the_base():
    """Which is what a run has in which the same tokens leave."""
    model = wrap(controller="gated", exit_translator_rank=0, exit_layers=[1])
    kept = model.config.keep_first_tokens
    with torch.no_grad():
        target = model.stack.logits(run_tokens(model, IDS))
        sure = target.log_softmax(dim=-1).amax(dim=-1)
        leaves = sure > sure[:, kept:].quantile(1.0 - SHARE)
        leaves[:, :kept] = False
        actions = torch.full((*IDS.shape, LAYERS), int(model.controller.choices[0]), dtype=torch.uint8)
        actions[:, :, 1:][leaves] = model.controller.leave
        others = kl_divergence(target, model.stack.logits(run_tokens(model, IDS, actions)))[~leaves].sum()
        lost, left = lost_by_others(model, IDS)
    torch.testing.assert_close(lost, others.double().view(1), rtol=1e-4, atol=1e-6)
    assert int(left) == int(leaves.sum())
