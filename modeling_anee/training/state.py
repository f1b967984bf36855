"""`run.json`: which recipe a folder belongs to, and how far its run is."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data.files import is_part, write_file
from . import lock
from .recipe import STAGE_NAMES, Recipe


NAME = "run.json"
RECIPE = "recipe.yaml"  # of a run whose recipe was made for it; such a folder has it before its run begins


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

        A run goes on under another recipe if that would have led to the same: as long as nothing was done, or if the two
        differ only in stages whose turn has not come.

        Raises:
            ValueError: the folder has other things in it, a run of another recipe, or a damaged `run.json`.
        """
        new = cls(recipe.model_dump(), recipe.digest())
        found = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if NAME not in found:
            if not all(name in (lock.NAME, RECIPE) or is_part(name) for name in found):
                raise ValueError(f"{folder} is not empty and holds no run: give another folder for the output")
            return new
        try:
            state = cls(**json.loads((folder / NAME).read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / NAME} is damaged ({error}): give another folder for the output") from error
        return state if state.recipe_sha256 == new.recipe_sha256 else state._under(new, recipe, folder)

    def _under(self, new: "RunState", recipe: Recipe, folder: Path) -> "RunState":
        """This state as one of another recipe.

        Raises:
            ValueError: something was done that the recipe would have done differently.
        """
        under_way = [stage for stage in STAGE_NAMES if stage not in self.done and work_of(stage, folder).exists()]
        if not self.done and not under_way:
            return new
        differences = _differences(self.recipe, new.recipe)
        changed = {path.split(".")[1] if path.startswith("stages.") else "" for path in differences}
        count = len(self.done)
        if recipe.planned[:count] != self.done or not changed or changed & {"", *self.done}:
            names = ", ".join(differences) or "fields of another version"
            raise ValueError(f"{folder} holds a run of another recipe (it differs in {names}): give another folder")
        for stage in under_way:
            if stage in changed or recipe.planned[count : count + 1] != [stage]:
                raise ValueError(
                    f"{folder} holds a run of another recipe (it differs in {', '.join(differences)}) in the midst of {stage}: "
                    f"delete {work_of(stage, folder)} to begin that stage again, by this one"
                )
        return replace(self, recipe=new.recipe, recipe_sha256=new.recipe_sha256)

    def write(self, folder: Path) -> None:
        """Write `run.json`."""
        write_file(folder / NAME, json.dumps(asdict(self), indent=2) + "\n")


def checkpoint_of(stage: str, folder: Path) -> Path:
    """A stage's one checkpoint, in the folder of a run."""
    return folder / f"checkpoint-{stage}.safetensors"


def work_of(stage: str, folder: Path) -> Path:
    """What a stage has done before its end: its checkpoint, or the folder that it fills."""
    return folder / stage if stage == "traces" else checkpoint_of(stage, folder)


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Paths of the fields that differ between two recipes."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [path]
    names = sorted(old.keys() | new.keys())
    return [found for name in names for found in _differences(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))]
