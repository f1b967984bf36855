"""What can be done with one token at one decoder layer.

Adding an action takes one member here, one column in `costs.py` and one branch in `execution.py`.
"""

from enum import IntEnum


class Action(IntEnum):
    """Action of one token at one decoder layer; the value is what an `ExecutionTrace` stores (uint8).

    - `PROCESS`: attention and feed-forward run.
    - `SKIP`: only the layer's keys and values are written; the hidden state passes on, over a bridge if there is one.
    - `EXIT`: write the keys and values of this and every deeper layer, then leave through this layer's exit translator,
      if there is one, the final norm and the head.
    - `SKIP_FFN`: attention runs; the feed-forward is left out, with a bridge in its place if there is one.
    """

    PROCESS = 0
    SKIP = 1
    EXIT = 2
    SKIP_FFN = 3

    @property
    def letter(self) -> str:
        """One upper-case letter, as written in `AneeConfig.plans`; F is for the feed-forward that is left out."""
        return "F" if self is Action.SKIP_FFN else self.name[0]


ACTION_OF_LETTER = {action.letter: action for action in Action}


def parse_plan(letters: str) -> list[Action]:
    """Turn a plan such as `"PPSSP"` (one letter per layer) into actions.

    Raises:
        ValueError: on an unknown letter, or when a layer after an EXIT is not EXIT too.
    """
    unknown = sorted(set(letters) - set(ACTION_OF_LETTER))
    if unknown:
        allowed = ", ".join(f"{letter} ({action.name})" for letter, action in ACTION_OF_LETTER.items())
        raise ValueError(f"plan {letters!r} has unknown actions {unknown}; allowed: {allowed}")
    actions = [ACTION_OF_LETTER[letter] for letter in letters]
    exits = [action is Action.EXIT for action in actions]
    if exits != sorted(exits):
        raise ValueError(f"plan {letters!r} goes on after EXIT; every layer after the first E must be E")
    return actions
