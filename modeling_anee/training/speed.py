"""How fast a base runs and trains on this machine: measured once, so that stages can be fitted to a time."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..controller_gated import GatedController
from ..data.randomness import derive_seed
from ..data.sampled_text import BATCH
from ..evaluation.rollout import run as run_tokens
from ..evaluation.rollout import with_plan
from ..modeling_anee import AneeForCausalLM
from ..plans import plan_table
from ..timing import seconds_of
from .recipe import Routers
from .shape import plan_in
from .stages import routers
from .stages.bridges import loss_of
from .stages.closed_form import Moments, solve


STEPS_A_TOKEN = 1.5  # of sampling, for each token of a full batch: some documents end early


@dataclass(frozen=True)
class Speed:
    """Seconds on this machine.

    Args:
        length: tokens of a window.
        forward: of the base on one window, its head included.
        cheap: the same with all layers in 4 bits and the head in 8.
        step: of training on one window: the base's forward, one that leaves something out, and the backward of that; 0 without
            bridges.
        solve: of one bridge in closed form; 0 without bridges.
        prepare: to wrap the base, that is, to make its weights in fewer bits.
        sample: of a token of text that the base samples; 0 where there is other text.
    """

    length: int
    forward: float
    cheap: float
    step: float = 0.0
    solve: float = 0.0
    prepare: float = 0.0
    sample: float = 0.0


def measure_speed(model: AneeForCausalLM, length: int, budgets: tuple[float, float]) -> Speed:
    """Measure a wrapped base on random tokens; `prepare` and `sample` are not measured here.

    Args:
        model: where it is to be measured.
        length: tokens of a window.
        budgets: lowest and highest that bridges are trained at, if it has any.
    """
    device = next(model.base.parameters()).device
    generator = torch.Generator().manual_seed(derive_seed("speed", length))
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(device)
    in_4_bits = with_plan(model, ids, plan_in(model, "int4"))

    @torch.no_grad()
    def forward() -> None:
        model.stack.logits(run_tokens(model, ids))

    @torch.no_grad()
    def cheap() -> None:
        model.stack.logits(run_tokens(model, ids, in_4_bits), "int8")

    speed = Speed(length, _seconds(forward), _seconds(cheap))
    if max(model.config.bridge_rank, model.config.ffn_bridge_rank) == 0:
        return speed
    gated = isinstance(model.controller, GatedController)
    step = _training_gates(model, ids, generator) if gated else _training(model, ids, budgets, generator)
    return replace(speed, step=_seconds(step), solve=_seconds(_solving(model, device)))


def measure_sampling(model: AneeForCausalLM) -> float:
    """Seconds of a token of text that the base samples."""
    device = next(model.base.parameters()).device
    ids = torch.zeros(BATCH, 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def sample() -> None:
        model.base(ids)

    return STEPS_A_TOKEN * _seconds(sample) / BATCH


def _training(
    model: AneeForCausalLM, ids: torch.Tensor, budgets: tuple[float, float], generator: torch.Generator
) -> Callable[[], object]:
    """What trains bridges on one window [1, T], without an optimiser."""
    table = plan_table(model.config, model.costs)

    def step() -> None:
        loss_of(model, table, ids, budgets, generator).backward()
        model.zero_grad()

    return step


def _training_gates(model: AneeForCausalLM, ids: torch.Tensor, generator: torch.Generator) -> Callable[[], object]:
    """The same of routers."""
    settings = Routers(steps=2, batch_windows=1, learning_rate=0.001)

    def step() -> None:
        draw = routers.Draw.of(settings, 1, model.config.num_layers, generator)
        routers.losses(model, ids, settings, draw)[0].backward()
        model.zero_grad()

    return step


def _solving(model: AneeForCausalLM, device: torch.device) -> Callable[[], object]:
    """What solves one bridge, of random moments."""
    size, rank = model.config.text_config.hidden_size, max(model.config.bridge_rank, model.config.ffn_bridge_rank)
    moments = Moments(size, device)
    moments.add(torch.randn(2 * size, size, device=device), torch.randn(2 * size, size, device=device))
    return lambda: solve(moments, rank, 0.001)


def _seconds(work: Callable[[], object]) -> float:
    work()  # the first one also chooses kernels
    return seconds_of(work)
