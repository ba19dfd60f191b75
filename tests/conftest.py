"""Set before jax compiles anything: eight simulated devices, and where its programs are kept."""

import os

import chex
import hypothesis
import jax
import pytest

from tests import shape_checks

_DEVICES = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

shape_checks.install()

# Every example of another shape compiles another program, so the default run draws few. CI draws
# many: --hypothesis-profile=thorough.
hypothesis.settings.register_profile("default", deadline=None, max_examples=5)
hypothesis.settings.register_profile("thorough", deadline=None, derandomize=True)
hypothesis.settings.load_profile("default")


def pytest_configure(config):
    """Workers, subprocesses and the next run share compiled programs; `make clean` forgets them.

    jax finds a program by its text, the compiler's version and flags, and the machine.
    """
    if not config.pluginmanager.hasplugin("cacheprovider"):
        return
    settings = {
        "jax_compilation_cache_dir": str(config.cache.mkdir("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(autouse=True)
def _forget_traces():
    """`chex.assert_max_traces` counts over all tests with the same source."""
    chex.clear_trace_counter()


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Each program in memory takes over a megabyte, and slows down the compiling of others."""
    yield
    jax.clear_caches()
