"""The log of a run: numbers by stage and step, as JSON lines and, if wanted, for TensorBoard."""

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..data.files import append_line, write_file


class RunLog:
    """Appends to `log.jsonl` in a run's folder.

    Args:
        folder: the run's folder.
        tensorboard: write for TensorBoard too, into the subfolder of that name.

    Raises:
        ImportError: TensorBoard is wanted, but not installed.
    """

    def __init__(self, folder: Path, tensorboard: bool = False) -> None:
        self.path = folder / "log.jsonl"
        self._writer_class: Any = _summary_writer() if tensorboard else None
        self._writer: Any = None

    def begin(self, stage: str, step: int, done: Collection[str] = ()) -> None:
        """Go on with a stage at a step: what it wrote of this and later steps is dropped, since it will write it again.

        So is what other stages wrote that are not done: their turn came under another recipe.
        """
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _stays(line, stage, step, done)]
            if kept != lines:
                write_file(self.path, "".join(kept))
        self.close()
        if self._writer_class is not None:
            self._writer = self._writer_class(self.path.parent / "tensorboard" / stage, purge_step=step)

    def write(self, stage: str, step: int, numbers: dict[str, float]) -> None:
        """Append one line.

        Raises:
            ValueError: a number is not finite.
        """
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in numbers.items()}
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise ValueError(f"stage {stage}, step {step}: {name}={value} is not a finite number")
        append_line(self.path, json.dumps({"stage": stage, "step": step} | numbers))
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish writing for TensorBoard."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _stays(line: str, stage: str, step: int, done: Collection[str]) -> bool:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return False  # torn by a crash
    return entry["step"] < step if entry["stage"] == stage else entry["stage"] in done


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard=True needs TensorBoard, which is not installed: pip install 'modeling-anee[tensorboard]'"
        ) from error
    return SummaryWriter
