"""The recipe that was made for a base, as a file to read, copy and edit; its first line is the command that made it."""

from pathlib import Path
from typing import Any

import yaml

from ..data.files import is_part, write_file
from ..data.text import read_lines
from . import lock
from .default_recipe import Estimate, Made, Request, longest_of
from .default_stages import SHARES
from .shape import Shape
from .state import RECIPE


def is_there(request: Request, folder: Path) -> bool:
    """Whether a folder has the recipe of a request already.

    Raises:
        ValueError: it has something else.
    """
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if RECIPE not in found:
        if not all(name == lock.NAME or is_part(name) for name in found):
            raise ValueError(f"{folder} is not empty and holds no run of {request.command}: give another folder for the output")
        return False
    first = next(read_lines(folder / RECIPE)).removeprefix("# ")
    if first != request.command:
        raise ValueError(
            f"{folder} holds a run of another command ({first}), not of {request.command}: give another folder for the output, "
            f"or go on by anee fit {folder / RECIPE}"
        )
    return True


def write_recipe(request: Request, made: Made, folder: Path) -> Path:
    """Write a recipe with comments on what its numbers follow from."""
    lines = [
        f"# {request.command}",
        "# The same command goes on with this file. A copy of it is a recipe of yours to edit, for another folder:",
        f"#   anee fit COPY.yaml{'' if request.data is None else ' --data FOLDER'} --output FOLDER",
        *_comments(measured(made)),
    ]
    notes = notes_of(request, made)
    for name, value in made.recipe.items():
        lines += [*_comments(notes.get(name)), *_lines(name, value, notes)]
    write_file(folder / RECIPE, "\n".join(lines) + "\n")
    return folder / RECIPE


def measured(made: Made) -> str:
    """What was measured, in words."""
    speed = made.speed
    text = (
        f"Measured on this machine: {speed.prepare:.3g} s to make weights of 8 and 4 bits; for a window of {speed.length} "
        f"tokens {speed.forward:.3g} s a forward, {speed.cheap:.3g} s in 4 bits"
    )
    bridges = f", {speed.step:.3g} s a step of training; {speed.solve:.3g} s to solve for a bridge"
    return f"{text}{bridges if made.shape.bridged else ''}."


def notes_of(request: Request, made: Made) -> dict[str, str]:
    """Comments by field or by section and field."""
    shape, start = made.shape, made.start
    begins = f"{start!r}, which the tokenizer puts before a text" if start else "nothing, as the tokenizer's texts do"
    context = f"{shape.context} tokens" if shape.context else "any number of tokens"
    parts = "Of each file 80 % to train on, then 10 % to choose plans on, then 10 % to calibrate on; as much as is used."
    notes = {
        "base": "In the dtype that its configuration names.",
        "length": f"Of a window: at most {longest_of(shape)} tokens, as the base takes {context}; fewer where text or time are "
        f"short.\nA window begins with {begins}.",
        "text": "The base samples it." if request.data is None else parts,
        "anee": fields_in_words(shape, request.controller),
        "stages": f"Of the whole the head is {shape.head:.3f}; all in 8 bits {shape.in_8_bits:.3f}; in 4, with the head in 8, "
        f"{shape.in_4_bits:.3f}; all in 4 bits {shape.least:.3f}.",
    }
    if shape.bridged and request.controller == "routed":
        notes["stages"] += f"\nBudgets for bridges spend {SHARES[0]:g} to {SHARES[-1]:g} of the last on the layers."
    return notes | {f"stages.{one.stage}": explained(one) for one in made.estimates}


def fields_in_words(shape: Shape, controller: str) -> str:
    """What the fields of the configuration follow from."""
    if controller == "gated":
        return (
            f"For {shape.layers} layers and a hidden size of {shape.hidden_size}: ranks are 1/9 of that.\nAdd gated_variants "
            "to choose what feed-forwards run in: the default is [int8, none]."
        )
    ranks = f" and a hidden size of {shape.hidden_size}: ranks are 1/6 and 1/9 of that" if shape.bridged else ""
    return (
        f"For {shape.layers} layers{ranks}.\nThe first tenth of the layers is always run whole; controller_actions are what "
        "plans are sought over."
    )


def explained(estimate: Estimate) -> str:
    """What a stage should take, in words."""
    return f"an estimate: {estimate.seconds / 60:.1f} minutes for {estimate.count} {estimate.unit}"


def _comments(text: str | None) -> list[str]:
    return [f"# {line}" for line in text.split("\n")] if text else []


def _lines(name: str, value: Any, notes: dict[str, str]) -> list[str]:
    """A field, and what is in it one a line."""
    if not isinstance(value, dict):
        return [f"{name}: {_flow(value)}"]
    lines = [f"{name}:"]
    for key, inner in value.items():
        note = notes.get(f"{name}.{key}")
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            lines += [f"  {key}:", *(f"    - {_flow(item)}" for item in inner)]
        else:
            lines.append(f"  {key}: {_flow(inner)}" + (f"  # {note}" if note else ""))
    return lines


def _flow(value: Any) -> str:
    """YAML of a value in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True)
    return text.removesuffix("...\n").strip()
