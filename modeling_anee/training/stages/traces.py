"""Traces: what a controller could know of every token, and what a teacher knows, as safetensors shards.

Tokens follow plans of random budgets, as they do while bridges are tuned, but every layer is also run, so what its
bridge misses is known exactly. One shard per window; B = 1 row, T tokens, S segments, L layers, D hidden size.
"""

from pathlib import Path

import torch
from torch import Tensor

from ...actions import FULL, NONE, PROCESS
from ...controller_learned import allowed_actions, segments_of
from ...evaluation.rollout import begin, run_layers
from ...evaluation.rollout import run as run_tokens
from ...plans import plan_table
from ..checkpoint import read_tensors, write_tensors
from ..losses import kl_divergence, relative_error
from ..run import Run
from .bridges import dearest_with_gaps, sample_plans, with_gaps
from .plans import PlanLoss


NAME = "traces"
BUDGETS = (0.4, 0.95)


def run_stage(run: Run) -> dict:
    """Write one shard per window; windows whose shard is there already are left alone."""
    settings, model = run.settings(NAME), run.model
    windows = run.windows("train")[-settings.windows :]  # the last that the bridges have seen, if they saw them at all
    table = plan_table(model.config, model.costs)
    dearest = dearest_with_gaps(model, table) if with_gaps(model, table).any() else 1.0
    (run.folder / "traces").mkdir(exist_ok=True)
    for number in run.track(len(windows), "traces"):
        if number % run.accelerator.num_processes != run.accelerator.process_index or shard(run.folder, number).exists():
            continue
        ids = windows[number : number + 1].to(run.device)
        actions, _ = sample_plans(model, table, ids, BUDGETS, run.generator(NAME, number), dearest)
        tensors = trace(model, ids, actions)
        if number < settings.kl_windows:
            tensors["action_kl"] = action_kl(model, ids)
        write_tensors(shard(run.folder, number), {name: tensor.contiguous() for name, tensor in tensors.items()})
    run.accelerator.wait_for_everyone()
    return {}


def shard(folder: Path, number: int) -> Path:
    """The file of one window, in the folder of a run."""
    return folder / "traces" / f"shard-{number:05d}.safetensors"


def read_shards(folder: Path) -> list[dict[str, Tensor]]:
    """Every shard in the folder of a run, in order."""
    return [read_tensors(path)[0] for path in sorted((folder / "traces").glob("shard-*.safetensors"))]


@torch.no_grad()
def trace(model, ids: Tensor, actions: Tensor) -> dict[str, Tensor]:
    """Follow token ids [1, T] with actions uint8 [1, T, L].

    Returns:
        ids [T]; actions [T, L]; states float16 [S + 1, T, D], the embeddings and what enters each decision; bridge_error
        float32 [T, L], the squared error of the layer's bridge over the squared norm of what the layer adds (1 where it
        has none); delta_norms float32 [T, L, 2] of attention and feed-forward, relative to the hidden state; entropy and
        max_probability float32 [T] of the base's next-token distribution (entropy / log V).
    """
    starts = [start for start, _ in segments_of(model.config)]
    hidden, step = begin(model, ids)
    states, errors, norms = [hidden[0].half()], [], []
    for layer, block in enumerate(model.stack.blocks):
        if layer in starts:
            states.append(hidden[0].half())
        attended = model.executor.layers.attend(layer, hidden, step, FULL)
        out = block.add_feed_forward(hidden, attended)
        errors.append(bridge_error(model, layer, skip_action(model, layer), hidden, attended, out)[0])
        deltas = torch.stack([(attended - hidden).norm(dim=-1), (out - attended).norm(dim=-1)], dim=-1)
        norms.append((deltas / hidden.norm(dim=-1, keepdim=True).clamp(min=1e-6))[0])
        hidden = run_layers(model, hidden, step, actions, range(layer, layer + 1))
    distribution = model.stack.logits(run_tokens(model, ids)[0]).float().log_softmax(dim=-1)
    entropy = -(distribution.exp() * distribution).sum(dim=-1) / torch.log(torch.tensor(float(distribution.shape[-1])))
    return {
        "ids": ids[0].cpu(),
        "actions": actions[0],
        "states": torch.stack(states).cpu(),
        "bridge_error": torch.stack(errors, dim=-1).float().cpu(),
        "delta_norms": torch.stack(norms, dim=1).float().cpu(),
        "entropy": entropy.cpu(),
        "max_probability": distribution.amax(dim=-1).exp().cpu(),
    }


def bridge_error(model, layer: int, action: int | None, hidden: Tensor, attended: Tensor, out: Tensor) -> Tensor:
    """Relative squared error [B, T] of the bridge that an action takes, given hidden states [B, T, D] around the layer."""
    row = None if action is None else model.config.table[action]
    bridge = None if row is None else model.bridges.stand_in(row, layer)
    if row is None or bridge is None:
        return torch.ones(hidden.shape[:2], device=hidden.device)
    entering = attended if row.attention != NONE else hidden
    return relative_error(out - entering, bridge.delta(entering))


def skip_action(model, layer: int) -> int | None:
    """How a controller can leave a layer out: whole if it can, over a bridge, what remains in the cheapest precision."""
    table, allowed, variant = model.config.table, allowed_actions(model.config)[layer], (model.config.precisions or [FULL])[-1]
    places = [place for place, action in enumerate(table) if allowed[place] and action.keys_values == variant]
    bridged = [place for place in places if model.bridges.stand_in(table[place], layer) is not None]
    return min(bridged, key=lambda place: table[place].runs, default=None)


@torch.no_grad()
def action_kl(model, ids: Tensor) -> Tensor:
    """KL to the base of every token's prediction when one layer alone is left out, float32 [T, L]."""
    loss = PlanLoss(model, ids)
    layers = model.config.num_layers
    loss.settle([PROCESS] * layers)
    columns = []
    for layer in range(layers):
        action = skip_action(model, layer)
        if action is None:
            columns.append(torch.zeros(ids.shape[1]))
        else:
            columns.append(kl_divergence(loss.target, model.stack.logits(loss.hidden(layer, action)))[0].cpu())
    return torch.stack(columns, dim=-1)
