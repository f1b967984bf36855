"""Actions and the plans that are written with their letters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_anee.actions import ACTION_OF_LETTER, Action, parse_plan


@st.composite
def plans(draw) -> list[Action]:
    body = draw(st.lists(st.sampled_from([Action.PROCESS, Action.SKIP]), max_size=12))
    return body + [Action.EXIT] * draw(st.integers(0, 6))


def test_values_are_columns_and_fit_a_trace():
    assert [int(action) for action in Action] == list(range(len(Action)))
    assert torch.tensor(list(Action), dtype=torch.uint8).tolist() == list(Action)


def test_letters_are_different():
    assert len(ACTION_OF_LETTER) == len(Action)
    assert all(ACTION_OF_LETTER[action.letter] is action for action in Action)


@given(plans())
@settings(deadline=None, derandomize=True)
def test_every_plan_survives_being_written(plan):
    assert parse_plan("".join(action.letter for action in plan)) == plan


@given(st.text(alphabet="PSE", max_size=10))
@settings(deadline=None, derandomize=True)
def test_a_plan_may_not_go_on_after_exit(letters):
    if set(letters[letters.find("E") :] if "E" in letters else "") <= {"E"}:
        assert len(parse_plan(letters)) == len(letters)
    else:
        with pytest.raises(ValueError, match=f"plan '{letters}' goes on after EXIT"):
            parse_plan(letters)


@pytest.mark.parametrize("letters", ["p", "PXP", "P P", "PS1", "PSÉ"])
def test_unknown_letters_are_refused_with_the_known_ones(letters):
    with pytest.raises(ValueError, match="unknown actions") as caught:
        parse_plan(letters)
    assert repr(letters) in str(caught.value)
    assert all(f"{action.letter} ({action.name})" in str(caught.value) for action in Action)
