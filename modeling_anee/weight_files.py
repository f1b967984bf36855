"""Files of weights that can't be read, and why."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


POINTER = b"version https://git-lfs.github.com/spec/"  # how a pointer begins, which has a few lines
NEEDED = (".safetensors", ".bin", ".gguf", ".json", ".model")  # endings of weights, configurations and tokenizers


@contextlib.contextmanager
def readable_weights(where: str | os.PathLike) -> Iterator[None]:
    """Around the reading of weights, and of what lies beside them: says why they can't be read, where that can be known.

    Args:
        where: their folder, one file, or a name on the Hub.

    Raises:
        OSError: they are not there but as pointers of git-LFS, or they are truncated or no safetensors.
    """
    try:
        yield
    except Exception as error:
        if pointers := lfs_pointers(Path(where)):
            raise OSError(
                f"{', '.join(pointers)} in {str(where)!r} are pointers of git-LFS instead of the files: get these with "
                "'git lfs pull'"
            ) from error
        if type(error).__name__ == "SafetensorError":  # its package is none that shipped code imports
            raise OSError(f"the weights in {str(where)!r} are truncated or not safetensors: {error}") from error
        raise


def lfs_pointers(where: Path) -> list[str]:
    """Names of the files in a folder, or of the one file, that are pointers of git-LFS."""
    files = sorted(where.iterdir()) if where.is_dir() else [where]
    return [file.name for file in files if file.suffix in NEEDED and file.is_file() and _begins_with(file, POINTER)]


def _begins_with(file: Path, start: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(start)) == start
