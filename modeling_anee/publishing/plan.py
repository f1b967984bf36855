"""What of a folder would go to the Hub, and what is odd about it."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash


LARGE = 10_000_000  # bytes; the Hub keeps larger files as LFS whatever they are
SAMPLE = 512  # bytes by which the Hub tells text from binary
TEXT = (".md", ".json", ".txt", ".py", ".jinja", ".yaml", ".yml", ".svg")  # endings of what must be UTF-8


@dataclass(frozen=True)
class PlannedFile:
    """A file that goes to the root of the repository, as it was when the plan was made."""

    path: Path
    size: int
    sha256: str
    git_oid: str
    kind: str  # what the Hub is expected to keep it as: "LFS" or "regular"

    @classmethod
    def read(cls, path: Path) -> "PlannedFile":
        """Describe a file as it is now."""
        data = path.read_bytes()
        large = path.suffix == ".safetensors" or len(data) > LARGE or b"\0" in data[:SAMPLE]
        return cls(path, len(data), hashlib.sha256(data).hexdigest(), git_hash(data), "LFS" if large else "regular")

    def matches(self, remote: RepoFile) -> bool:
        """Whether the Hub has the same content."""
        if remote.lfs is not None:
            return (remote.lfs.sha256, remote.lfs.size) == (self.sha256, self.size)
        return (remote.blob_id, remote.size) == (self.git_oid, self.size)


def left_out(name: str) -> bool:
    """Whether a file or folder of this name never goes: it is hidden, or Python's cache."""
    return name.startswith(".") or name == "__pycache__"


def entries(folder: Path) -> list[Path]:
    """The files and folders in a folder that count, by their names."""
    return sorted(path for path in folder.iterdir() if not left_out(path.name))


def hidden(folder: Path) -> list[Path]:
    """What else is in a folder."""
    return sorted(path for path in folder.iterdir() if left_out(path.name))


def as_text(files: Sequence[PlannedFile], without: Sequence[Path]) -> str:
    """The plan for a terminal: the files that go, and what is left out."""
    width = max(len(file.path.name) for file in files)
    lines = [f"{'path':{width}s}  {'bytes':>10s}  {'kept as':8s} sha256"]
    lines += [f"{file.path.name:{width}s}  {file.size:10,d}  {file.kind:8s} {file.sha256}" for file in files]
    lines.append(f"{len(files)} files, {sum(file.size for file in files):,} bytes")
    if without:
        lines.append(f"left out: {', '.join(path.name for path in without)}")
    return "\n".join(lines)


def unreadable(path: Path) -> str | None:
    """Why something in a folder can't be read; None if it can, or is a folder."""
    if path.is_symlink() and not path.exists():
        return f"{path.name} is a link to {path.readlink()}, which does not exist"
    if path.is_dir():
        return None
    if not path.is_file():  # reading a pipe would wait for ever
        return f"{path.name} is not a regular file"
    try:
        path.open("rb").close()
    except OSError as error:
        return f"{path.name} can't be read: {error}"
    return None


def not_text(path: Path) -> str | None:
    """Why a file that should be text is none; None if it is, or should not be."""
    try:
        if path.suffix in TEXT:
            path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return f"{path.name} is not UTF-8 text (byte {error.start})"
    return None


def refuse(what: Path, problems: Iterable[str]) -> None:
    """Say what is wrong with a folder, all of it at once.

    Raises:
        ValueError: there are problems.
    """
    if found := "; ".join(problems):
        raise ValueError(f"{what} can't be published: {found}")
