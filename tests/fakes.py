"""Made-up costs and hidden states, and controllers that are asked about them as the executor asks."""

import functools

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

from modeling_anee.actions import DEFAULT_TABLE, EXIT, PROCESS, SKIP, SKIP_FFN
from modeling_anee.configuration_anee import AneeConfig
from modeling_anee.controller import Controller, Observation
from modeling_anee.controller_gated import GatedController
from modeling_anee.controller_kinds import build_controller
from modeling_anee.controller_learned import LearnedController
from modeling_anee.controller_routed import RoutedController
from modeling_anee.costs import CostTable
from modeling_anee.hardware import HARDWARE

from .tiny import calibration_of_gates, randomise_gates


HIDDEN, VOCABULARY = 8, 16
STRETCH = 600  # tokens of a text that is long enough for its mean to be near the budget
EXACT = 1e-7
relaxed = settings(deadline=None, derandomize=True, max_examples=60)
fewer = settings(deadline=None, derandomize=True, max_examples=25)
seeds = st.integers(0, 2**31)
budgets = st.floats(0.0, 0.999)


@functools.cache
def text_config(layers: int) -> dict:
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": VOCABULARY}
    return LlamaConfig(num_hidden_layers=layers, **sizes).to_dict()


def random_costs(layers: int, seed: int = 0, head: float = 0.05) -> CostTable:
    """Layers of different cost, with bridges and translators; what is left out costs between 1% and 90% of a layer."""
    generator = torch.Generator().manual_seed(seed)
    process, kept, attention, bridge = torch.rand(4, layers, generator=generator, dtype=torch.float64)
    process = process + 0.2
    leave = process * (0.01 + 0.2 * kept)
    skip = leave + process * 0.05 * bridge
    skip_ffn = process * (0.4 + 0.5 * attention)
    translator = 0.03 * float(kept[0])
    leave[-1] += translator
    by_action = {PROCESS: process, SKIP: skip, EXIT: leave, SKIP_FFN: skip_ffn}
    table = torch.stack([by_action[action] for action in range(len(DEFAULT_TABLE))], dim=1)
    total = float(process.sum()) * (1.0 + head)
    return CostTable(table / total, head / (1.0 + head), 1e5, HARDWARE["flops"], translator / total)


def configuration(kind: str, layers: int, **fields) -> AneeConfig:
    fields = {"min_layers": min(1, layers), "keep_last_layers": min(1, layers - 1)} | fields
    return AneeConfig(text_config=text_config(layers), controller=kind, **fields)


def build(kind: str, costs: CostTable, **fields) -> Controller:
    config = configuration(kind, len(costs.layers), **fields)
    if kind == "gated" and config.calibration is None:
        config.calibration = calibration_of_gates(config)
    controller = build_controller(config)
    controller.bind(costs)
    if isinstance(controller, GatedController):
        randomise_gates(controller)
    if isinstance(controller, LearnedController | RoutedController):
        randomise(controller)
    return controller.requires_grad_(False)


def randomise(controller: LearnedController | RoutedController, seed: int = 0) -> None:
    """Weights under which actions differ from token to token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter.copy_(2 * torch.randn(parameter.shape, generator=generator))


def run(
    controller: Controller,
    costs: CostTable,
    budget: Tensor | float,
    index: Tensor | None = None,
    hidden: Tensor | None = None,
    logits=None,
) -> tuple[Tensor, Tensor]:
    """Ask about N tokens as the executor does: actions [N, L] and costs float64 [N]."""
    count = next((len(x) for x in (hidden, index, budget) if isinstance(x, Tensor)), 1)
    index = torch.arange(count) if index is None else index
    hidden = states(count) if hidden is None else hidden
    budget = torch.as_tensor(budget, dtype=torch.float64).expand(count)
    actions, charges = torch.zeros(count, controller.num_layers, dtype=torch.uint8), torch.zeros(count, dtype=torch.float64)
    for segment, (start, stop) in enumerate(controller.segments):
        asked = torch.ones(count, dtype=torch.bool) if start == 0 else actions[:, start - 1] != EXIT
        if not asked.any():
            break
        spent = (costs.head + costs.of_actions(actions[:, :start]) + charges)[asked]
        row, account = torch.zeros(len(spent), dtype=torch.int64), torch.zeros(len(spent), dtype=torch.float64)
        seen = Observation(
            hidden[asked], 0.5 * hidden[asked], budget[asked], spent, index[asked], logits or unsure, row, account
        )
        decision = controller.decide(segment, seen)
        assert decision.actions.dtype == torch.uint8 and decision.actions.shape == (int(asked.sum()), stop - start)
        exits = (decision.actions == EXIT).cumsum(dim=-1) > 0
        actions[asked, start:stop] = decision.actions.masked_fill(exits, EXIT)
        charges[asked] += decision.cost
        actions[actions[:, stop - 1] == EXIT, stop:] = EXIT
    return actions, costs.of_plans(actions) + charges


def states(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def unsure(hidden: Tensor) -> Tensor:
    return torch.zeros(len(hidden), VOCABULARY)


def random_head(seed: int):
    """A head that is sure of some tokens and not of others."""
    matrix = 3 * torch.randn(HIDDEN, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return lambda hidden: hidden @ matrix


@st.composite
def random_plans(draw, layers: int) -> list[str]:
    bodies = st.text(alphabet="PSF", min_size=layers, max_size=layers)
    cut = st.builds(lambda body, end: body[:end] + "E" * (layers - end), bodies, st.integers(0, layers))
    return draw(st.lists(cut | bodies, min_size=1, max_size=5))


@st.composite
def layer_limits(draw, layers: int) -> dict[str, int]:
    return {"min_layers": draw(st.integers(0, layers)), "keep_last_layers": draw(st.integers(0, layers))}
