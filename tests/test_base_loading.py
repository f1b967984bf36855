"""Saving and loading: artifacts without base weights, from a folder and a Hub cache, with and without the package."""

import inspect
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from modeling_anee import AneeConfig, AneeForCausalLM
from modeling_anee.base_loading import find_base
from modeling_anee.configuration_anee import FORMAT_VERSION
from modeling_anee.folders import cache_folder
from modeling_anee.loading_arguments import LOADING_KWARGS

from .tiny import BRIDGES, CONTROLLERS, FAMILIES, tiny_base, token_ids, wrap


COMMIT = "0" * 39 + "1"


def lay_out(cache: Path, repository: str, folder: Path, commit: str = COMMIT, revision: str = "main") -> None:
    """Put a folder into a cache as the Hub client would after a download."""
    root = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, root / "snapshots" / commit)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / revision).write_text(commit)


@pytest.fixture
def base_folder(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def artifact_over(base_folder: Path, folder: Path, controller: str = "learned", **fields) -> tuple[AneeForCausalLM, Path]:
    """A saved artifact with bridges whose base lies in `base_folder`."""
    fields = {"base_model_name_or_path": str(base_folder), "decision_interval": 2} | BRIDGES | fields
    model = wrap(AutoModelForCausalLM.from_pretrained(base_folder), controller, energy_budget=0.6, **fields)
    model.save_pretrained(folder)
    return model, folder


LOAD_AND_SCORE = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
artifact, out = sys.argv[1:3]
model = AutoModelForCausalLM.from_pretrained(artifact, trust_remote_code=True, dtype=torch.float32, device_map="cpu",
                                             attn_implementation="eager")
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert model.base.config._attn_implementation == model.config._attn_implementation == "eager"
ids = torch.arange(3, 15).unsqueeze(0)
tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
config = AutoConfig.from_pretrained(artifact, trust_remote_code=True)
fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
assert fresh(ids).logits.shape == model(ids).logits.shape
torch.save({"logits": model(ids).logits.detach(), "tokens": tokens}, out)
"""


SAVE_AND_LOAD_AGAIN = """
model.save_pretrained(artifact + "-again")
again = AutoModelForCausalLM.from_pretrained(artifact + "-again", trust_remote_code=True)
torch.testing.assert_close(again(ids).logits, model(ids).logits)
"""


def expected_of(model: AneeForCausalLM) -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 15).unsqueeze(0)
    return {"logits": model(ids).logits.detach(), "tokens": model.generate(ids, max_new_tokens=5, do_sample=False)}


def check_same(file: Path, expected: dict[str, torch.Tensor]) -> None:
    found = torch.load(file)
    torch.testing.assert_close(found["logits"], expected["logits"])
    assert torch.equal(found["tokens"], expected["tokens"])


def test_without_the_package_a_folder_loads(base_folder, tmp_path, forks):
    model, artifact = artifact_over(base_folder, tmp_path / "artifact")
    done = forks.run(LOAD_AND_SCORE + SAVE_AND_LOAD_AGAIN, artifact, tmp_path / "out.pt")
    assert done.returncode == 0, done.stderr
    check_same(tmp_path / "out.pt", expected_of(model))


def test_without_the_package_a_hub_cache_loads(base_folder, tmp_path, forks):
    model, artifact = artifact_over(base_folder, tmp_path / "artifact", base_model_name_or_path="someone/base")
    lay_out(forks.home / "hub", "someone/base", base_folder)
    lay_out(forks.home / "hub", "someone/artifact", artifact)
    done = forks.run(LOAD_AND_SCORE, "someone/artifact", tmp_path / "out.pt")
    assert done.returncode == 0, done.stderr
    check_same(tmp_path / "out.pt", expected_of(model))


def test_revisions_pin_the_artifact_and_not_its_base(base_folder, tmp_path, monkeypatch):
    older, folder = artifact_over(base_folder, tmp_path / "older", base_model_name_or_path="someone/base")
    newer = wrap(AutoModelForCausalLM.from_pretrained(base_folder), "learned", base_model_name_or_path="someone/base")
    torch.nn.init.zeros_(newer.controller.policies[0][-1].weight)
    newer.save_pretrained(tmp_path / "newer")
    cache = tmp_path / "hub"
    lay_out(cache, "someone/base", base_folder)
    lay_out(cache, "someone/artifact", tmp_path / "newer")
    lay_out(cache, "someone/artifact", folder, COMMIT.replace("1", "2"), "v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for load in (AneeForCausalLM, AutoModelForCausalLM):
        model = load.from_pretrained("someone/artifact", revision="v1", energy_budget=0.6, cache_dir=cache)
        assert model.controller.policies[0][-1].weight.abs().sum() > 0
        assert load.from_pretrained("someone/artifact", cache_dir=cache).controller.policies[0][-1].weight.abs().sum() == 0
        torch.testing.assert_close(model(token_ids()).logits, older(token_ids()).logits)


def test_base_in_a_subfolder_of_the_artifacts_repository(base_folder, tmp_path, forks):
    model, artifact = artifact_over(base_folder, tmp_path / "artifact", base_model_name_or_path="./the_base")
    shutil.copytree(base_folder, artifact / "the_base")
    torch.testing.assert_close(AneeForCausalLM.from_pretrained(artifact)(token_ids()).logits, model(token_ids()).logits)
    lay_out(forks.home / "hub", "someone/both", artifact)
    done = forks.run(LOAD_AND_SCORE, "someone/both", tmp_path / "out.pt")
    assert done.returncode == 0, done.stderr
    check_same(tmp_path / "out.pt", expected_of(model))


def test_installed_package_needs_no_flag(base_folder, tmp_path):
    model, artifact = artifact_over(base_folder, tmp_path / "artifact")
    loaded = AutoModelForCausalLM.from_pretrained(artifact)
    assert type(loaded) is AneeForCausalLM and type(AutoConfig.from_pretrained(artifact)) is AneeConfig
    torch.testing.assert_close(loaded(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_of_every_family_and_controller(family, controller, tmp_path):
    tiny_base(family).save_pretrained(tmp_path / "base")
    model, artifact = artifact_over(tmp_path / "base", tmp_path / "artifact", controller)
    loaded = AneeForCausalLM.from_pretrained(artifact)
    first, second = model(token_ids()), loaded(token_ids())
    torch.testing.assert_close(first.logits, second.logits)
    assert torch.equal(first.execution.actions, second.execution.actions)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in load_file(artifact / "model.safetensors").items())


def test_modules_saved_in_half_precision_load_in_float32(base_folder, tmp_path):
    """Half the size; what was rounded once gives the same again."""
    model, artifact = artifact_over(base_folder, tmp_path / "artifact")
    half = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "half", state_dict=half)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert set(stored) == set(load_file(artifact / "model.safetensors"))
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {torch.float16}
    loaded = AneeForCausalLM.from_pretrained(tmp_path / "half")
    own = [*loaded.controller.parameters(), *loaded.bridges.parameters()]
    assert {parameter.dtype for parameter in own} == {torch.float32}
    with torch.no_grad():
        for parameter in (*model.controller.parameters(), *model.bridges.parameters()):
            parameter.copy_(parameter.half())
    torch.testing.assert_close(loaded(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("controller", ["confidence", "learned"])
def test_a_calibrated_artifact_loads_with_its_dial(controller, base_folder, tmp_path):
    calibration = {"budgets": [0.3, 0.8], "settings": [0.9, 0.4], "cost": [0.31, 0.79]}
    model, artifact = artifact_over(base_folder, tmp_path / "artifact", controller, calibration=calibration)
    loaded = AneeForCausalLM.from_pretrained(artifact)
    assert loaded.config.calibration == calibration and loaded.controller.floor == model.controller.floor
    for budget in (0.3, 0.6, 0.9):
        first, second = (each(token_ids(), energy_budget=budget) for each in (model, loaded))
        torch.testing.assert_close(first.logits, second.logits)
        assert torch.equal(first.execution.actions, second.execution.actions)


def test_artifact_holds_our_modules_the_code_and_nothing_of_the_base(base_folder, tmp_path):
    model, artifact = artifact_over(base_folder, tmp_path / "artifact")
    with safe_open(artifact / "model.safetensors", "pt") as file:
        names = set(file.keys())
    own = {"controller": model.controller, "bridges": model.bridges}
    assert names == {f"{where}.{name}" for where, module in own.items() for name in module.state_dict()}
    assert sum(name.startswith("bridges.") for name in names) == 3 * 3 * 4  # kinds, tensors, layers
    files = {path.name for path in artifact.iterdir()}
    package = Path(sys.modules["modeling_anee"].__file__).parent
    of_classifiers = {"sequence_classification.py", "classifier_heads.py", "exit_rules.py"}
    flat = {path.name for path in package.glob("*.py")} - of_classifiers - {"__init__.py", "version.py", "resources.py"}
    assert files == flat | {"config.json", "generation_config.json", "model.safetensors"}
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    config = json.loads((artifact / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_anee.AneeConfig",
        "AutoModelForCausalLM": "modeling_anee.AneeForCausalLM",
    }
    assert "_name_or_path" not in config["text_config"] and config["format_version"] == FORMAT_VERSION


def test_tokenizer_is_saved_when_given(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    wrap(tiny_base()).save_pretrained(tmp_path, tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path)("b")["input_ids"] == [1]


def test_shipped_files_import_stdlib_torch_and_transformers_only():
    package = Path(sys.modules["modeling_anee"].__file__).parent
    for path in package.glob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]) and not line.startswith(" "):
                root = words[1].split(".")[0]
                assert root in sys.stdlib_module_names | {"torch", "transformers", ""}, f"{path.name}: {line}"
                assert not words[1].startswith("..") and words[1] != ".", f"{path.name}: {line}"


def test_wrapping_and_training_leave_the_base_bit_identical():
    base = tiny_base()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = wrap(base, "learned", energy_budget=0.5, **BRIDGES).train()
    assert not base.training and not any(p.requires_grad for p in base.parameters())
    trainable = [p for p in model.parameters() if p.requires_grad]
    own = [*model.controller.parameters(), *model.bridges.parameters()]
    assert trainable and {id(p) for p in trainable} == {id(p) for p in own}
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    seen = torch.randn(5, 32)
    (model.controller.probes[0](seen).sum() + model.bridges.of_skip(1)(seen).sum()).backward()
    optimizer.step()
    model(token_ids())
    after = base.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())


def test_base_is_held_by_reference_and_memory_does_not_grow():
    base = tiny_base()
    size = sum(p.untyped_storage().nbytes() for p in {p.untyped_storage().data_ptr(): p for p in base.parameters()}.values())
    model = wrap(base)
    model(token_ids())
    own = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
    assert model.base is base
    assert sum(p.untyped_storage().nbytes() for p in own.values()) == size


def test_arguments_of_the_base_reach_it(base_folder, tmp_path):
    _, artifact = artifact_over(base_folder, tmp_path / "artifact")
    model = AneeForCausalLM.from_pretrained(artifact, dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager")
    assert model.dtype == model.base.dtype == torch.bfloat16
    assert {p.dtype for own in (model.controller, model.bridges) for p in own.parameters()} == {torch.float32}
    assert model.base.config._attn_implementation == "eager" and str(model.device) == "cpu"
    assert model(token_ids()).logits.dtype == torch.bfloat16


def test_fields_override_the_artifacts(base_folder, tmp_path):
    _, artifact = artifact_over(base_folder, tmp_path / "artifact")
    assert AneeForCausalLM.from_pretrained(artifact, energy_budget=0.25).config.energy_budget == 0.25
    assert AutoModelForCausalLM.from_pretrained(artifact, energy_budget=0.25).config.energy_budget == 0.25
    with pytest.raises(ValueError, match="energy_budget=2"):
        AneeForCausalLM.from_pretrained(artifact, energy_budget=2)


def test_another_copy_of_the_base_may_stand_in(base_folder, tmp_path, monkeypatch):
    model, artifact = artifact_over(base_folder, tmp_path / "artifact", base_model_name_or_path="someone/the-base")
    expected = model(token_ids()).logits
    loaded = AneeForCausalLM.from_pretrained(artifact, base_model_name_or_path=str(base_folder))
    torch.testing.assert_close(loaded(token_ids()).logits, expected)
    for spelling in ("someone/the-base", "someone--the-base", "the-base"):
        folder = tmp_path / "copies" / spelling.replace("/", "_")
        shutil.copytree(base_folder, folder / spelling)
        monkeypatch.setenv("ANEE_BASE_PATH", f"{tmp_path / 'nothing'}{os.pathsep}{folder}")
        assert find_base("someone/the-base") == (str(folder / spelling), None)
        torch.testing.assert_close(AneeForCausalLM.from_pretrained(artifact)(token_ids()).logits, expected)


@pytest.fixture
def homeless(monkeypatch):
    """A user without HOME and without an entry among the users, as in a container that was told to run as some number."""

    def no_entry(uid):
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", no_entry)
    for name in ("HOME", "ANEE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_home_folder_bases_are_found(homeless, tmp_path, monkeypatch):
    for name in ("cache/anee/org--base", "own/org--base"):
        tiny_base().config.save_pretrained(tmp_path / name)
    assert find_base("org/base") == ("org/base", None)
    with pytest.raises(OSError, match="no home folder.*set ANEE_CACHE"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert find_base("org/base")[0] == str(tmp_path / "cache" / "anee" / "org--base")
    monkeypatch.setenv("ANEE_CACHE", str(tmp_path / "own"))
    assert find_base("org/base")[0] == str(tmp_path / "own" / "org--base")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_same_weights_in_another_dtype_are_the_same_base(base_folder, tmp_path, dtype):
    _, artifact = artifact_over(base_folder, tmp_path / "artifact", strict_base=True)
    AneeForCausalLM.from_pretrained(artifact, dtype=dtype)


@pytest.mark.parametrize("load", [AneeForCausalLM, AutoModelForCausalLM])
def test_another_base_warns_or_raises_naming_both(load, base_folder, tmp_path, said):
    _, artifact = artifact_over(base_folder, tmp_path / "artifact", base_model_name_or_path="someone/the-base")
    tiny_base(seed=5).save_pretrained(tmp_path / "other")
    load.from_pretrained(artifact, base_model_name_or_path=str(tmp_path / "other"))
    (warning,) = [message for message in said if "differ from those that the controllers were made for" in message]
    expected, found = re.search(
        r"expected 'someone/the-base' with fingerprint (\S+), found '\S+/other' with (\S+) ", warning
    ).groups()
    assert expected != found and expected[:8] == found[:8]  # the same names and shapes
    assert re.search(r"\(\d+ of \d+ sampled weights differ\)", warning)
    with pytest.raises(ValueError, match="expected 'someone/the-base' .* strict_base=True"):
        load.from_pretrained(artifact, base_model_name_or_path=str(tmp_path / "other"), strict_base=True)


def test_base_of_another_shape_is_refused(base_folder, tmp_path):
    _, artifact = artifact_over(base_folder, tmp_path / "artifact")
    tiny_base("gpt2").save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "n_layer": 2}))
    with pytest.raises(ValueError, match="num_hidden_layers=2"):
        AneeForCausalLM.from_pretrained(artifact, base_model_name_or_path=str(tmp_path / "other"))


def test_missing_base_says_what_to_do(base_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, artifact = artifact_over(base_folder, tmp_path / "artifact", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(OSError, match="base_model_name_or_path=FOLDER"):
        AneeForCausalLM.from_pretrained(artifact)
    with pytest.raises(OSError, match="gone"):
        AneeForCausalLM.from_base(tmp_path / "gone")


def test_a_nameless_base_can_not_be_saved_before_it_is_named(base_folder, tmp_path):
    """What is saved could never be loaded: better to hear of it before a long training."""
    config = AneeConfig(text_config=tiny_base().config.to_dict())
    for model in (AneeForCausalLM.from_base(tiny_base()), AutoModelForCausalLM.from_config(config)):
        with pytest.raises(
            ValueError, match="names no base model.*base_model_name_or_path=.* to from_base, or set it in the mod"
        ):
            model.save_pretrained(tmp_path / "artifact")
        assert not (tmp_path / "artifact").exists()
    model.config.base_model_name_or_path = str(base_folder)
    model.save_pretrained(tmp_path / "artifact")
    AneeForCausalLM.from_pretrained(tmp_path / "artifact")


def test_an_artifact_without_the_name_of_its_base_says_what_to_do(base_folder, tmp_path):
    model, artifact = artifact_over(base_folder, tmp_path / "artifact")
    config = json.loads((artifact / "config.json").read_text())
    (artifact / "config.json").write_text(json.dumps(config | {"base_model_name_or_path": ""}))
    with pytest.raises(ValueError, match="names no base model"):
        AneeForCausalLM.from_pretrained(artifact)
    loaded = AneeForCausalLM.from_pretrained(artifact, base_model_name_or_path=str(base_folder))
    torch.testing.assert_close(loaded(token_ids()).logits, model(token_ids()).logits)


def test_a_plain_model_points_to_from_base(base_folder):
    with pytest.raises(ValueError, match="is a 'llama' model, not an artifact: wrap it with AneeForCausalLM.from_base"):
        AneeForCausalLM.from_pretrained(base_folder)


@pytest.mark.parametrize("load", [AneeForCausalLM, AutoModelForCausalLM])
def test_a_keyword_that_nobody_knows_is_named(load, base_folder, tmp_path):
    _, artifact = artifact_over(base_folder, tmp_path / "artifact")
    with pytest.raises(ValueError, match="'energy_buget' .did you mean 'energy_budget'.*or an argument of from_pretrained"):
        load.from_pretrained(artifact, energy_buget=0.5)
    with pytest.raises(ValueError, match="'devicemap' .did you mean 'device_map'"):
        load.from_pretrained(artifact, devicemap="auto")
    with pytest.raises(ValueError, match="hidden_size=64 is not allowed: it is the base's, which has 32"):
        load.from_pretrained(artifact, hidden_size=64)


@pytest.mark.parametrize("load", [AneeForCausalLM, AutoModelForCausalLM])
def test_every_harmless_keyword_of_transformers_is_taken(load, base_folder, tmp_path):
    model, artifact = artifact_over(base_folder, tmp_path / "artifact")
    keywords = {
        "use_safetensors": True,
        "weights_only": True,
        "low_cpu_mem_usage": True,
        "disable_mmap": True,
        "revision": "main",
    }
    keywords |= {"local_files_only": True, "trust_remote_code": False, "subfolder": "", "variant": None, "key_mapping": None}
    loaded, info = load.from_pretrained(artifact, output_loading_info=True, **keywords)
    assert not info["missing_keys"]
    torch.testing.assert_close(loaded(token_ids()).logits, model(token_ids()).logits)


def test_fields_are_taken_beside_a_configuration_too(base_folder, tmp_path):
    _, artifact = artifact_over(base_folder, tmp_path / "artifact")
    config = AneeConfig.from_pretrained(artifact)
    loaded = AneeForCausalLM.from_pretrained(artifact, config=config, energy_budget=0.25)
    assert loaded.config.energy_budget == 0.25 and config.energy_budget == 0.6


def test_the_keywords_of_transformers_are_all_known():
    """Of the installed release; a keyword that a new one takes would be refused."""
    source = inspect.getsource(PreTrainedModel.from_pretrained.__func__)
    named = set(inspect.signature(PreTrainedModel.from_pretrained).parameters) - {"model_args", "kwargs", "config"}
    popped = set(re.findall(r'kwargs\.pop\("(\w+)"', source + inspect.getsource(_BaseAutoModelClass.from_pretrained.__func__)))
    unused = set(re.findall(r'"(\w+)"', re.search(r"Not used anymore.*?\[(.*?)\]", source, re.DOTALL)[1]))
    taken = (named | popped | unused) - {"pretrained_model_name_or_path", "config", "output_loading_info"}
    assert len(taken) > 40 and taken <= LOADING_KWARGS


def test_a_converted_copy_needs_no_gguf_file_unless_one_is_asked_for(base_folder, tmp_path):
    _, artifact = artifact_over(base_folder, tmp_path / "artifact", base_gguf_file="tiny.gguf")
    AneeForCausalLM.from_pretrained(artifact)
    with pytest.raises(OSError, match=r"other\.gguf"):
        AneeForCausalLM.from_pretrained(artifact, gguf_file="other.gguf")


def test_a_base_of_a_gguf_file_is_remembered(base_folder):
    """Also when the model was loaded by the caller; in the folder is nothing else that could be loaded."""
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    base.config.quantization_config = GgufConfig(gguf_file="tiny.gguf")
    config = AneeForCausalLM.from_base(base).config
    assert config.base_gguf_file == "tiny.gguf" and config.base_model_name_or_path == str(base_folder)


@pytest.mark.parametrize("name", ["./base", "../base"])
def test_a_base_relative_to_an_artifact_in_a_subfolder(name, base_folder, tmp_path, monkeypatch):
    repository, home = tmp_path / "repository", tmp_path / "home"
    model, artifact = artifact_over(base_folder, repository / "small", base_model_name_or_path=name)
    shutil.copytree(base_folder, artifact / name)
    expected = model(token_ids()).logits
    for load in (AneeForCausalLM, AutoModelForCausalLM):
        loaded = load.from_pretrained(repository, subfolder="small")
        torch.testing.assert_close(loaded(token_ids()).logits, expected)
    lay_out(home / "hub", "someone/artifact", repository)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = AutoModelForCausalLM.from_pretrained("someone/artifact", subfolder="small", cache_dir=home / "hub")
    torch.testing.assert_close(loaded(token_ids()).logits, expected)


def test_where_a_relative_base_is(tmp_path):
    assert find_base("./base", tmp_path, "small") == (str(tmp_path / "small" / "base"), None)
    assert find_base("./base", "org/name") == ("org/name", "base")
    assert find_base("./base", "org/name", "small") == ("org/name", "small/base")
    assert find_base("../base", "org/name", "small/one") == ("org/name", "small/base")
    assert find_base("..", "org/name", "small") == ("org/name", "")
    with pytest.raises(ValueError, match="'../base' is not allowed: it leaves the repository 'org/name'"):
        find_base("../base", "org/name")
    with pytest.raises(ValueError, match="there is no artifact"):
        find_base("./base")


def test_truncated_weights_are_refused(base_folder, tmp_path):
    _, artifact = artifact_over(base_folder, tmp_path / "artifact")
    weights = artifact / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(OSError, match="truncated or not safetensors"):
        AneeForCausalLM.from_pretrained(artifact)
    weights.unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        AneeForCausalLM.from_pretrained(artifact)


def test_foreign_weights_are_refused(base_folder, tmp_path):
    _, artifact = artifact_over(base_folder, tmp_path / "artifact")
    weights = artifact / "model.safetensors"
    tensors = load_file(weights)
    for wrong in (
        {"some.weight": torch.zeros(3)},
        {name: value for name, value in tensors.items() if "policies.0.0" not in name},
        {name: value for name, value in tensors.items() if "bridges.skip.1.up" not in name},
        {**tensors, "controller.extra": torch.zeros(1)},
        {**tensors, "controller.policies.0.0.weight": torch.zeros(3, 3)},
        {**tensors, "bridges.exit.0.down.weight": torch.zeros(3, 3)},
    ):
        save_file(wrong, weights, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="don't belong to a 'learned' controller"):
            AneeForCausalLM.from_pretrained(artifact)


@pytest.mark.parametrize("trained", ["learned", "routed"])
def test_an_artifact_can_be_run_by_its_plans(base_folder, tmp_path, trained, said):
    """A kind without weights leaves those of the trained controller alone; its bridges are the artifact's."""
    model, artifact = artifact_over(base_folder, tmp_path / "artifact", trained, **BRIDGES)
    by_plan = AutoModelForCausalLM.from_pretrained(artifact, controller="plan")
    expected = wrap(model.base, "plan", **BRIDGES)
    expected.bridges.load_state_dict(model.bridges.state_dict())
    ids = token_ids()
    torch.testing.assert_close(by_plan(ids, energy_budget=0.6).logits, expected(ids, energy_budget=0.6).logits)
    assert not [message for message in said if "controller." in message]


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("format_version", FORMAT_VERSION + 1, "newer than this code"),
        ("controller", "psychic", "controller='psychic'"),
        ("plans", ["PPXP"], "unknown action"),
        ("plans", ["PPSPP"], "4 names"),
    ],
)
def test_bad_config_files_are_refused(base_folder, tmp_path, field, value, message):
    _, artifact = artifact_over(base_folder, tmp_path / "artifact", "plan")
    config = json.loads((artifact / "config.json").read_text())
    (artifact / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(artifact)


def test_newer_format_is_refused_by_shipped_code_too(base_folder, tmp_path, forks):
    _, artifact = artifact_over(base_folder, tmp_path / "artifact")
    config = json.loads((artifact / "config.json").read_text())
    (artifact / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    done = forks.run(LOAD_AND_SCORE, artifact, tmp_path / "out.pt")
    assert done.returncode != 0 and "newer than this code" in done.stderr


def test_from_base_arguments():
    base = tiny_base()
    with pytest.raises(ValueError, match="gguf_file, revision, dtype, device_map"):
        AneeForCausalLM.from_base(base, dtype="bfloat16")
    with pytest.raises(ValueError, match="no_such_field"):
        AneeForCausalLM.from_base(base, no_such_field=1)
    with pytest.raises(ValueError, match="min_layers=9"):
        AneeForCausalLM.from_base(base, min_layers=9)


def test_unknown_family_is_refused_with_the_known_ones():
    from transformers import BloomConfig

    bloom = AutoModelForCausalLM.from_config(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64))
    with pytest.raises(ValueError, match="'bloom'.*cohere, falcon, .*starcoder2"):
        AneeForCausalLM.from_base(bloom)


def test_from_base_by_folder_remembers_the_base(base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = AneeForCausalLM.from_base("./base", controller="plan", dtype=torch.float32)
    model.save_pretrained("artifact")
    monkeypatch.chdir("/")
    loaded = AneeForCausalLM.from_pretrained(tmp_path / "artifact")
    torch.testing.assert_close(loaded(token_ids()).logits, model(token_ids()).logits)
