"""The writer of files: whole or not at all, in the right place, with the mode that was there, and nothing left behind."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from modeling_anee.data.files import append_line, check_target, is_part, remove_parts, whole_folder, write_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def failing(error):
    def call(*arguments):
        raise error

    return call


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_part_and_is_said_of_the_file(tmp_path, monkeypatch, step):
    write_file(tmp_path / "file", "old")
    monkeypatch.setattr(os, step, failing(OSError(errno.ENOSPC, "No space left on device")))
    for path in (tmp_path / "file", tmp_path / "new"):
        with pytest.raises(OSError, match="No space left") as caught:
            write_file(path, b"new")
        assert caught.value.filename == str(path) and caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_file(tmp_path / "file", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            write_file(tmp_path / "file", b"new")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"old"
    write_file(tmp_path / "file", b"new")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"new"


def test_a_missing_folder_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_file(tmp_path / "gone" / "file", b"")
    assert caught.value.filename == str(tmp_path / "gone" / "file")


def test_a_file_keeps_its_mode_and_a_new_one_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "file", "one")
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
        (tmp_path / "file").chmod(0o604)
        write_file(tmp_path / "file", "two")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o604 and (tmp_path / "file").read_text() == "two"


def test_a_file_that_may_not_be_written_stays(tmp_path, monkeypatch):
    write_file(tmp_path / "file", "old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    with pytest.raises(PermissionError) as caught:
        write_file(tmp_path / "file", "new")
    assert caught.value.filename == str(tmp_path / "file") and (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("there", [True, False])
def test_links_stay_and_what_they_point_to_is_replaced(tmp_path, there):
    for folder in ("target", "links"):
        (tmp_path / folder).mkdir()
    if there:
        (tmp_path / "target" / "file").write_text("old")
    (tmp_path / "links" / "first").symlink_to("second")
    (tmp_path / "links" / "second").symlink_to(Path("..") / "target" / "file")
    check_target(tmp_path / "links" / "first")
    write_file(tmp_path / "links" / "first", "new")
    assert (tmp_path / "target" / "file").read_text() == "new" and not (tmp_path / "target" / "file").is_symlink()
    assert (tmp_path / "links" / "first").is_symlink() and (tmp_path / "links" / "second").is_symlink()
    assert names(tmp_path / "links") == ["first", "second"] and names(tmp_path / "target") == ["file"]


def test_a_device_and_a_pipe_are_written_in_place(tmp_path):
    (tmp_path / "link").symlink_to("/dev/null")
    write_file(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_file("/dev/full", "x")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        append_line(Path("/dev/full"), "x")
    os.mkfifo(tmp_path / "pipe")
    check_target(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    content = b"much" * 100_000
    write_file(tmp_path / "pipe", content)
    reader.join()
    assert read == [content] and names(tmp_path) == ["link", "pipe"]


def test_standard_output_that_is_a_file_gets_the_content_where_it_is(capfd):
    print("before")
    write_file("/dev/stdout", "content\n")
    print("after")
    assert capfd.readouterr().out == "before\ncontent\nafter\n"


def test_the_longest_name_can_be_written(tmp_path):
    name = "é" * 127 + "x"  # 255 bytes
    write_file(tmp_path / name, "text: é")
    assert names(tmp_path) == [name] and (tmp_path / name).read_bytes() == "text: é".encode()


def test_parts_that_a_kill_left_are_known_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "unlink", lambda self, **kwargs: None)  # what a kill would not do
    monkeypatch.setattr(os, "replace", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "file", "x")
    monkeypatch.undo()
    write_file(tmp_path / "other", "x")
    assert [is_part(name) for name in names(tmp_path)] == [True, False]
    remove_parts(tmp_path)
    assert names(tmp_path) == ["other"]


def test_a_folder_is_replaced_whole_or_stays(tmp_path):
    for content in ("old", "new"):
        with whole_folder(tmp_path / "folder") as part:
            (part / content).write_text(content)
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["new"]
    full = OSError(errno.ENOSPC, "No space left on device")
    inside = str(tmp_path / "folder.part" / "x")
    of_part = OSError(errno.ENOSPC, "No space left on device", inside)
    of_copy = OSError(errno.ENOSPC, "No space left on device", "code.py", None, inside)
    for raised in (full, of_part, of_copy, ValueError()):
        with pytest.raises(type(raised)) as caught, whole_folder(tmp_path / "folder") as part:
            (part / "half").write_text("x")
            raise raised
        assert isinstance(raised, ValueError) or caught.value.filename == str(tmp_path / "folder")
        assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["new"]
    with pytest.raises(FileNotFoundError) as caught, whole_folder(tmp_path / "folder"):
        (tmp_path / "gone").read_text()
    assert caught.value.filename == str(tmp_path / "gone"), "what is read is not what is written"


def test_targets_that_cannot_be_written_are_noticed(tmp_path, monkeypatch):
    for fine in (tmp_path / "file", Path("/dev/null"), Path("/dev/stdout")):
        check_target(fine)
    with pytest.raises(OSError, match="is a folder"):
        check_target(tmp_path)
    with pytest.raises(OSError, match="gone does not exist"):
        check_target(tmp_path / "gone" / "file")
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "file")
    with pytest.raises(OSError, match="gone does not exist"):
        check_target(tmp_path / "link")
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(OSError, match=f"the folder {tmp_path} can't be written to"):
        check_target(tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "file")
    with pytest.raises(OSError, match="file can't be written to"):
        check_target(tmp_path / "file")
