"""What can be done with one token at one decoder layer: rows of a table.

An action says which variant its attention and its feed-forward run in, and whether the token leaves here. Nothing switches
on an action's name: whoever wants to know what one does reads its row. To add one, add a row to the configuration's
`actions`; to add a way to run a sublayer, register a variant (`base_variants.py`).
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .action_looks import COLOURS, LETTERS, OF_PRECISIONS, SYMBOLS, Looks, brightness, first_free, paler
from .narrow import NARROW, whole_of


FULL, NONE = "full", "none"  # the base's own weights; left out


@dataclass(frozen=True)
class Action:
    """One row of the table.

    Args:
        name: as it stands in plans and traces.
        attention: variant that the attention runs in; `"none"`: left out.
        feed_forward: the same of the feed-forward.
        leaves: the token leaves before this layer, through its exit translator, the final norm and the head.
        keys_values: variant that keys and values run in, which are due in any case; default: that of the attention, full
            where it is left out.
        letter: one character, for plans that spell a layer with each.
        symbol: one character, for a terminal.
        colour: of pictures, `#rrggbb`.
        ink: of a letter on that colour.
        meaning: what happens, in a few words.
    """

    name: str
    attention: str
    feed_forward: str
    leaves: bool = False
    keys_values: str = ""
    letter: str = ""
    symbol: str = ""
    colour: str = ""
    ink: str = "#ffffff"
    meaning: str = ""

    @property
    def runs(self) -> bool:
        """Whether anything of the layer runs for the token."""
        return self.attention != NONE or self.feed_forward != NONE

    @property
    def variants(self) -> set[str]:
        """Names of the variants that it asks for, `"none"` left out."""
        return {self.attention, self.feed_forward, self.keys_values} - {NONE}

    @property
    def runs_both(self) -> bool:
        """Whether attention and feed-forward run, in whatever variant."""
        return self.attention != NONE and self.feed_forward != NONE

    @property
    def is_whole(self) -> bool:
        """The same with all of their heads and neurons."""
        return self.runs_both and self.variants.isdisjoint(NARROW)


DEFAULT_ROWS = (
    Action("PROCESS", FULL, FULL, False, FULL, "P", "█", "#2a6f97", "#ffffff", "attention and feed-forward ran"),
    Action("SKIP", NONE, NONE, False, FULL, "S", "·", "#f2cc8f", "#33270f", "the layer was skipped"),
    Action("EXIT", NONE, NONE, True, FULL, "E", " ", "#e5e5e5", "#555555", "the token had left already"),
    Action("SKIP_FFN", FULL, NONE, False, FULL, "F", "▄", "#8ab6d6", "#0e2a3d", "only the attention ran"),
)
_COLOURS_OF = {FULL: DEFAULT_ROWS[0].colour} | {name.lower(): OF_PRECISIONS[name].colour for name in ("INT8", "INT4")}
PROCESS, SKIP, EXIT, SKIP_FFN = range(len(DEFAULT_ROWS))  # their places, which traces store


def precision_rows(precisions: Sequence[str]) -> list[Action]:
    """Rows that run a layer, or a part of it, in cheaper variants, dearest first.

    What is left out has its keys and values in the variant too.
    """
    rows = []
    for variant in precisions:
        name = variant.upper()
        rows += [
            Action(name, variant, variant),
            Action(f"{name}_SKIP_FFN", variant, NONE),
            Action(f"SKIP_{name}", NONE, NONE, keys_values=variant),
            Action(f"EXIT_{name}", NONE, NONE, True, variant),
        ]
    for dear, cheap in pairwise(precisions):
        rows += [Action(f"{dear}_{cheap}".upper(), dear, cheap), Action(f"{cheap}_{dear}".upper(), cheap, dear)]
    return [replace(row, **OF_PRECISIONS.get(row.name, Looks())._asdict()) for row in rows]


def narrow_rows(narrow: Sequence[str]) -> list[Action]:
    """Rows that run a layer, or its feed-forward or attention alone, in narrow variants; the paler the less is run."""
    rows = []
    for variant in narrow:
        name, (whole, parts) = variant.upper(), NARROW[variant]
        colour, left_out = _COLOURS_OF[whole], 1.0 - 1.0 / parts
        rows += [
            Action(name, variant, variant, colour=paler(colour, left_out), ink="#222222"),
            Action(f"{name}_FFN", whole, variant, colour=paler(colour, 0.7 * left_out), ink="#222222"),
            Action(f"{name}_ATTENTION", variant, whole, colour=paler(colour, 0.3 * left_out), ink="#222222"),
        ]
    return rows


class ActionTable(Sequence[Action]):
    """The actions that a model knows; an action's place in it is what traces and plans of numbers store (uint8).

    The first row runs everything in full. Rows that leave come after no other way to leave.

    Raises:
        ValueError: rows that are not such a table; the message names the row and what is allowed.
    """

    def __init__(self, rows: Iterable[Action] = DEFAULT_ROWS) -> None:
        self.rows = tuple(_with_looks(list(rows)))
        _check(self.rows)
        self.names = [row.name for row in self.rows]
        self._place = {row.name: place for place, row in enumerate(self.rows)}

    def __getitem__(self, place: Any) -> Any:
        """The row at a place."""
        return self.rows[place]

    def __len__(self) -> int:
        """Number of actions."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Action]:
        """The rows in their order."""
        return iter(self.rows)

    def __eq__(self, other: object) -> bool:
        """Whether both have the same rows."""
        return isinstance(other, ActionTable) and self.rows == other.rows

    def __hash__(self) -> int:
        """Of the rows."""
        return hash(self.rows)

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]] | None) -> "ActionTable":
        """A table from what a configuration stores; None for the default.

        Raises:
            ValueError: not a list of rows; the message names the row and the field.
        """
        if rows is None:
            return DEFAULT_TABLE
        if not isinstance(rows, list | tuple) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"actions={rows!r} is not allowed: it must be a list of dicts with {', '.join(_NEEDED)}")
        for row in rows:
            unknown, missing = sorted(set(row) - set(_FIELDS)), [name for name in _NEEDED if name not in row]
            if unknown or missing:
                problem = f"no {missing[0]!r}" if missing else f"the unknown field {unknown[0]!r}"
                raise ValueError(f"actions has {row!r}, which has {problem}; the fields are {', '.join(_FIELDS)}")
        return cls(Action(**row) for row in rows)

    def stored(self) -> list[dict[str, Any]]:
        """The rows, as a configuration stores them."""
        return [asdict(row) for row in self.rows]

    def place(self, name: str) -> int:
        """Where an action stands.

        Raises:
            ValueError: an unknown name.
        """
        if name not in self._place:
            raise ValueError(f"action {name!r} is not allowed: it must be one of {', '.join(self.names)}")
        return self._place[name]

    def find(self, attention: str, feed_forward: str, leaves: bool = False) -> int | None:
        """The place of the first action of such a kind, None where there is none."""
        wanted = (attention, feed_forward, leaves)
        return next((i for i, row in enumerate(self.rows) if (row.attention, row.feed_forward, row.leaves) == wanted), None)

    def place_of(self, attention: str, feed_forward: str) -> int:
        """The same; such an action is needed.

        Raises:
            ValueError: there is none.
        """
        return self._needed(
            self.find(attention, feed_forward), f"runs attention in {attention}, feed-forward in {feed_forward}"
        )

    @property
    def skip(self) -> int:
        """The place of the action that leaves a whole layer out.

        Raises:
            ValueError: there is none.
        """
        return self._needed(self.find(NONE, NONE), "leaves a whole layer out")

    def skip_with(self, keys_values: str) -> int:
        """The place of the action that leaves a whole layer out, but for keys and values in a variant.

        Raises:
            ValueError: there is none.
        """
        return self._needed(
            self._left_out(keys_values, False), f"leaves a whole layer out, but for {keys_values} keys and values"
        )

    def exit_with(self, keys_values: str) -> int:
        """The place of the action that leaves the stack with keys and values in a variant.

        Raises:
            ValueError: there is none.
        """
        return self._needed(self._left_out(keys_values, True), f"leaves the stack with {keys_values} keys and values")

    def _left_out(self, keys_values: str, leaves: bool) -> int | None:
        rows = enumerate(self.rows)
        wanted = (leaves, keys_values)
        return next((i for i, row in rows if not row.runs and (row.leaves, row.keys_values) == wanted), None)

    @property
    def exit(self) -> int:
        """The place of the action that leaves the stack.

        Raises:
            ValueError: there is none.
        """
        return self._needed(self.find(NONE, NONE, leaves=True), "leaves the stack")

    @staticmethod
    def _needed(place: int | None, what: str) -> int:
        if place is None:
            raise ValueError(f"actions has no row that {what}, which this controller needs")
        return place

    @property
    def variants(self) -> set[str]:
        """Names of all variants that the actions ask for, `"none"` left out."""
        return set().union(*(row.variants for row in self.rows))

    @property
    def heads(self) -> list[str]:
        """Variants that the head may run in, by the place that traces store: the full one first."""
        return [FULL, *sorted({whole_of(variant) for variant in self.variants} - {FULL})]

    def with_precisions(self, precisions: Sequence[str], narrow: Sequence[str] = ()) -> "ActionTable":
        """The table with rows for such variants; it keeps its own of the same names, and their letters."""
        letters = {row.letter for row in self.rows}
        new = [row for row in (*precision_rows(precisions), *narrow_rows(narrow)) if row.name not in self._place]
        return ActionTable([*self.rows, *(replace(row, letter="") if row.letter in letters else row for row in new)])

    def darkest_first(self, actions: Tensor) -> list[int]:
        """The places that occur among actions [...], for stacks and legends: by colour, so the dearest come first."""
        return sorted(actions.unique().tolist(), key=lambda place: (brightness(self.rows[place].colour), place))

    @cached_property
    def leaving(self) -> Tensor:
        """Which actions leave, bool [actions], on the CPU."""
        return self.where([row.leaves for row in self.rows])

    @cached_property
    def running(self) -> Tensor:
        """Which actions run anything of the layer, bool [actions], on the CPU."""
        return self.where([row.runs for row in self.rows])

    @cached_property
    def complete(self) -> Tensor:
        """Which actions leave nothing out, bool [actions], on the CPU."""
        return self.where([row.is_whole for row in self.rows])

    @cached_property
    def gaps(self) -> Tensor:
        """Which actions leave out what a bridge may stand for, bool [actions], on the CPU."""
        return self.where([not (row.runs_both or row.leaves) for row in self.rows])

    def needing(self, variants: Collection[str]) -> Tensor:
        """Which actions run anything in one of these variants, bool [actions], on the CPU."""
        return self.where([not row.variants.isdisjoint(variants) for row in self.rows])

    @cached_property
    def whole(self) -> Tensor:
        """For each action the one that leaves nothing out, uint8 [actions], on the CPU.

        What was left out runs in the variant of the keys and values; PROCESS where no row does that.
        """
        return torch.tensor([self._whole(row) for row in self.rows], dtype=torch.uint8, device="cpu")

    def _whole(self, row: Action) -> int:
        own = (row.keys_values if variant == NONE else variant for variant in (row.attention, row.feed_forward))
        attention, feed_forward = map(whole_of, own)
        return self.find(attention, feed_forward) or PROCESS

    @staticmethod
    def where(answers: list[bool]) -> Tensor:
        """One answer for each action, bool [actions], on the CPU; `answers[actions.long()]` tells it for many at once."""
        return torch.tensor(answers, dtype=torch.bool, device="cpu")

    def plan(self, plan: str | Sequence[str | int], layers: int) -> list[int]:
        """One plan as places, one a layer.

        Args:
            plan: names, one a layer; or in short `"2*PROCESS, SKIP, PROCESS"`; or one letter a layer, `"PPSP"`; or places. A
                string may end with the variant of the head, `"3*INT8 / int8"`, see `head_of`.
            layers: how many it must be.

        Raises:
            ValueError: unknown names, another number of layers, or a layer after one that leaves that does not.
        """
        names = self._spelled(plan.partition("/")[0].strip(), layers) if isinstance(plan, str) else list(plan)
        actions = [self._known(name, plan) for name in names]
        if len(actions) != layers:
            raise ValueError(f"plan {plan!r} has {len(actions)} layers, which is not allowed: it must have {layers}")
        leaves = [self.rows[action].leaves for action in actions]
        if leaves != sorted(leaves):
            raise ValueError(f"plan {plan!r} goes on after a layer where tokens leave; every layer after it must leave too")
        return actions

    def head_of(self, plan: str | Sequence[str | int]) -> int:
        """The place, in `heads`, of the variant that the head of a plan runs in: full where it names none.

        Raises:
            ValueError: a variant that no action runs in.
        """
        name = plan.partition("/")[2].strip() if isinstance(plan, str) else ""
        if (name or FULL) not in self.heads:
            raise ValueError(f"plan {plan!r} has the head {name!r}, which is not allowed: it must be one of {self.heads}")
        return self.heads.index(name or FULL)

    def text(self, plan: Sequence[int], head: int = 0) -> str:
        """A plan of places, and that of its head, in short: `"2*PROCESS, SKIP, PROCESS"`."""
        parts: list[list[int]] = []
        for action in plan:
            if parts and parts[-1][0] == action:
                parts[-1][1] += 1
            else:
                parts.append([int(action), 1])
        layers = ", ".join(f"{count}*{self.names[action]}" if count > 1 else self.names[action] for action, count in parts)
        return f"{layers} / {self.heads[head]}" if head else layers

    def _known(self, name: str | int, plan: Any) -> int:
        if isinstance(name, int) and not isinstance(name, bool) and 0 <= name < len(self.rows):
            return name
        if name not in self._place:
            allowed = ", ".join(f"{row.letter} ({row.name})" for row in self.rows)
            raise ValueError(f"plan {plan!r} has the unknown action {name!r}; allowed: {allowed}")
        return self._place[str(name)]

    def _spelled(self, plan: str, layers: int) -> list[str]:
        """Names of a plan that is one string."""
        letters = {row.letter: row.name for row in self.rows}
        if len(plan) == layers and plan not in self._place and not re.search(r"[*,\s]", plan):
            return [letters.get(letter, letter) for letter in plan]
        names: list[str] = []
        for part in plan.split(","):
            match = re.fullmatch(r"\s*(?:(\d+)\s*\*)?\s*(\S+)\s*", part)
            if match is None:
                raise ValueError(f"plan {plan!r} has {part!r}, which is not allowed: write for example '2*PROCESS, SKIP'")
            names += [match[2]] * int(match[1] or 1)
        return names


_FIELDS = tuple(Action.__dataclass_fields__)
_NEEDED = ("name", "attention", "feed_forward")


def _with_looks(rows: list[Action]) -> list[Action]:
    """Rows with a letter, a symbol and a colour each: their own, or the first that nobody has."""
    letters, symbols, colours = ({getattr(row, name) for row in rows} for name in ("letter", "symbol", "colour"))
    done = []
    for row in rows:
        own = {
            "letter": row.letter or first_free([row.name[0].upper(), *LETTERS], letters),
            "symbol": row.symbol or first_free(SYMBOLS, symbols),
            "colour": row.colour or first_free(COLOURS, colours),
            "meaning": row.meaning or _meaning(row),
            "keys_values": row.keys_values or (FULL if row.attention == NONE else row.attention),
        }
        for taken, name in ((letters, "letter"), (symbols, "symbol"), (colours, "colour")):
            taken.add(own[name])
        done.append(Action(**(asdict(row) | own)))
    return done


def _meaning(row: Action) -> str:
    """What a row does, in a few words."""
    attention, feed_forward = row.attention, row.feed_forward
    if row.runs_both:
        apart = f"attention ran as {attention}, feed-forward as {feed_forward}"
        return f"attention and feed-forward ran as {attention}" if attention == feed_forward else apart
    if row.runs:
        return (
            f"only the feed-forward ran, as {feed_forward}" if attention == NONE else f"only the attention ran, as {attention}"
        )
    what = "the token had left already" if row.leaves else "the layer was skipped"
    return f"{what}, its keys and values are {row.keys_values}"


def _check(rows: tuple[Action, ...]) -> None:
    if not rows or len(rows) > 255:
        raise ValueError(f"actions of {len(rows)} rows are not allowed: there must be 1 to 255")
    first = rows[0]
    if (first.attention, first.feed_forward, first.leaves) != (FULL, FULL, False):
        raise ValueError(f"actions begins with {first.name!r}, which is not allowed: the first row runs everything in full")
    for name in ("name", "letter"):
        values = [getattr(row, name) for row in rows]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ValueError(f"actions has two rows with {name}={twice!r}, which is not allowed: each must have its own")
    for row in rows:
        if row.leaves and row.runs:
            raise ValueError(f"action {row.name!r} runs a sublayer where the token has left, which is not allowed")
        if row.keys_values == NONE or row.attention not in (NONE, row.keys_values):
            raise ValueError(
                f"action {row.name!r} has keys_values={row.keys_values!r}, which is not allowed: it must be the variant of the "
                "attention, or any where that is left out"
            )
        if len(row.letter) != 1 or len(row.symbol) != 1:
            raise ValueError(f"action {row.name!r} is not allowed: letter and symbol must be one character each")


DEFAULT_TABLE = ActionTable()
