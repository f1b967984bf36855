"""The table of actions, and the plans that are written with its names, in short or letter by letter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_anee.actions import DEFAULT_TABLE, EXIT, FULL, NONE, PROCESS, SKIP, SKIP_FFN, Action, ActionTable


relaxed = settings(deadline=None, derandomize=True)
CHEAP = {"name": "CHEAP", "attention": "half", "feed_forward": "half"}


@st.composite
def plans(draw) -> list[int]:
    body = draw(st.lists(st.sampled_from([PROCESS, SKIP, SKIP_FFN]), max_size=12))
    return body + [EXIT] * draw(st.integers(0, 6))


def table_of(count: int) -> ActionTable:
    """The default rows and some that say nothing of their looks."""
    return ActionTable.of([*DEFAULT_TABLE.stored(), *({**CHEAP, "name": f"CHEAP{n}"} for n in range(count))])


def test_places_are_columns_and_fit_a_trace():
    assert DEFAULT_TABLE.names == ["PROCESS", "SKIP", "EXIT", "SKIP_FFN"]
    assert [DEFAULT_TABLE.place(name) for name in DEFAULT_TABLE.names] == [PROCESS, SKIP, EXIT, SKIP_FFN]
    assert torch.tensor(range(255), dtype=torch.uint8).tolist() == list(range(255))


@given(st.integers(0, 12))
@relaxed
def test_rows_get_looks_of_their_own(count):
    table = table_of(count)
    letters = [row.letter for row in table]
    assert len(set(letters)) == len(table) and all(len(row.symbol) == 1 for row in table)
    assert all(row.colour.startswith("#") and row.meaning for row in table)
    assert ActionTable.of(table.stored()) == table


def test_rows_of_precisions_have_looks_that_read_as_an_order():
    table = DEFAULT_TABLE.with_precisions(["int8", "int4"])
    for name in ("letter", "symbol", "colour"):
        looks = [getattr(row, name) for row in table]
        assert len(set(looks)) == len(table), looks
    meanings = {
        "INT8": "attention and feed-forward ran as int8",
        "INT8_INT4": "attention ran as int8, feed-forward as int4",
        "INT4_SKIP_FFN": "only the attention ran, as int4",
        "SKIP_INT4": "the layer was skipped, its keys and values are int4",
    }
    assert all(table[table.place(name)].meaning == meaning for name, meaning in meanings.items())
    assert table.plan("P8654", 5) == [table.place(name) for name in ("PROCESS", "INT8", "INT4_INT8", "INT8_INT4", "INT4")]
    dearest_first = (
        "PROCESS INT8 INT4_INT8 INT8_INT4 INT4 SKIP_INT4",
        "PROCESS SKIP_FFN INT8_SKIP_FFN INT4_SKIP_FFN",
        "SKIP SKIP_INT8 SKIP_INT4",
        "INT4 INT4_SKIP_FFN SKIP_INT4",
        "EXIT EXIT_INT8 EXIT_INT4",
    )
    for names in dearest_first:
        places = [table.place(name) for name in names.split()]
        assert table.darkest_first(torch.tensor(places[::-1] * 2)) == places


def test_a_letter_that_a_table_has_is_not_given_away_by_precisions():
    table = ActionTable.of([*DEFAULT_TABLE.stored(), {**CHEAP, "letter": "8"}]).with_precisions(["int8"])
    assert table[table.place("CHEAP")].letter == "8" != table[table.place("INT8")].letter
    own = DEFAULT_TABLE.with_precisions(["int8"])
    assert own.with_precisions(["int8", "int4"])[: len(own)] == own.rows


def test_what_an_action_does_is_read_from_its_row():
    table = table_of(1)
    assert table.variants == {FULL, "half"}
    assert [row.runs for row in table] == table.running.tolist() == [True, False, False, True, True]
    assert [row.is_whole for row in table] == [True, False, False, False, True]
    assert table.leaving.tolist() == [False, False, True, False, False]
    assert table.find("half", "half") == 4 and table.find("half", NONE) is None
    assert (table.skip, table.exit) == (SKIP, EXIT)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "0 rows"),
        ([{"name": "A", "attention": "none", "feed_forward": "full"}], "begins with 'A'"),
        ([{"name": "A", "attention": "full"}], "no 'feed_forward'"),
        ([{"name": "A", "attention": "full", "feed_forward": "full", "cost": 1}], "unknown field 'cost'"),
        ([*DEFAULT_TABLE.stored(), DEFAULT_TABLE.stored()[1]], "two rows with name='SKIP'"),
        ([*DEFAULT_TABLE.stored(), {**CHEAP, "letter": "S"}], "two rows with letter='S'"),
        ([*DEFAULT_TABLE.stored(), {**CHEAP, "leaves": True}], "'CHEAP' runs a sublayer where the token has left"),
        ("PROCESS", "must be a list of dicts"),
    ],
)
def test_rows_that_are_no_table_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        ActionTable.of(rows)


@pytest.mark.parametrize("name", ["skip", "exit"])
def test_a_kind_that_is_needed_and_not_there_is_an_error(name):
    with pytest.raises(ValueError, match="actions has no row"):
        getattr(ActionTable([Action("ALL", FULL, FULL)]), name)


@given(plans())
@relaxed
def test_every_plan_survives_being_written(plan):
    if plan:
        assert DEFAULT_TABLE.plan(DEFAULT_TABLE.text(plan), len(plan)) == plan
    assert DEFAULT_TABLE.plan([DEFAULT_TABLE.names[action] for action in plan], len(plan)) == plan
    assert DEFAULT_TABLE.plan(plan, len(plan)) == plan
    if len(plan) > 1:
        assert DEFAULT_TABLE.plan("".join(DEFAULT_TABLE[action].letter for action in plan), len(plan)) == plan


def test_plans_in_short():
    assert DEFAULT_TABLE.text([PROCESS, PROCESS, SKIP, PROCESS]) == "2*PROCESS, SKIP, PROCESS"
    assert DEFAULT_TABLE.plan(" 2 * PROCESS,SKIP ,PROCESS", 4) == [PROCESS, PROCESS, SKIP, PROCESS]


@given(st.text(alphabet="PSE", min_size=2, max_size=10))
@relaxed
def test_a_plan_may_not_go_on_after_leaving(letters):
    if set(letters[letters.find("E") :] if "E" in letters else "") <= {"E"}:
        assert len(DEFAULT_TABLE.plan(letters, len(letters))) == len(letters)
    else:
        with pytest.raises(ValueError, match=f"plan '{letters}' goes on after a layer where tokens leave"):
            DEFAULT_TABLE.plan(letters, len(letters))


@pytest.mark.parametrize("plan, layers", [("pp", 2), ("PXP", 3), ("PS1", 3), ("2*NOTHING", 2), (["PROCESS", "X"], 2), ([9], 1)])
def test_unknown_actions_are_refused_with_the_known_ones(plan, layers):
    with pytest.raises(ValueError, match="unknown action") as caught:
        DEFAULT_TABLE.plan(plan, layers)
    assert all(f"{action.letter} ({action.name})" in str(caught.value) for action in DEFAULT_TABLE)


@pytest.mark.parametrize("plan, layers", [("PP", 3), ("2*PROCESS, SKIP", 4), (["SKIP"], 2)])
def test_a_plan_of_another_length_is_refused(plan, layers):
    with pytest.raises(ValueError, match=f"must have {layers}|unknown action"):
        DEFAULT_TABLE.plan(plan, layers)


def test_every_action_has_one_that_leaves_nothing_out():
    table = ActionTable().with_precisions(["int8", "int4"])
    whole = {table.names[place]: table.names[to] for place, to in enumerate(table.whole.tolist())}
    assert {whole[name] for name in ("PROCESS", "SKIP", "SKIP_FFN", "EXIT")} == {"PROCESS"}
    assert whole["SKIP_INT4"] == whole["INT4_SKIP_FFN"] == whole["EXIT_INT4"] == whole["INT4"] == "INT4"
    assert all(table[table.place(name)].is_whole for name in whole.values())
    assert all(whole[action.name] == action.name for action in table if action.is_whole)
