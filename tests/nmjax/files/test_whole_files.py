"""Files that are there whole or not at all."""

import os
import stat

import numpy as np
import pytest

from nmjax.files.tensor_files import read_tensors, write_tensors
from nmjax.files.whole_files import write_whole


def write(text):
    return lambda part: part.write_text(text)


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "file.txt"
    for text in ("one", "two"):
        write_whole(path, write(text))
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_the_file_before_stays_when_writing_fails(tmp_path, error):
    path = tmp_path / "file.txt"
    write_whole(path, write("one"))

    def fail(part):
        part.write_text("t")
        assert path.read_text() == "one"
        raise error

    with pytest.raises(type(error)):
        write_whole(path, fail)
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_two_that_write_one_file_do_not_meet(tmp_path):
    """As from two machines, whose processes may have one number."""
    path = tmp_path / "file.txt"

    def write_between(part):
        part.write_text("outer, ")
        write_whole(path, write("inner"))
        assert path.read_text() == "inner"
        with part.open("a") as file:
            file.write("whole")

    write_whole(path, write_between)
    assert path.read_text() == "outer, whole"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "x", write("text"))
        write_tensors(tmp_path / "y", {"a": np.ones(2)}, {})  # The library's own writer.
        write_tensors(tmp_path / "y", {"a": np.ones(2)}, {})
    finally:
        os.umask(before)
    for name in ("x", "y"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    for name, target in (("link", "folder/file"), ("new", "folder/other")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "folder/file").write_text("old")
    for name, target in (("link", "file"), ("new", "other")):
        write_whole(tmp_path / name, write("text"))
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "folder" / target).read_text() == "text"
    assert len(list((tmp_path / "folder").iterdir())) == 2


def test_only_regular_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "link", "null", "folder"):
        with pytest.raises(OSError, match="it exists, and is not a regular file"):
            write_whole(tmp_path / name, write("text"))
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)
    with pytest.raises(FileNotFoundError, match=r"folder .*no does not exist"):
        write_whole(tmp_path / "no" / "x", write("text"))


def test_the_longest_names(tmp_path):
    name = "x" * 243 + ".safetensors"
    write_tensors(tmp_path / name, {"a": np.ones(2)}, {})
    assert read_tensors(tmp_path / name)[0].keys() == {"a"}
    assert [path.name for path in tmp_path.iterdir()] == [name]
