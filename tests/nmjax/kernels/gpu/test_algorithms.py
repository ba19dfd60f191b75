"""The fastest kernels, kept on disk."""

import json
import warnings

import pytest

from nmjax.kernels.gpu import algorithms
from nmjax.kernels.gpu.algorithms import Algorithm, Question, known_algorithm, remember_algorithm

QUESTION = Question("0.8.0", (8, 32, 16), False, ("bfloat16", "bfloat16"), True, None)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("NMJAX_CACHE_DIR", str(tmp_path / "new"))
    forget_all()
    return tmp_path / "new"


def forget_all():
    """As another process begins."""
    algorithms._known.cache_clear()
    algorithms._found.clear()


def test_what_is_remembered_is_known_to_another_process(folder):
    assert known_algorithm(QUESTION) is None
    remember_algorithm(QUESTION, Algorithm(7, 2, 1, 500))
    forget_all()
    assert known_algorithm(QUESTION) == Algorithm(7, 2, 1, 500)
    assert [file.name for file in folder.iterdir()] == ["cusparselt-cpu.json"]


@pytest.mark.parametrize(
    "other",
    [
        {"version": "0.9.0"},
        {"shape": (16, 32, 16)},
        {"transposed": True},
        {"dtypes": ("float16", "float16")},
        {"bias": False},
        {"activation": "relu"},
    ],
    ids=str,
)
def test_every_part_of_a_question_counts(other):
    remember_algorithm(QUESTION, Algorithm(7, 2, 1, 500))
    assert known_algorithm(QUESTION) is not None
    assert known_algorithm(QUESTION._replace(**other)) is None


def test_what_another_process_found_meanwhile_is_kept(folder):
    assert known_algorithm(QUESTION) is None  # This process has read the file, and found none.
    folder.mkdir()
    theirs = QUESTION._replace(shape=(8, 64, 16))
    (folder / "cusparselt-cpu.json").write_text(json.dumps({theirs.key: [1, 1, 0, 9]}))
    remember_algorithm(QUESTION, Algorithm(7, 2, 1, 500))
    assert known_algorithm(theirs) == Algorithm(1, 1, 0, 9)
    assert known_algorithm(QUESTION) == Algorithm(7, 2, 1, 500)


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"a": 3}', '{"a": [1, 2, 3]}', '{"a": [1, 2, 3, "4"]}', "\0"]
)
def test_a_damaged_file_is_said_ignored_and_written_anew(folder, text):
    folder.mkdir()
    (folder / "cusparselt-cpu.json").write_text(text)
    with pytest.warns(UserWarning, match=r"cusparselt-cpu\.json is damaged and ignored"):
        assert known_algorithm(QUESTION) is None
    with pytest.warns(UserWarning, match="ignored"):
        remember_algorithm(QUESTION, Algorithm(7, 2, 1, 500))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert known_algorithm(QUESTION) == Algorithm(7, 2, 1, 500)


def test_a_failed_write_is_said_and_leaves_the_file_as_it_was(folder, monkeypatch):
    remember_algorithm(QUESTION, Algorithm(7, 2, 1, 500))

    def fail(path, text):
        raise OSError("disk full")

    monkeypatch.setattr(algorithms.Path, "write_text", fail)
    with pytest.warns(UserWarning, match=r"cusparselt-cpu\.json cannot be written \(disk full\)"):
        remember_algorithm(QUESTION, Algorithm(8, 2, 1, 500))
    assert known_algorithm(QUESTION) == Algorithm(8, 2, 1, 500)
    forget_all()
    assert known_algorithm(QUESTION) == Algorithm(7, 2, 1, 500)
    assert [file.name for file in folder.iterdir()] == ["cusparselt-cpu.json"]


def test_a_folder_that_cannot_be_made_loses_no_search(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NMJAX_CACHE_DIR", str(tmp_path / "file" / "nmjax"))
    with pytest.warns(UserWarning, match="only this process knows.*NMJAX_CACHE_DIR"):
        remember_algorithm(QUESTION, Algorithm(7, 2, 1, 500))
    assert known_algorithm(QUESTION) == Algorithm(7, 2, 1, 500)


def test_where_the_file_is(monkeypatch, tmp_path):
    assert algorithms._file() == tmp_path / "new" / "cusparselt-cpu.json"
    monkeypatch.delenv("NMJAX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert algorithms._file() == tmp_path / "xdg" / "nmjax" / "cusparselt-cpu.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert algorithms._file() == tmp_path / ".cache" / "nmjax" / "cusparselt-cpu.json"
