"""What a type checker sees of the library."""

import sys
from pathlib import Path

import pytest
from mypy import api

ROOT = Path(__file__).parents[2]

PROGRAM = """
from typing import NamedTuple, assert_type
import jax
import nmjax

class Params(NamedTuple):
    kernel: jax.Array

def test(params: Params, tree: dict[str, jax.Array], plan: nmjax.Plan) -> None:
    assert_type(nmjax.sparsify(params, plan), Params)
    assert_type(nmjax.prune(tree, plan), dict[str, jax.Array])
    assert_type(nmjax.compute_masks(params, plan), dict[str, jax.Array])
"""


def check(program, tmp_path):
    file = tmp_path / "program.py"
    file.write_text(program)
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(tmp_path)]
    out, _, status = api.run([*options, "--python-executable", sys.executable, str(file)])
    return out, status


@pytest.mark.slow
def test_trees_keep_their_type(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # Where mypy looks for nmjax.
    out, status = check(PROGRAM, tmp_path)
    assert status == 0, out
    out, status = check(PROGRAM.replace("plan), Params)", "plan), int)"), tmp_path)
    assert status == 1
    assert '"Params"' in out
