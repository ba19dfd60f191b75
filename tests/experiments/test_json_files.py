"""Numbers as JSON has them, files that are whole, and what is said of two that differ."""

import json

import jax
import numpy as np
import pytest

from experiments.json_files import JsonLines, differences, machine, plain, read_json, write_json


def test_numbers_come_back_as_they_went():
    value = {"a": np.float32(0.1), "b": [np.arange(3), (1, 2.5)], "c": None, "d": "x", "e": True}
    back = json.loads(json.dumps(plain(value)))
    assert back == {"a": float(np.float32(0.1)), "b": [[0, 1, 2], [1, 2.5]]} | {
        "c": None,
        "d": "x",
        "e": True,
    }
    rng = np.random.default_rng(0)
    assert all(plain(x) == x for x in rng.standard_normal(100).tolist())


def test_floats_are_cut_to_digits_and_integers_are_not():
    assert plain([1 / 3, np.float32(1 / 3), 123456789], 6) == [0.333333, 0.333333, 123456789]


def test_what_is_not_finite_is_null():
    assert plain([float("nan"), np.array([np.inf, 1.0]), -np.inf]) == [None, [None, 1.0], None]


def test_the_machine_is_described():
    found = machine()
    assert found["jax"] == jax.__version__
    assert found["device"] == "8 x cpu (cpu)"
    assert found["cores"] >= 1
    assert plain(found) == found


@pytest.mark.parametrize(
    ("now", "expected", "text"),
    [
        ({"a": 1, "b": {"c": [2]}}, {"a": 1, "b": {"c": [2]}}, ""),
        ({"a": 1}, {"a": 2}, "a is 1, not 2"),
        ({"b": {"c": [2]}}, {"b": {"c": [3]}}, "b c is [2], not [3]"),
        ({"a": None}, {}, ""),
        ({}, {"b": {"c": 1}}, "b is None, not {'c': 1}"),
        ({"a": 1, "b": 2}, {"b": 3, "a": 4}, "b is 2, not 3; a is 1, not 4"),
    ],
)
def test_differences_are_named(now, expected, text):
    assert differences(now, expected) == text


def test_long_differences_are_cut():
    ones, twos = ({str(name): value for name in range(20)} for value in (1, 2))
    assert differences(ones, twos) == "; ".join(f"{name} is 1, not 2" for name in range(8))


def test_a_damaged_file_is_named(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1]})
    assert read_json(tmp_path / "a.json") == {"a": [1]}
    (tmp_path / "a.json").write_text('{"a":')
    with pytest.raises(ValueError, match=r"a\.json is damaged: Expecting value"):
        read_json(tmp_path / "a.json")


def test_a_line_cut_off_while_it_was_written_is_left_out(tmp_path):
    log = JsonLines(tmp_path / "metrics.jsonl")
    assert log.read() == []
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    assert [line["epoch"] for line in log.read()] == [1, 2]
    assert log.keep("epoch", 1) == []
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1}\n'
    log.append({"epoch": 2, "loss": np.array([np.nan])})
    assert log.read()[-1] == {"epoch": 2, "loss": [None]}


@pytest.mark.parametrize(
    "damaged",
    [
        *(b'{"epoch": 2', b'{"epoci": 2}', b"[2]", b"\xff\x00", b"", b'{"epoch": "2"}'),
        *(b'{"epoch": NaN}', b'{"epoch": true}', b'{"epoch": false}', b'{"epoch": -1e999}'),
        *(b'{"epoch": 1.5}', b'{"epoch": null}'),
    ],
)
def test_damaged_lines_are_counted_and_dropped(tmp_path, damaged):
    log = JsonLines(tmp_path / "metrics.jsonl")
    lines = [b'{"epoch": 1}', damaged, b'{"epoch": 3}', b'{"epoch": 4}', b'{"epo']
    log.path.write_bytes(b"\n".join(lines))
    assert log.keep("epoch", 3) == [2]
    assert log.path.read_text() == '{"epoch": 1}\n{"epoch": 3}\n'


def test_reading_names_the_damaged_line(tmp_path):
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.path.write_text('{"epoch": 1}\n{"epoch"\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: line 2 is not a JSON object"):
        log.read()
