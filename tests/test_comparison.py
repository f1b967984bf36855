"""The comparison: one row per budget and way to spend it, all on the same windows, counted as announced."""

import pytest
import torch

from modeling_anee.data.windows import windows
from modeling_anee.evaluation.comparison import as_text, compare, count_scores
from modeling_anee.evaluation.perplexity import score
from modeling_anee.evaluation.rollout import processed
from modeling_anee.training.checkpoint import write_tensors
from modeling_anee.training.oracle import oracle_control
from modeling_anee.training.stages.traces import action_kl, shard, trace

from .tiny import BRIDGES, tiny_base, token_ids, wrap


BUDGETS = [0.9, 0.7]
CONTROLS = ["random skip, same bridges", "static plan, no bridges", "static plan, same bridges"]
ORACLE = "oracle (not a way to save)"


@pytest.fixture(scope="module")
def models():
    base = tiny_base()
    plan = wrap(base, "plan", plans=["PPSP", "PSSP"], **BRIDGES)
    return {"plan": plan, "mine": wrap(base, "budget", bridge_rank=4)}


@pytest.fixture(scope="module")
def text():
    return windows(token_ids(1, 300)[0], 50)


def test_every_way_has_a_row_per_budget(models, text):
    advanced = []
    rows = compare(models, text, BUDGETS, progress=advanced.append)
    assert [row["name"] for row in rows] == ["base", *(CONTROLS + list(models)) * 2]
    assert [row["budget"] for row in rows] == [1.0, *[0.9] * 5, *[0.7] * 5]
    assert sum(advanced) == count_scores(2, 2, others=0) * len(text)
    assert rows[0]["ratio"] == 1.0 and rows[0]["standard_error"] == 0.0 and rows[0]["cost"] == 1.0
    for row in rows[1:]:
        assert row["ratio"] == pytest.approx(row["perplexity"] / rows[0]["perplexity"])
        assert row["name"] not in models or row["perplexity"] == score(models[row["name"]], text, row["budget"]).perplexity


def test_the_plan_controller_is_its_own_static_control(models, text):
    rows = {(row["name"], row["budget"]): row for row in compare(models, text, BUDGETS)}
    for budget in BUDGETS:
        own, control = rows["plan", budget], rows["static plan, same bridges", budget]
        assert own["ratio"] == pytest.approx(control["ratio"]) and own["cost"] == pytest.approx(control["cost"])


def test_traces_of_a_fit_add_the_oracle(models, text, tmp_path):
    model = models["plan"]
    (tmp_path / "traces").mkdir()
    for number, window in enumerate(text[:3]):
        ids = window.ids.unsqueeze(0)
        tensors = trace(model, ids, processed(model, ids)) | {"action_kl": action_kl(model, ids)}
        write_tensors(shard(tmp_path, number), tensors)
    advanced = []
    rows = compare({"plan": model}, text, BUDGETS, [oracle_control(model, tmp_path)], advanced.append)
    assert [row["budget"] for row in rows if row["name"] == ORACLE] == BUDGETS
    assert sum(advanced) == count_scores(1, 2, others=1) * len(text)
    with pytest.raises(ValueError, match="has no traces"):
        oracle_control(model, tmp_path / "gone")


def test_the_table_is_markdown(models, text):
    rows = compare(models, text, [0.8])
    lines = as_text(rows).splitlines()
    assert len(lines) == 2 + len(rows) and {line.count("|") for line in lines} == {6}
    for row, line in zip(rows, lines[2:], strict=True):
        assert f"| {row['budget']:g} | {row['name']} |" in line
        assert f"{row['ratio']:.3f} +- {row['standard_error']:.3f}" in line
    assert torch.tensor([row["ratio"] for row in rows]).isfinite().all()
