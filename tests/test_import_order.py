"""Folders of the package import only what comes before them."""

import ast
from pathlib import Path

import pytest

import modeling_anee


PACKAGE = Path(modeling_anee.__file__).parent
FOLDERS = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file()}
# The folders that each may import from, itself left out; all may import what ships.
ALLOWED = {
    "data": set(),
    "machines": {"data"},
    "evaluation": {"data", "machines"},
    "pictures": {"data", "evaluation"},
    "training": {"data", "evaluation"},
}
ALLOWED["pool"] = {"data", "evaluation", "pictures"}
ALLOWED["publishing"] = {"data", "evaluation", "pictures", "training"}
ALLOWED["cli"] = {"data", "evaluation", "machines", "pictures", "training", "publishing", "pool"}


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_only_what_comes_before_it(folder):
    for file in (PACKAGE / folder).rglob("*.py"):
        found = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
        level = len(file.relative_to(PACKAGE).parts)
        above = {(node.module or node.names[0].name).split(".")[0] for node in found if node.level == level}
        assert above & FOLDERS <= ALLOWED[folder], f"{folder}/{file.name}"
