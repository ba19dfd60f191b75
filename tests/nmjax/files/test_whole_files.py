"""Files that are there whole or not at all."""

import pytest

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
