"""`run.json`: which recipe a folder belongs to, and how far its run is."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.files import is_part, write_file
from .recipe import Recipe


NAME = "run.json"


@dataclass
class RunState:
    """How far a run is: finished stages, the fields of `AneeConfig` that they set, and the file with our modules."""

    recipe: dict[str, Any]
    recipe_sha256: str
    done: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    own: str | None = None

    @classmethod
    def of(cls, recipe: Recipe, folder: Path) -> "RunState":
        """The state of the run in `folder`, or that of a new run where there is none.

        Raises:
            ValueError: the folder has other things in it, a run of another recipe, or a damaged `run.json`.
        """
        new = cls(recipe.model_dump(), recipe.digest())
        found = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if NAME not in found:
            if not all(map(is_part, found)):
                raise ValueError(f"{folder} is not empty and holds no run: give another folder for the output")
            return new
        try:
            state = cls(**json.loads((folder / NAME).read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / NAME} is damaged ({error}): give another folder for the output") from error
        if state.recipe_sha256 != new.recipe_sha256:
            names = ", ".join(_differences(state.recipe, new.recipe)) or "fields of another version"
            raise ValueError(f"{folder} holds a run of another recipe (it differs in {names}): give another folder")
        return state

    def write(self, folder: Path) -> None:
        """Write `run.json`."""
        write_file(folder / NAME, json.dumps(asdict(self), indent=2) + "\n")


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Paths of the fields that differ between two recipes."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [path]
    names = sorted(old.keys() | new.keys())
    return [found for name in names for found in _differences(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))]
