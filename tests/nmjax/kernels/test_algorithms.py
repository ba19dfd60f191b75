"""The fastest kernels, kept on disk."""

import pytest

from nmjax.kernels import algorithms
from nmjax.kernels.algorithms import Algorithm, Question, known_algorithm, remember_algorithm

QUESTION = Question("0.8.0", (8, 32, 16), False, ("bfloat16", "bfloat16"), True, None)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("NMJAX_CACHE_DIR", str(tmp_path / "new"))
    return tmp_path / "new"


def test_what_is_remembered_is_known_to_another_process(folder):
    assert known_algorithm(QUESTION) is None
    remember_algorithm(QUESTION, Algorithm(7, 2, 1, 500))
    algorithms._known.cache_clear()
    assert known_algorithm(QUESTION) == Algorithm(7, 2, 1, 500)
    assert known_algorithm(QUESTION._replace(activation="relu")) is None
    assert known_algorithm(QUESTION._replace(version="0.9.0")) is None
    assert [file.name for file in folder.iterdir()] == ["cusparselt-cpu.json"]


def test_a_damaged_file_is_an_error(folder):
    folder.mkdir()
    (folder / "cusparselt-cpu.json").write_text("{")
    with pytest.raises(ValueError, match=r"cusparselt-cpu\.json is damaged.*delete it"):
        known_algorithm(QUESTION)
