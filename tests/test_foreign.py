"""transformers' own tests of a model, run on our class: what any model of transformers does, ours does, with few exceptions."""

import pytest

from .foreign import config_test, model_test, plain, run, unpack_tests, wrapped
from .tiny import CONTROLLERS


pytestmark = pytest.mark.slow

FAMILIES = ("falcon", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "opt")
# Every test that fails, with what it fails on: errors that are meant. A test that passes has to leave the list.
NO_ATTENTIONS = "output_attentions=True is not supported: skipped layers compute no attention"
FROZEN = "resize_token_embeddings is not possible: the base is frozen and not saved"
NO_ARTIFACT = "not an artifact: wrap it with AneeForCausalLM.from_base"
NO_FOLDER = "pretrained_model_name_or_path=None is not allowed"
OWN_WEIGHTS = "controller of this base: missing keys"
ALWAYS_SDPA = 'config._attn_implementation == "sdpa"'  # the base has none
EXCEPTIONS = {
    "test_attention_outputs": NO_ATTENTIONS,
    "test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions": NO_ATTENTIONS,
    "test_retain_grad_hidden_states_attentions": NO_ATTENTIONS,
    "test_resize_embeddings_untied": FROZEN,
    "test_resize_embeddings_untied_no_reinit_on_post_init": FROZEN,
    "test_resize_tokens_embeddings": FROZEN,
    "test_correct_missing_keys": NO_ARTIFACT,
    "test_model_weights_reload_no_missing_tied_weights": OWN_WEIGHTS,
    "test_from_pretrained_no_checkpoint": NO_FOLDER,
}
CAPTURED = {"test_capture_outputs_decorator": NO_ATTENTIONS}  # asked only where the base's code captures outputs
# Projections that share an input are views of one storage, where the base has not fused them itself: not tied, and saved apart.
JOINED = {"test_tied_weights_keys": "Lists differ: [['base.model"}
FAMILY_EXCEPTIONS = dict.fromkeys(FAMILIES, CAPTURED | JOINED) | {
    "falcon": {},
    "gemma2": {**CAPTURED, **JOINED, "test_sdpa_can_dispatch_non_composite_models": ALWAYS_SDPA},
    "gpt2": CAPTURED,
    "gpt_neox": CAPTURED,
}
WITHOUT_ATTENTIONS = ("test_model_outputs_equivalence",)  # what else it tests is tested
SKIPPING = {
    "budget": {"controller": "budget"},
    "confidence": {"controller": "confidence", "exit_layers": [1, 2], "confidence_threshold": 0.999},
    "learned": {"controller": "learned", "decision_interval": 1},
    "plan": {"controller": "plan"},
    "refine": {"controller": "refine", "calibration": {"budgets": [0.3, 0.9], "settings": [3.0, 0.5]}},
    "routed": {"controller": "routed", "calibration": {"budgets": [0.3, 0.9], "settings": [3.0, -1.0]}},
}


@pytest.fixture(scope="module")
def tests(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_INSIDE_SUB_PROCESS", "1")  # what they run in a process of its own, by the name of the test
        yield unpack_tests(tmp_path_factory.mktemp("transformers"))


def unexpected(tests, subject, expected):
    """How many tests ran, and what is wrong about them."""
    ran, failures = run(model_test(tests, subject, WITHOUT_ATTENTIONS))
    wrong = [
        f"{name} failed:\n{trace}" for name, trace in failures.items() if name not in expected or expected[name] not in trace
    ]
    wrong += [f"{name} is an exception, but passed" for name in expected if name not in failures]
    return ran, "\n\n".join(wrong)


def test_the_harness_finds_no_fault_in_plain_llama(tests):
    ran, wrong = unexpected(tests, plain("llama"), {})
    assert ran > 90 and not wrong, wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_budget_a_wrapper_is_a_model_of_transformers(tests, family):
    ran, wrong = unexpected(tests, wrapped(family), EXCEPTIONS | FAMILY_EXCEPTIONS[family])
    assert ran > 90 and not wrong, wrong


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_so_it_is_where_it_skips(tests, controller):
    ran, wrong = unexpected(
        tests, wrapped("llama", energy_budget=0.6, **SKIPPING[controller]), EXCEPTIONS | FAMILY_EXCEPTIONS["llama"]
    )
    assert ran > 90 and not wrong, wrong


def test_a_configuration_is_one_of_transformers(tests):
    _, failures = run(config_test(tests, energy_budget=0.6, controller="plan"))
    assert not failures, failures["test_config"]
