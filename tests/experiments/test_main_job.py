"""The main job with its defaults, as `make train` runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.report.claims import verdict
from experiments.report.numbers import Run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "experiments.compare", "--runs-dir", str(folder)]
    # The tests' own settings compile fast, and compute slowly.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert (folder / "digits" / "report.html").stat().st_size > 100_000
    return json.loads((folder / "digits" / "results.json").read_text())


@pytest.mark.slow
def test_every_trial_ends_at_its_density(data):
    assert len(data["settings"]["seeds"]) >= 5
    for trial in data["trials"]:
        assert not trial["error"]
        expected = (
            1.0 if trial["method"] == "dense" else data["settings"]["density"][trial["pattern"]]
        )
        assert trial["epochs"][-1]["density"] == pytest.approx([expected] * len(trial["seeds"]))


@pytest.mark.slow
def test_the_networks_learn_and_the_methods_separate(data):
    run = Run(data)
    easy = [row for row in run.part("main") if row.pattern == "2:4"]
    assert min(row.numbers["metric"].mean for row in easy) > 0.9
    refined, plain = (run.find("1:16", name).numbers for name in ("sr_ste", "ste"))
    assert verdict(refined["metric"].minus(plain["metric"])) == "higher"
    assert verdict(refined["sad"].minus(plain["sad"])) == "lower"
