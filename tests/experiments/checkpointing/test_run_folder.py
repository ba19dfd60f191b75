"""A folder belongs to one run at a time, and is resumed only as it was."""

import json
from pathlib import Path

import pytest

from experiments.checkpointing import run_folder
from experiments.checkpointing.run_folder import check_shared, open_folder, take


def owner_of(folder):
    return (folder / ".lock").read_text().strip()


def test_a_folder_is_held_once(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: None)
    lock = take(tmp_path / "run")
    check_shared(tmp_path / "run", owner_of(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"run on .* is not the folder that process 0 on x create"):
        check_shared(tmp_path / "run", "process 0 on x")
    with pytest.raises(ValueError, match="put --runs-dir on a disk that all processes share"):
        check_shared(tmp_path / "elsewhere", owner_of(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"run is in use by process \d+ on "):
        take(tmp_path / "run")
    lock.close()
    take(tmp_path / "run").close()
    # Left by a process that died, however it died: the file alone means nothing.
    (tmp_path / "run" / ".lock").write_text("process 1 on elsewhere")
    take(tmp_path / "run").close()


@pytest.mark.parametrize("before", [None, "", "process 1 on elsewhere"])
def test_a_disk_that_shows_the_owner_late_is_waited_for(tmp_path, monkeypatch, before):
    """As another machine's may; but not forever."""
    path = tmp_path / ".lock"
    if before is not None:
        path.write_text(before)
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 5:
            path.write_text("process 0 on x\n")

    monkeypatch.setattr(run_folder.time, "sleep", sleep)
    check_shared(tmp_path, "process 0 on x")
    assert len(pauses) == 5
    pauses.clear()
    with pytest.raises(ValueError, match="is not the folder that process 2 on x created"):
        check_shared(tmp_path, "process 2 on x")
    assert 3 <= sum(pauses) <= 10


def test_the_owner_is_on_the_disk_before_others_look(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(run_folder.os, "fsync", lambda file: written.append(owner_of(tmp_path)))
    lock = take(tmp_path)
    assert written == [owner_of(tmp_path)] != [""]
    lock.close()


def test_a_folder_is_given_back_and_not_before(tmp_path):
    release = open_folder(tmp_path, {"a": 1}, earlier="refuse")
    with pytest.raises(ValueError, match="is in use by process"):
        open_folder(tmp_path, {"a": 1}, earlier="resume")
    release()
    open_folder(tmp_path, {"a": 1}, earlier="resume")()


def test_an_earlier_run_is_resumed_refused_or_replaced(tmp_path):
    open_folder(tmp_path, {"seeds": (1,), "b": {"c": Path("x")}}, earlier="refuse")()
    with pytest.raises(ValueError, match="already holds a run: give --resume"):
        open_folder(tmp_path, {"seeds": [1], "b": {"c": "x"}}, earlier="refuse")
    with pytest.raises(ValueError, match=r"other settings: seeds is \[2\], not \[1\]\. Give"):
        open_folder(tmp_path, {"seeds": [2], "b": {"c": "x"}}, earlier="resume")
    open_folder(tmp_path, {"seeds": [1], "b": {"c": "x"}}, earlier="resume")()
    open_folder(tmp_path, {"seeds": [2]}, earlier="replace")()
    assert json.loads((tmp_path / "settings.json").read_text()) == {"seeds": [2]}


def test_only_what_decides_must_agree(tmp_path):
    def deciding(settings):
        return settings["decides"]

    for threads in (1, 2):
        settings = {"decides": {"seed": 0}, "threads": threads}
        open_folder(tmp_path, settings, earlier="resume", deciding=deciding)()
    assert json.loads((tmp_path / "settings.json").read_text())["threads"] == 2
