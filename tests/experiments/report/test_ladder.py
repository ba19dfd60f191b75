"""The ladder of made-up results, read back from its Markdown."""

import json

import numpy as np
import pytest
from scipy import stats

from experiments.ladder.__main__ import main

LEVELS = {"ste": 0.89, "sr_ste": 0.92, "decaying_mask": 0.935}


def results(seeds=4, methods=LEVELS):
    rng = np.random.default_rng(0)
    return [
        {
            "part": "main",
            "pattern": pattern,
            "method": method,
            "lambda_w": 0.0,
            "seeds": list(range(seeds)),
            "seconds": 1.0,
            "error": "",
            "epochs": [
                {
                    "epoch": 1,
                    "train_loss": [0.1] * seeds,
                    "test": {
                        "accuracy": (LEVELS[method] + 0.003 * rng.normal(size=seeds)).tolist(),
                        "loss": [0.1] * seeds,
                    },
                    "sad_epoch": [1] * seeds,
                    "sad_first": [1] * seeds,
                    "flip_rate": [0.1] * seeds,
                    "density": [0.5] * seeds,
                }
            ],
        }
        for pattern in ("2:4", "1:2")
        for method in methods
    ]


@pytest.fixture
def folder(data, tmp_path):
    def write(**made):
        data["trials"] = results(**made)
        (tmp_path / "results.json").write_text(json.dumps(data))
        return tmp_path

    return write


def test_the_ladder_shows_paired_tests_corrected_within_each_pattern(folder, capsys):
    path = folder()
    assert main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:2] for row in cells] == [
        [pattern, method]
        for pattern in ("2:4", "1:2")
        for method in ("decaying_mask", "sr_ste", "ste")
    ]
    accuracy = {
        (trial["pattern"], trial["method"]): trial["epochs"][0]["test"]["accuracy"]
        for trial in json.loads((path / "results.json").read_text())["trials"]
    }
    for pattern, method, _, mean, interval, p, corrected, *_ in cells:
        if method == "sr_ste":
            assert (mean, p) == ("", "")
            continue
        expected = stats.ttest_rel(accuracy[pattern, method], accuracy[pattern, "sr_ste"])
        low, high = (100 * end for end in expected.confidence_interval(0.95))
        assert interval == f"{low:+.2f} to {high:+.2f}"
        assert float(p) == pytest.approx(expected.pvalue, rel=0.06)
        assert float(p) <= float(corrected) <= 2.1 * float(p)
        assert mean.startswith("**") == (float(corrected) < 0.05)


@pytest.mark.parametrize(
    ("made", "flags", "message"),
    [
        ({"seeds": 1}, [], "at least two"),
        ({}, ["--reference", "lbc"], "no pattern has both 'lbc'"),
        ({"methods": ["sr_ste"]}, [], "and a method to compare"),
    ],
)
def test_what_cannot_be_ranked_is_an_error(folder, capsys, made, flags, message):
    assert main([str(folder(**made)), *flags]) == 1
    assert message in capsys.readouterr().err
