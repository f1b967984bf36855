"""Letters, symbols and colours of actions: distinct, readable on white, and the darker the dearer."""

from collections.abc import Iterable
from typing import NamedTuple


# For rows that say nothing of their own looks.
COLOURS = ("#7a5195", "#4c9f70", "#d45087", "#b5a642", "#5f6caf", "#c98474", "#3f88c5", "#8c8c3a")
SYMBOLS = "▓▒░◆◇●○◐"
LETTERS = "ABCDGHIJKLMNOQRTUVWXYZabcdefghijklmnopqrstuvwxyz"


class Looks(NamedTuple):
    """One character for plans, one for a terminal, a colour of pictures and that of a letter on it; empty: none of its own."""

    letter: str = ""
    symbol: str = ""
    colour: str = ""
    ink: str = "#ffffff"


# Of the rows of precisions, by their names. Blue is full, green int8, lime int4; a part of a layer is paler than all of it.
OF_PRECISIONS = {
    "INT8": Looks("8", "▓", "#3b9a7c", "#06221a"),
    "INT4_INT8": Looks("6", "▞", "#62b184", "#0b2a18"),
    "INT8_INT4": Looks("5", "▚", "#8cc68a", "#12300f"),
    "INT4": Looks("4", "▒", "#b4d97c", "#26350c"),
    "INT8_SKIP_FFN": Looks("G", "▃", "#bfe3d6", "#14352a"),
    "INT4_SKIP_FFN": Looks("H", "▂", "#dcedb4", "#333f15"),
    "SKIP_INT8": Looks("T", ",", "#f6d9a8", "#33270f"),
    "SKIP_INT4": Looks("U", ".", "#fae5c3", "#33270f"),
    "EXIT_INT8": Looks("X", "'", "#e6eee9", "#555555"),
    "EXIT_INT4": Looks("Y", "`", "#f0f3e3", "#555555"),
}


def paler(colour: str, share: float) -> str:
    """A share of the way from `#rrggbb` to white."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + share * (255 - part)):02x}" for part in parts)


def brightness(colour: str) -> float:
    """How bright `#rrggbb` looks, 0 to 1."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def first_free(choices: Iterable[str], taken: set[str]) -> str:
    """The first of the choices that nobody has; the last, where all are taken."""
    choices = list(choices)
    return next((choice for choice in choices if choice not in taken), choices[-1])
