"""XLA compiles our programs for an H200 where there is none."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


@pytest.mark.optimized
@pytest.mark.slow  # Half a minute.
@pytest.mark.optimized
def test_programs_compile_for_an_h200(tmp_path):
    if not any(importlib.util.find_spec(plugin) for plugin in PLUGINS):
        pytest.skip("no jax-cuda13-plugin: 140 MB with jax-cuda13-pjrt, of jax's own version")
    if shutil.which("ptxas") is None:
        pytest.skip("no ptxas: it comes with the CUDA toolkit")
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_for_h200.py")],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "MOSAIC_GPU_DUMP_TO": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    programs = json.loads(run.stdout)
    assert programs["masked"]["operations"].count("fusion") == 1  # One pass over the weight.
    for name in ("masked_4_8", "masked_8_32"):  # Two, with a bit per weight between them.
        assert programs[name]["operations"].count("fusion") == 2
        assert programs[name]["temporary"] <= 4096 * 4096 / 8 + 1024
    assert not any(program["sorts"] for program in programs.values())
    assert set(programs) >= {"masked", "dense_training", "sr_ste_training", "sparse_dense"}
    for name, calls in (
        ("with_cusparselt", {"nmjax_cusparselt_compress", "nmjax_cusparselt_matmul"}),
        ("with_decode", {"nmjax_decode"}),
    ):
        assert name not in programs or calls <= set(programs[name]["calls"])
