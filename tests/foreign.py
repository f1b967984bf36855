"""transformers' own tests of a model, taken from its source distribution, run on our class or on a plain one.

Leaves out which of them are excepted and why: that is `test_foreign.py`.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import unittest
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modeling_anee import AneeConfig, AneeForCausalLM

from .tiny import BRIDGES, CONFIGS, LAYERS, token_ids


PACKAGE = "transformers_tests"
# What the tests import, and the source distribution lacks: only its top level of `tests` is packed.
STAND_INS = {
    "__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
}
# Not about the model, but about how its tests are written.
ABOUT_TESTS = ("test_num_layers_is_small", "test_generation_tester_mixin_inheritance")

Subject = tuple[type, Callable[[], PreTrainedConfig]]  # a class, and how its configuration is made


@dataclass(frozen=True)
class ForeignTests:
    """Modules of transformers' tests."""

    modeling: ModuleType
    configuration: ModuleType


def unpack_tests(folder: Path) -> ForeignTests:
    """The tests of the installed transformers: unpacked into a folder, and imported."""
    package = folder / PACKAGE
    package.mkdir()
    with tarfile.open(download(folder)) as archive:
        for member in archive:
            parts = Path(member.name).parts
            content = archive.extractfile(member)
            if content is not None and len(parts) == 3 and parts[1] == "tests":
                (package / parts[2]).write_bytes(content.read())
    for path, text in STAND_INS.items():
        (package / path).parent.mkdir(exist_ok=True)
        (package / path).write_text(text)
    with mock.patch.object(sys, "path", [str(folder), *sys.path]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = (f"{PACKAGE}.test_{name}_common" for name in ("modeling", "configuration"))
        return ForeignTests(*map(importlib.import_module, names))


def download(folder: Path) -> Path:
    """The source distribution of the installed transformers, which has the tests that wheels lack."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), f"transformers=={transformers.__version__}"], check=True)
    return next(folder.glob("transformers-*.tar.gz"))


class SelfContained(AneeForCausalLM):
    """A wrapper that saves its base as well, so that whatever a test saves can be loaded."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        self.base.save_pretrained(os.path.join(save_directory, "base"))
        self.config.base_model_name_or_path = "./base"
        super().save_pretrained(save_directory, **kwargs)


SelfContained.__name__ = AneeForCausalLM.__name__  # the tests go by the name


def plain(family: str) -> Subject:
    """A family's own class."""
    return AutoModelForCausalLM._model_mapping[type(CONFIGS[family]())], CONFIGS[family]


def wrapped(family: str, **fields: Any) -> Subject:
    """Our class over a random base of a family."""
    return SelfContained, lambda: AneeConfig(text_config=CONFIGS[family]().to_dict(), **BRIDGES, **fields)


class Tester:
    """What transformers' tests ask for: a configuration and inputs, and their sizes."""

    batch_size, seq_length, is_training = 3, 7, True
    num_hidden_layers = LAYERS
    hidden_size, num_attention_heads = 32, 4

    def __init__(self, make_config: Callable[[], PreTrainedConfig]) -> None:
        self.get_config = make_config

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        """A new configuration, and inputs of a forward."""
        ids = token_ids(self.batch_size, self.seq_length)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def model_test(tests: ForeignTests, subject: Subject, without_attentions: tuple[str, ...]) -> type[unittest.TestCase]:
    """The tests of a model as transformers declares them; those named do without attention weights."""
    model_class, make_config = subject

    class ModelTest(tests.modeling.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (model_class,)

        def setUp(self) -> None:
            self.model_tester = Tester(make_config)
            self.has_attentions = self._testMethodName not in without_attentions

    for name in ABOUT_TESTS:
        setattr(ModelTest, name, None)
    return ModelTest


def config_test(tests: ForeignTests, **fields: Any) -> type[unittest.TestCase]:
    """The tests of a configuration as transformers declares them."""

    class ConfigTest(unittest.TestCase):
        def setUp(self) -> None:
            self.model_tester = Tester(wrapped("llama")[1])

        def test_config(self) -> None:
            names = ["hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings"]
            tests.configuration.ConfigTester(self, AneeConfig, common_properties=names, **fields).run_common_tests()

    return ConfigTest


def run(case: type[unittest.TestCase]) -> tuple[int, dict[str, str]]:
    """Run a case: how many tests ran and were not skipped, and for each that failed its name and traceback."""
    result = unittest.TestResult()
    names = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "anee": AneeForCausalLM.__name__}  # so that losses are tested
    with warnings.catch_warnings(record=True), mock.patch.dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, names):
        warnings.simplefilter("default")  # theirs, and some are tested for
        unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    failures: dict[str, str] = {}
    for test, trace in (*result.failures, *result.errors):
        name = getattr(test, "test_case", test)._testMethodName  # subtests know the test that they are of
        failures[name] = failures.get(name, "") + trace
    return result.testsRun - len(result.skipped), failures
