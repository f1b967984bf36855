"""What an artifact says of its drafts."""

import pytest

from modeling_anee import AneeConfig, AneeForCausalLM

from .tiny import tiny_base, token_ids, wrap


GOOD = {"plans": ["4*INT8 / int8", "4*INT4 / int8"], "drafted": [[10] * 8, [9] * 8], "kept": [[9] * 8, [8] * 8]}


def test_it_is_saved_and_loaded_and_chosen_from(tmp_path):
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    model = wrap(base, drafts=GOOD, precisions=["int8", "int4"], base_model_name_or_path=str(tmp_path / "base"))
    model.save_pretrained(tmp_path / "artifact")
    loaded = AneeForCausalLM.from_pretrained(tmp_path / "artifact")
    assert loaded.config.drafts == GOOD
    output = loaded.generate(token_ids(1), lossless=True, return_dict_in_generate=True, max_new_tokens=8, eos_token_id=None)
    assert output.execution.lossless.plan in GOOD["plans"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "must be a dict of lists"),
        ({"plans": []}, "must be a dict of lists"),
        ({**GOOD, "kept": GOOD["kept"][:1]}, "lists of equal length"),
        ({**GOOD, "plans": ["3*INT8", "4*INT4"]}, "has 3 layers"),
        ({**GOOD, "plans": ["4*INT8 / int2", "4*INT4"]}, "has the head 'int2'"),
        ({**GOOD, "plans": ["3*INT8, EXIT", "4*INT4"]}, "leaves the stack early"),
        ({**GOOD, "kept": [[11] * 8, [8] * 8]}, "no more may be kept than were drafted"),
        ({**GOOD, "drafted": [[10] * 7, [9] * 8]}, "lists of 8 numbers"),
    ],
)
def test_what_is_no_measurement_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        AneeConfig(text_config=tiny_base().config.to_dict(), precisions=["int8", "int4"], drafts=wrong)
