"""The colour of every action, in pictures and on pages. Without matplotlib, which pages don't need."""

from ..actions import Action


COLOURS = {Action.PROCESS: "#2a6f97", Action.SKIP: "#f2cc8f", Action.EXIT: "#e5e5e5", Action.SKIP_FFN: "#8ab6d6"}
INK = "#333333"
