"""Exit translators: from the hidden states before a layer to the base's final distribution (tuned lens, arXiv:2303.08112)."""

import torch
from torch import Tensor

from ...evaluation.rollout import run as run_tokens
from ..losses import sampled_kl
from ..optimise import batch_of, train
from ..run import Run


NAME = "exits"
SHARE_OF_TOKENS = 0.25  # whose distributions are compared, at every exit


def run_stage(run: Run) -> dict:
    """Train every translator of the model on the base's own hidden states, by KL to its final distribution.

    Raises:
        ValueError: the model has no translators.
    """
    settings, model = run.settings(NAME), run.model
    translators = model.bridges.exit
    if not len(translators):
        raise ValueError("exit_translator_rank=0 leaves nothing to train: the stage 'exits' needs a rank of at least 1")
    windows = run.windows("train")
    parameters = {name: p for name, p in run.own_parameters().items() if name.startswith("bridges.exit.")}

    def loss_of_step(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        ids = batch_of(windows, settings, step, run)
        entering: list[Tensor] = []
        with torch.no_grad():
            teacher = run_tokens(model, ids, keep=entering)
        count = int(SHARE_OF_TOKENS * ids.numel())
        losses = {
            f"kl_{layer}": sampled_kl(model.stack.logits, teacher, translator(entering[int(layer)]), count, generator)
            for layer, translator in translators.items()
        }
        return torch.stack(list(losses.values())).sum(), losses

    train(run, NAME, parameters, loss_of_step)
    return {}
