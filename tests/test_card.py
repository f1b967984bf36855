"""The model card: every number is the artifact's, the recipe's or a report's; the code on it runs."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from modeling_anee import AneeConfig
from modeling_anee.cli.main import app
from modeling_anee.data import smollm2
from modeling_anee.evaluation.report import write_report
from modeling_anee.publishing.card import PNG, quality, unit_of, write_card
from modeling_anee.publishing.card_figures import Measured
from modeling_anee.publishing.card_metadata import About

from .test_configuration_prices import PRICES
from .tiny import tiny_base, wrap
from .workshop import make_workshop, recipe_fields, tiny_tokenizer, words


CALIBRATION = {
    "budgets": [0.5, 0.7, 0.9],
    "settings": [9.0, 5.0, 1.0],
    "cost": [0.51, 0.7, 0.89],
    "perplexity_ratio": [2.5, 1.6, 1.02],
    "standard_error": [0.2, 0.05, 0.004],
}
FIELDS = {"bridge_rank": 4, "bridge_layers": [1, 2], "ffn_bridge_rank": 3, "ffn_bridge_layers": [3], "plans": ["PPSP", "PSSF"]}
ROW = {"name": "plan", "budget": 0.8, "cost": 0.79, "perplexity": 12.3, "ratio": 1.25, "standard_error": 0.01}
SCORED = {"budget": 0.8, "mean_cost": 0.787, "perplexity": 12.8, "ratio": 1.3, "ratio_standard_error": 0.02}
PLACE = {"text": "other.txt", "windows": 7, "length": 64}
FIXED = ROW | {"name": "uniform INT8", "budget": 0.252, "cost": 0.252, "perplexity": 10.1, "ratio": 1.001, "fixed": True}
COMPARISON = {**PLACE, "rows": [FIXED, ROW]}
BUDGETS = {**PLACE, "rows": [SCORED | {"budget": 1.0, "mean_cost": 1.0}, SCORED]}
SAMPLES = {"max_new_tokens": 9, "rows": [{"prompt": "Why?", "budget": 0.8, "cost": 0.8, "text": "# so\n```"}]}


@pytest.fixture
def workshop(tmp_path):
    """A folder with a base, a recipe and an artifact."""
    make_workshop(tmp_path)
    text = {"train": [{"file": "text.txt", "tokens": 1200}, {"generated": "bos", "tokens": 30, "documents": 2}]}
    anee = {"controller": "plan", "bridge_rank": 4, "ffn_bridge_rank": 3}
    recipe = yaml.safe_dump(recipe_fields(tmp_path, text=text, anee=anee))
    (tmp_path / "recipe.yaml").write_text(f"# A comment.\n{recipe}")
    save_artifact(tmp_path, calibration=CALIBRATION)
    return tmp_path


def save_artifact(folder, **fields):
    model = wrap(tiny_base(), "plan", **(FIELDS | {"base_model_name_or_path": str(folder / "base")} | fields))
    model.save_pretrained(folder / "artifact", tokenizer=tiny_tokenizer())


def card_of(folder, measured=None, **about):
    return write_card(folder / "artifact", [folder / "recipe.yaml"], measured or Measured(), About(**about)).read_text()


def anee_card(folder, *options):
    call = ["card", folder / "artifact", "--recipe", folder / "recipe.yaml", *options]
    return CliRunner().invoke(app, [str(argument) for argument in call])


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_front_matter_is_what_the_hub_reads(workshop):
    fields = front_matter(card_of(workshop))
    assert fields["library_name"] == "transformers" and fields["pipeline_tag"] == "text-generation"
    assert fields["license"] == "apache-2.0" and "anee" in fields["tags"]
    assert "base_model" not in fields  # a folder is no name on the Hub
    save_artifact(workshop, **smollm2.BASE_FIELDS)
    card = card_of(workshop)
    assert front_matter(card)["base_model"] == smollm2.REPOSITORY
    assert f"`{smollm2.REPOSITORY}`" in card and smollm2.GGUF_FILE in card and "its own license" in card
    assert "under mit." in card_of(workshop, base_license="mit").split("## License")[1]
    assert front_matter(card_of(workshop, license="mit"))["license"] == "mit"


def test_no_folder_of_this_machine_is_on_it_but_in_the_recipe(workshop):
    card = card_of(workshop)
    assert str(workshop) not in card.split("## Recipe")[0] and "# A comment." in card.split("## Recipe")[1]


def test_it_counts_what_is_in_the_artifact(workshop):
    card = card_of(workshop)
    assert "| bridges for skipped layers, rank 4 | 2 | 576 |" in card  # 2 * (32 * 4 + 4 * 32 + 32)
    assert "| bridges for skipped feed-forwards, rank 3 | 1 | 224 |" in card
    assert "exit translators" not in card and "| plans | 2 | - |" in card
    assert "| `plan` controller | 1 | 0 |" in card


def test_data_and_curve_are_those_of_recipe_and_config(workshop):
    card = card_of(workshop)
    assert "| train | `text.txt` | 1,200 |" in card and "`generated='bos'`" in card
    assert "| budget | cost | ratio | standard error |" in card
    assert "| 0.5 | 0.510 | 2.500 | 0.2000 |" in card and "settings" not in card
    assert "Beside controls" not in card and "not used for the fit" not in card and "Greedy" not in card


def test_recipes_that_followed_each_other_are_all_on_it_and_their_text_once(workshop):
    recipe = yaml.safe_load((workshop / "recipe.yaml").read_text())
    recipe["text"]["train"].append({"file": "more.txt", "tokens": 700})
    (workshop / "more.yaml").write_text(yaml.safe_dump(recipe))
    assert anee_card(workshop, "--recipe", workshop / "more.yaml").exit_code == 0
    card = (workshop / "artifact" / "README.md").read_text()
    assert card.index("<summary>recipe.yaml</summary>") < card.index("<summary>more.yaml</summary>")
    assert card.count("| train | `text.txt` | 1,200 |") == 1 and "| train | `more.txt` | 700 |" in card


def test_limits_follow_from_the_figures(workshop):
    card = card_of(workshop, language="Dutch").split("## Limits")[1]
    assert "Fitted on Dutch text" in card and "first token leaves nothing out" in card
    assert "from 0.5 to 0.9" in card
    assert "At budget 0.5, the lowest that was measured, perplexity is 2.50 times" in card
    assert "more than 1.5 times the base's at a budget of 0.7" in card
    assert quality([0.5, 0.9], [1.2, 1.01]) == [
        "At budget 0.5, the lowest that was measured, perplexity is 1.20 times the base's."
    ]
    save_artifact(workshop, budget_mode="strict")
    card = card_of(workshop).split("## Limits")[1]
    assert "`strict`" in card and "processed in full" not in card and "measured" not in card.split("## Recipe")[0]


def test_without_any_figure_it_says_so(workshop):
    save_artifact(workshop)
    assert "## Measured\n\nNothing yet.\n" in card_of(workshop)


def test_figures_that_are_given_are_on_it(workshop):
    files = {name: workshop / f"{name}.json" for name in ("compare", "kept", "samples")}
    for file, report in zip(files.values(), (COMPARISON, BUDGETS, SAMPLES), strict=True):
        write_report(report, file)
    options = ("--figures", files["compare"], "--budget-figures", files["kept"], "--samples", files["samples"])
    done = anee_card(workshop, *options)
    assert done.exit_code == 0 and done.stdout.split() == ["card:", str(workshop / "artifact" / "README.md")], done.output
    card = (workshop / "artifact" / "README.md").read_text()
    assert "| 0.8 | plan | 0.790 | 12.30 | 1.250 +- 0.010 |" in card
    assert "| fixed | uniform INT8 | 0.252 | 10.10 | 1.001 +- 0.010 |" in card
    assert "| `other.txt` (7 windows of 64 tokens) | 0.8 | 0.787 | 1.300 +- 0.020 |" in card
    assert "at most 0.013 off its budget" in card
    assert "````text\n# so\n```\n````" in card and "at most 9 tokens, unedited" in card


@pytest.mark.parametrize("option", ["--figures", "--budget-figures", "--samples"])
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"rows": [{}]}', '{"rows": 1}'])
def test_files_that_are_no_reports_are_errors(workshop, option, content):
    (workshop / "wrong.json").write_text(content)
    done = anee_card(workshop, option, workshop / "wrong.json")
    assert done.exit_code == 1 and "wrong.json is not a report of anee" in done.stderr
    assert not (workshop / "artifact" / "README.md").exists()


def test_results_are_a_model_index_that_the_hub_reads(workshop):
    files = {name: workshop / f"{name}.json" for name in ("compare", "kept")}
    other = ROW | {"name": "random skip", "perplexity": 99.0}
    write_report({**COMPARISON, "rows": [ROW, other]}, files["compare"])
    write_report(BUDGETS, files["kept"])
    save_artifact(workshop, base_model_name_or_path="org/base")
    measured = Measured.read(files["compare"], [files["kept"]], None)
    card = ModelCard(card_of(workshop, measured, repository="user/dial"))
    assert card.data.base_model == "org/base" and card.data.model_name == "dial"
    assert 'name = "user/dial"\n' in card.content
    results = card.data.eval_results
    found = [(result.metric_type, result.metric_args["energy_budget"], result.metric_value) for result in results]
    kept = [(kind, budget, value) for kind, value in (("perplexity", 12.8), ("perplexity_ratio", 1.3)) for budget in (1.0, 0.8)]
    own = [("perplexity", 0.8, 12.3), ("perplexity_ratio", 0.8, 1.25)]
    assert sorted(found) == sorted(kept + own)
    assert {(result.dataset_name, result.dataset_config) for result in results} == {("other.txt", "7 windows of 64 tokens")}
    assert "cost 0.787" in results[2].metric_name
    assert ModelCard(card_of(workshop)).data.eval_results is None


def test_pictures_are_put_beside_it(workshop):
    picture = workshop / "drawn.png"
    picture.write_bytes(PNG + b"1")
    card = card_of(workshop, curve=picture)
    assert "](budget_curve.png)" in card and "heatmap.png" not in card
    assert (workshop / "artifact" / "budget_curve.png").read_bytes() == picture.read_bytes()
    done = anee_card(workshop, "--heatmap", workshop / "recipe.yaml")
    assert done.exit_code == 1 and "recipe.yaml is not a PNG file" in done.stderr
    assert (workshop / "artifact" / "README.md").read_text() == card
    assert anee_card(workshop, "--heatmap", picture).exit_code == 0
    assert "](heatmap.png)" in (workshop / "artifact" / "README.md").read_text()


@pytest.mark.parametrize("option", ["--figures", "--budget-figures", "--samples"])
def test_figures_that_are_no_numbers_are_refused(workshop, option):
    report = {"--figures": COMPARISON, "--budget-figures": BUDGETS, "--samples": SAMPLES}[option]
    text = json.dumps(report).replace("0.79,", "null,").replace("0.787,", "NaN,").replace('"cost": 0.8,', '"cost": null,')
    (workshop / "figures.json").write_text(text)
    done = anee_card(workshop, option, workshop / "figures.json")
    assert done.exit_code == 1 and "it must be a finite number" in done.stderr and "budget 0.8" in done.stderr
    assert not (workshop / "artifact" / "README.md").exists()


def test_a_single_window_has_no_standard_error(workshop):
    one = [{**COMPARISON, "rows": [ROW | {"standard_error": None}]}]
    one.append({**BUDGETS, "rows": [SCORED | {"ratio_standard_error": None}]})
    for name, report in zip("ab", one, strict=True):
        write_report(report, workshop / name)
    card = card_of(workshop, Measured.read(workshop / "a", [workshop / "b"], None))
    assert "| 12.30 | 1.250 |" in card and "| 0.787 | 1.300 |" in card


def test_the_recipe_of_another_artifact_is_an_error(workshop):
    save_artifact(workshop, bridge_rank=2)
    with pytest.raises(ValueError, match="bridge_rank=4, but the artifact 2"):
        card_of(workshop)


def test_a_folder_without_artifact_is_an_error(workshop):
    (workshop / "artifact" / "config.json").unlink()
    done = anee_card(workshop)
    assert done.exit_code == 1 and "artifact is not an artifact" in done.stderr


@pytest.mark.parametrize("chat", [True, False])
def test_the_code_on_it_runs_beside_the_artifact(workshop, chat, forks):
    if not chat:
        (workshop / "artifact" / "chat_template.jinja").unlink()
    code = re.search(r"```python\n(.*?)```", card_of(workshop), re.DOTALL).group(1)
    assert ("apply_chat_template" in code) == chat and len(code.splitlines()) <= 12
    done = forks.run(code, folder=workshop)
    assert done.returncode == 0, done.stderr
    assert "mean cost" in done.stdout and words(10)[:1] in done.stdout


def test_it_says_what_costs_count():
    config = AneeConfig(text_config={"model_type": "llama"})
    assert unit_of(config) == "bytes of weights read"
    config.cost_unit = "flops"
    assert unit_of(config) == "FLOPs"
    config.cost_unit, config.prices = "ms", PRICES
    assert unit_of(config) == "ms, as priced for a machine"
