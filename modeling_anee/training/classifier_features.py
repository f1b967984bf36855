"""What the heads of a classifier read of every row, computed once and kept in the run's folder, in float16.

The base is frozen, so that nothing of it changes while heads are trained. Features lie in files of `ROWS` rows each, which are
written whole: an interrupted run goes on after the last of them. They are read as memory-mapped slices, one head at a time.

Shapes: N rows, E heads, F features.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..data.files import write_file
from ..data.progress import progress
from ..evaluation.early_exits import batches


ROWS = 512  # in a file
BATCH = 32
ABOUT = "about.json"


class Features:
    """The features of N rows in a folder.

    Args:
        folder: where they are, or will be; what is there of other rows, or of another model, is computed anew.
        about: what they depend on, for JSON.
        rows: token ids of every row.
    """

    def __init__(self, folder: Path, about: dict[str, Any], rows: Sequence[Sequence[int]]) -> None:
        self.folder, self.rows = folder, rows
        self._files = [folder / f"{start:07d}.safetensors" for start in range(0, len(rows), ROWS)]
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / ABOUT
        text = json.dumps(about, indent=2, sort_keys=True) + "\n"
        if not known.is_file() or known.read_text(encoding="utf-8") != text:
            for file in folder.glob("*.safetensors"):
                file.unlink()
            write_file(known, text)

    def compute(self, model: Any) -> None:
        """Compute what is not there yet with an `AneeForSequenceClassification`."""
        missing = [number for number, file in enumerate(self._files) if not file.is_file()]
        there = sum(len(self._part(number)) for number in range(len(self._files)) if number not in missing)
        with progress("features", len(self.rows), there) as done:
            for number in missing:
                part = self._part(number)
                found: Tensor | None = None
                for places, ids, mask in batches(part, BATCH):
                    features = model.features(ids.to(model.device), mask.to(model.device)).half().cpu()
                    if found is None:
                        found = torch.zeros(len(part), *features.shape[1:], dtype=torch.float16)
                    found[places] = features
                    done(len(places))
                assert found is not None
                write_file(self._files[number], save({"features": found}))

    def of_head(self, head: int) -> Tensor:
        """What one head reads of every row, float32 [N, F]."""
        parts = []
        for file in self._files:
            with safe_open(file, framework="pt") as tensors:
                parts.append(tensors.get_slice("features")[:, head].float())
        return torch.cat(parts)

    def _part(self, number: int) -> Sequence[Sequence[int]]:
        return self.rows[number * ROWS : (number + 1) * ROWS]
