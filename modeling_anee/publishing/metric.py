"""What must be right about the folder of a metric of `evaluate` before it is published as a Space."""

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .plan import entries, not_text, unreadable
from .secret_files import secrets


METRIC = Path(__file__).parents[1] / "evaluation" / "anee_perplexity"
SDK = "gradio"
REQUIRED = ("README.md", "requirements.txt", "app.py")
ENDINGS = (".py", ".md", ".txt", ".json")


def problems(folder: Path, name: str, allowed: Sequence[str] = ()) -> list[str]:
    """Why a folder should not be published as a metric of that name; empty if it should.

    Args:
        folder: of the metric.
        name: of its Space; `evaluate.load` looks for a module of the same name in it.
        allowed: names of files that look like secrets and are none.

    Raises:
        ValueError: a name among `allowed` that no file has.
    """
    if not folder.is_dir():
        return ["it is not a folder"]
    module = f"{name.rsplit('/', 1)[-1]}.py"
    found = [f"{needed} is missing" for needed in (module, *REQUIRED) if not (folder / needed).exists()]
    files = entries(folder)
    found += [f"{path.name} is not a file of a metric" for path in files if path.is_dir() or path.suffix not in ENDINGS]
    found += [reason for path in files if (reason := unreadable(path)) is not None]
    found = found or [reason for path in files if (reason := not_text(path)) is not None]
    if found:
        return found
    code = [path for path in files if path.suffix == ".py"]
    return check_front_matter(folder / "README.md") + check_code(code) + secrets(files, allowed)


def check_front_matter(card: Path) -> list[str]:
    """The Hub is told what kind of Space it is."""
    parts = card.read_text(encoding="utf-8").split("---\n")
    try:
        fields: Any = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0] else None
    except yaml.YAMLError as error:
        return [f"the front matter of README.md is not YAML: {error}"]
    if not isinstance(fields, dict) or fields.get("sdk") != SDK or "title" not in fields:
        return [f"the front matter of README.md must have a title and sdk: {SDK}"]
    return []


def check_code(files: list[Path]) -> list[str]:
    """The code can be parsed, and needs nothing beside what is in the folder and its requirements."""
    found = []
    for path in files:
        try:
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        except (SyntaxError, ValueError) as error:  # the latter for NUL bytes in older Pythons
            found.append(f"{path.name} is not Python: {error}")
            continue
        if any(isinstance(node, ast.ImportFrom) and node.level > 1 for node in nodes):
            found.append(f"{path.name} imports from outside of its folder, which is not published")
    return found
