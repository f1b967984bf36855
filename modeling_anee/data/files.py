"""The one writer of files: a kill, a full disk or an error leaves the old file or the new one, and nothing else.

Regular files are written by way of a sibling that takes their place. What can't be replaced (a device, a pipe, this
process's own standard output) is written in place. Whole folders are written likewise by `whole_folder`.
"""

import contextlib
import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


PART = ".part"  # ending of what is being written
OLD = ".old"  # ending of a folder that is being replaced


def write_file(path: str | os.PathLike, data: bytes | str) -> None:
    """Write a file, whole or not at all where that is possible.

    Links are followed: what they point to is replaced. A file that was there keeps its mode, a new one gets that of the
    umask.

    Args:
        path: the file; a device, a named pipe or `/dev/stdout` is written in place.
        data: its content; text becomes UTF-8.

    Raises:
        OSError: it can't be written; the error names `path`, and no part of the file is left.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    with errors_name(path):
        before = _status(path)
        stream = None if before is None else _own_stream(before)
        if stream is not None:
            _write_all(os.dup(stream), content)
        elif before is not None and not stat.S_ISREG(before.st_mode):
            _write_all(os.open(path, os.O_WRONLY), content)
        else:
            _replace(Path(os.path.realpath(path)), content, before)


def append_line(path: Path, line: str) -> None:
    """Append a line, without its end, to a file, which is made if it is not there.

    Raises:
        OSError: it can't be written; the error names `path`.
    """
    with errors_name(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to be filled, which then takes the place of `folder`; if anything is raised, it is removed instead.

    Raises:
        OSError: something in it can't be written; the error names a file or `folder`.
    """
    part, old = (folder.with_name(folder.name + ending) for ending in (PART, OLD))
    _remove_folders(part, old)
    try:
        with errors_name(folder):
            part.mkdir()
            yield part
            if folder.exists():
                os.replace(folder, old)
            os.replace(part, folder)
    except SafetensorError as error:  # what a full disk is to its writer
        raise OSError(f"{folder} can't be written: {error}") from error
    finally:
        _remove_folders(part, old)


def check_target(path: Path) -> None:
    """Notice a file that `write_file` can't write before the work for it is done.

    Raises:
        OSError: it is a folder, its folder does not exist, or it may not be written.
    """
    status = _status(path)
    if status is not None and stat.S_ISDIR(status.st_mode):
        raise OSError(f"{path} is a folder: it must be the name of a file")
    if status is not None and not os.access(path, os.W_OK):
        raise OSError(f"{path} can't be written to")
    if status is None or (stat.S_ISREG(status.st_mode) and _own_stream(status) is None):
        folder = Path(os.path.realpath(path)).parent
        if not folder.is_dir():
            raise OSError(f"{path}: the folder {folder} does not exist")
        if not os.access(folder, os.W_OK):
            raise OSError(f"{path}: the folder {folder} can't be written to")


def is_part(name: str) -> bool:
    """Whether a file of this name is being written, or was when its writer was killed."""
    return name.startswith(".") and name.endswith(PART)


def remove_parts(folder: Path) -> None:
    """Remove what writers that were killed left in a folder; none may be at work there."""
    for path in folder.iterdir():
        if is_part(path.name):
            path.unlink()


@contextlib.contextmanager
def errors_name(path: str | os.PathLike) -> Iterator[None]:
    """Let errors of the system name a file: that of a full disk names none, others the part of it that is being written."""
    try:
        yield
    except OSError as error:
        named = error.filename2 or error.filename  # of a copy, the second is where to
        if error.errno is None or (named is not None and PART not in os.fspath(named)):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _status(path: str | os.PathLike) -> os.stat_result | None:
    """Status of what a path leads to; None if there is nothing yet."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _own_stream(status: os.stat_result) -> int | None:
    """Descriptor of this process's standard output or error if that is the file, as it is for /dev/stdout.

    Others hold it open, at a position: what took its place they would never see.
    """
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            same = os.path.samestat(status, os.fstat(descriptor))
        except OSError:  # it is closed
            continue
        if same and stream is not None:
            stream.flush()
        if same:
            return descriptor
    return None


def _write_all(descriptor: int, content: bytes) -> None:
    with open(descriptor, "wb", buffering=0) as file:
        left = memoryview(content)
        while left:
            left = left[file.write(left) :]


def _replace(target: Path, content: bytes, before: os.stat_result | None) -> None:
    """Write a sibling, and put it in the place of the regular file `before`, or of none."""
    if before is not None and not os.access(target, os.W_OK):  # to replace it needs no permission, but was not meant
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    part = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}{PART}")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if before is not None:
            os.chmod(part, stat.S_IMODE(before.st_mode))
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _remove_folders(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
