"""The policy by reward: policy gradient on quality, savings and adherence to the budget.

Every window is rolled out twice with sampled actions at one random budget; each rollout is the other's baseline.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...controller import Observation
from ...evaluation.rollout import begin, logits_of, processed, run_layers
from ...evaluation.rollout import run as run_tokens
from ...modeling_anee import AneeForCausalLM
from ..examples import read_examples
from ..losses import kl_divergence
from ..optimise import batch_of, train
from ..rewards import adherence, advantages, policy_loss, quality, savings
from ..run import Run
from .probe import controller_of
from .supervised import price_of


NAME = "reinforcement"
ROLLOUTS = 2
HORIZON = 8  # tokens on which a token's actions are judged


@dataclass(frozen=True)
class Rollout:
    """B sequences with sampled actions; the kept first tokens are left out of all but `hidden`.

    Args:
        hidden: what enters the final norm, [B, T, D].
        head: variants of the head, uint8 [B, T].
        cost: float64 [B, n], controller included.
        log_probability: of the sampled actions, summed over layers, float32 [B, n], with gradient.
        entropy: of the policy, mean over layers, float32 [B, n], with gradient.
    """

    hidden: Tensor
    head: Tensor
    cost: Tensor
    log_probability: Tensor
    entropy: Tensor


def run_stage(run: Run) -> dict:
    """Improve the policy for `steps` steps."""
    settings = run.settings(NAME)
    controller_of(run.model)
    examples = read_examples(run.folder, run.model)
    windows = run.windows("train")
    parameters = {name: p for name, p in run.own_parameters().items() if name.startswith("controller.policies.")}

    def loss_of_step(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        ids = batch_of(windows, settings, step, run)
        budget = examples.budgets(torch.rand(len(ids), generator=generator, dtype=torch.float64))
        repeated = budget.repeat_interleave(ROLLOUTS)
        rollout = roll(run.model, ids.repeat_interleave(ROLLOUTS, dim=0), repeated, price_of(examples, repeated), generator)
        parts = reward_parts(run.model, ids, rollout, repeated, settings)
        reward = parts["quality"] + settings.savings_weight * parts["savings"] + settings.adherence_weight * parts["adherence"]
        advantage = advantages(reward.unflatten(0, (-1, ROLLOUTS))).flatten(0, 1)
        loss = policy_loss(rollout.log_probability, advantage.float(), rollout.entropy, settings.entropy_bonus)
        parts |= {"reward": reward, "entropy": rollout.entropy, "cost": rollout.cost}
        return loss, {name: part.mean() for name, part in parts.items()}

    train(run, NAME, parameters, loss_of_step)
    return {}


def roll(model: AneeForCausalLM, ids: Tensor, budget: Tensor, price: Tensor, generator: torch.Generator) -> Rollout:
    """Run token ids [B, T] with actions drawn from the policy, at budgets and prices float64 [B]."""
    controller = controller_of(model)
    kept = model.config.keep_first_tokens
    hidden, step = begin(model, ids)
    actions = processed(model, ids)
    rows, tokens = ids.shape[0], ids.shape[1] - kept
    log_probability = torch.zeros(rows * tokens, device=ids.device)
    entropies, done, previous = [], 0, hidden
    each, index = budget.repeat_interleave(tokens), torch.arange(kept, ids.shape[1]).repeat(rows)
    of_head = model.costs.of_heads(controller.heads(each, index))
    prices, exit_action = price.repeat_interleave(tokens).view(-1, 1, 1), controller.exit_action
    for segment, (start, stop) in enumerate(controller.segments):
        with torch.no_grad():
            hidden = run_layers(model, hidden, step, actions, range(done, start))
        here = actions[:, kept:, :start].flatten(0, 1)
        spent = of_head + model.costs.of_actions(here) + controller.cost_before(segment)
        seen = Observation(_tokens(hidden, kept), _tokens(previous, kept), each, spent, index, model.stack.logits)
        worth = controller.logits(segment, seen) - (prices * model.costs.layers[start:stop]).to(ids.device, torch.float32)
        logs = worth.log_softmax(dim=-1)
        drawn = _draw(logs.detach(), generator)
        gone = here[:, -1] == exit_action if start else torch.zeros(len(here), dtype=torch.bool)
        exits = (gone.unsqueeze(1) | (drawn.cpu() == exit_action)).cumsum(dim=1) > 0
        counted = (exits.long().cumsum(dim=1) <= 1) & ~gone.unsqueeze(1)  # what follows an exit was not decided
        chosen = logs.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
        log_probability = log_probability + (chosen * counted.to(chosen)).sum(dim=-1)
        entropies.append(-(logs.exp() * logs.clamp(min=-1e3)).sum(dim=-1).mean(dim=-1))
        final = drawn.cpu().masked_fill(exits, exit_action).to(torch.uint8).view(rows, tokens, -1)
        actions[:, kept:, start:stop] = final
        actions[:, kept:, stop:][final[..., -1] == exit_action] = exit_action
        done, previous = start, hidden
    with torch.no_grad():
        hidden = run_layers(model, hidden, step, actions, range(done, model.config.num_layers))
        hidden = model.executor.translate(hidden, actions)
    cost = (
        model.costs.of_actions(actions[:, kept:])
        + of_head.view(rows, tokens)
        + controller.cost_before(len(controller.segments))
    )
    entropy = torch.stack(entropies).mean(dim=0).view(rows, tokens)
    heads = torch.zeros(ids.shape, dtype=torch.uint8)
    heads[:, kept:] = controller.heads(each, index).view(rows, tokens)
    return Rollout(hidden, heads, cost, log_probability.view(rows, tokens), entropy)


@torch.no_grad()
def reward_parts(model: AneeForCausalLM, ids: Tensor, rollout: Rollout, budget: Tensor, settings) -> dict[str, Tensor]:
    """Parts of the reward of every decided token, on the CPU: float64 [B, n], adherence [B, 1]."""
    kept = model.config.keep_first_tokens
    teacher = run_tokens(model, ids)
    rows = []
    for row, (hidden, head) in enumerate(zip(rollout.hidden, rollout.head, strict=True)):  # one by one: logits are large
        target = model.stack.logits(teacher[row // ROLLOUTS])
        rows.append(kl_divergence(target, logits_of(model, hidden, head))[kept:].double().cpu())
    good = quality(torch.stack(rows), HORIZON)
    return {
        "quality": good,
        "savings": savings(rollout.cost, good, settings.quality_gate),
        "adherence": adherence(rollout.cost, budget),
    }


def _tokens(hidden: Tensor, kept: int) -> Tensor:
    return hidden[:, kept:].flatten(0, 1)


def _draw(log_probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One action per pair, int64 [N, n], by Gumbel noise from a CPU generator: the same on every device."""
    uniform = torch.rand(log_probabilities.shape, generator=generator).clamp(1e-9, 1.0 - 1e-7).to(log_probabilities.device)
    return (log_probabilities - (-uniform.log()).log()).argmax(dim=-1)
