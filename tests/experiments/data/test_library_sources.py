"""The library's sources: the split, what is left out, what cannot be read."""

import numpy as np
import pytest

from experiments.data.library_sources import is_test, load_sources


def write(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"# {name}\n".encode())


NAMES = [f"part{i % 3}/file{i}.py" for i in range(60)]


def test_every_file_is_in_the_half_of_its_hash(tmp_path):
    write(tmp_path, NAMES)
    found = load_sources(tmp_path)
    test = sorted(name for name in NAMES if is_test(name))
    assert 1 <= len(test) < 20
    assert (found.test_files, found.train_files) == (len(test), 60 - len(test))
    assert found.test.tobytes() == b"".join(f"# {name}\n\0".encode() for name in test)
    assert found.test.dtype == np.uint8
    assert not set(found.test.tobytes().split(b"\0")[:-1]) & set(found.train.tobytes().split(b"\0"))


def test_a_file_stays_in_its_half_when_others_come(tmp_path):
    write(tmp_path / "a", NAMES)
    write(tmp_path / "b", [*NAMES, *(f"more/file{i}.py" for i in range(40))])
    few, many = (set(load_sources(tmp_path / n).test.tobytes().split(b"\0")) for n in "ab")
    assert few <= many


def test_installed_packages_and_tests_are_left_out(tmp_path):
    write(tmp_path, NAMES)
    before = load_sources(tmp_path)
    write(tmp_path, ["site-packages/x/a.py", "json/tests/b.py", "test/c.py", "data.txt"])
    after = load_sources(tmp_path)
    np.testing.assert_array_equal(before.train, after.train)
    np.testing.assert_array_equal(before.test, after.test)


def test_what_cannot_be_read_is_counted(tmp_path):
    write(tmp_path, NAMES)
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "folder.py").mkdir()
    found = load_sources(tmp_path)
    assert found.skipped == ("folder.py", "gone.py")
    assert found.train_files + found.test_files == 60


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has 0 training and 0 test files"):
        load_sources(tmp_path)


def test_the_running_pythons_library_is_there():
    found = load_sources()
    assert found.train_files > 100
    assert 0.02 < len(found.test) / (len(found.train) + len(found.test)) < 0.3
    assert b"import" in found.test.tobytes()


def test_validation_splits_the_training_files_and_leaves_the_test_files_out(tmp_path):
    write(tmp_path, NAMES)
    whole, tuning = load_sources(tmp_path), load_sources(tmp_path, validation=True)

    def files(stream):
        return set(stream.tobytes().split(b"\0")[:-1])

    assert files(tuning.train) | files(tuning.test) == files(whole.train)
    assert not files(tuning.train) & files(tuning.test)
    assert 1 <= tuning.test_files < 20
