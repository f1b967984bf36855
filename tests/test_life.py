"""The life of tokens, read back from its PNG."""

import pytest
import torch
from matplotlib import image
from matplotlib.colors import to_rgb

from modeling_anee.actions import DEFAULT_TABLE, PROCESS, SKIP, SKIP_FFN
from modeling_anee.evaluation.analysis import SHOWN, describe
from modeling_anee.evaluation.decisions import Decisions
from modeling_anee.pictures.life import draw_life


LAYERS, TOKENS = 6, 40


def report_of(*budgets_and_ways):
    """Figures of ways uint8 [N, L] at budgets; the tokens are of two classes in turn."""
    rows = []
    for budget, ways in budgets_and_ways:
        none = torch.zeros(len(ways), dtype=torch.uint8)
        decisions = Decisions(ways, none, torch.full((len(ways),), budget), DEFAULT_TABLE, {})
        rows.append({"budget": budget, **describe(decisions, torch.arange(len(ways)) % 2)})
    actions = [{name: getattr(action, name) for name in SHOWN} for action in DEFAULT_TABLE]
    return {"actions": actions, "rows": rows}


def ways_with(action, count):
    """Everything processed, but for the first tokens, which take an action at every layer."""
    ways = torch.full((TOKENS, LAYERS), PROCESS, dtype=torch.uint8)
    ways[:count] = action
    return ways


def pixels_of(path, action):
    """How many pixels above the legend have the colour of an action."""
    pixels = torch.from_numpy(image.imread(path)).float()[:-30, :, :3]
    return int(((pixels - torch.tensor(to_rgb(DEFAULT_TABLE[action].colour))).abs().amax(dim=-1) < 0.01).sum())


def test_areas_are_shares(tmp_path):
    areas = {}
    for count in (10, 20):
        draw_life(report_of((0.5, ways_with(SKIP, count))), tmp_path / "x.png")
        areas[count] = pixels_of(tmp_path / "x.png", SKIP), pixels_of(tmp_path / "x.png", PROCESS)
    assert areas[20][0] == pytest.approx(2 * areas[10][0], rel=0.05)
    assert sum(areas[20]) == pytest.approx(sum(areas[10]), rel=0.02)
    assert areas[20][0] == pytest.approx(areas[20][1], rel=0.05)


def test_a_budget_has_a_line_of_its_own(tmp_path):
    ways = ways_with(SKIP_FFN, 20)
    draw_life(report_of((0.5, ways)), tmp_path / "one.png")
    draw_life(report_of((0.5, ways), (0.4, ways)), tmp_path / "two.png")
    assert pixels_of(tmp_path / "two.png", SKIP_FFN) == pytest.approx(2 * pixels_of(tmp_path / "one.png", SKIP_FFN), rel=0.25)


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not the name of a picture"):
        draw_life(report_of((0.5, ways_with(SKIP, 1))), tmp_path / "life.doc")
