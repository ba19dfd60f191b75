"""Set before jax compiles anything: eight simulated devices, how it compiles, and where to keep it.

Tests compile long and run for a moment, so their programs are compiled fast, not well: without most
of XLA's optimizations, and without its slower way to write fused loops. Tests marked as `optimized`
get the optimizations; `--as-users-do` gives every test both.
"""

import collections
import os

import chex
import hypothesis
import jax
import pytest

from tests import shape_checks


def _add_flag(name, value):
    """Tells XLA, here and in subprocesses, what the environment does not say yet."""
    flags = os.environ.get("XLA_FLAGS", "")
    if name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{name}={value}".strip()


_add_flag("xla_force_host_platform_device_count", 8)

shape_checks.install()

# Every example of another shape compiles another program, so the default run draws few. CI draws
# many: --hypothesis-profile=thorough.
hypothesis.settings.register_profile("default", deadline=None, max_examples=5)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption("--as-users-do", action="store_true", help="compile with all optimizations")


def pytest_configure(config):
    _share_programs(config)
    if not config.getoption("--as-users-do"):
        if jax.__version_info__[:2] == (0, 10):  # Later compilers end at a flag they do not know.
            _add_flag("xla_cpu_use_fusion_emitters", "false")
        _set("jax_disable_most_optimizations", True)


@pytest.hookimpl(tryfirst=True)  # Before the slow tests are left out.
def pytest_collection_modifyitems(items):
    """`one_in(n)` takes the cases whose places add up to a multiple of n: every value comes up."""
    values = collections.defaultdict(list)
    for item in items:
        one_in = item.get_closest_marker("one_in")
        if one_in is None:
            continue
        test = item.nodeid.split("[")[0]
        places = [_place(values[test, name], x) for name, x in item.callspec.params.items()]
        if sum(places) % one_in.args[0]:
            item.add_marker(pytest.mark.slow)


def _place(values, value):
    """Where a parameter's value is in its list; arrays cannot be compared, so by identity."""
    if not any(other is value for other in values):
        values.append(value)
    return next(i for i, other in enumerate(values) if other is value)


# What options of jax are set to that refuse nothing, or change nothing.
_OFF = (False, "standard", "allow")


def pytest_itemcollected(item):
    """`not_under(*options)` skips a test where one of these options of jax is on."""
    for marker in item.iter_markers("not_under"):
        if on := [name for name in marker.args if getattr(jax.config, name) not in _OFF]:
            item.add_marker(pytest.mark.skip(reason=f"not under {' and '.join(on)}"))


@pytest.hookimpl(tryfirst=True)  # Before the fixtures compile.
def pytest_runtest_setup(item):
    """Programs in memory were compiled for the tests before."""
    is_fast = not (item.config.getoption("--as-users-do") or item.get_closest_marker("optimized"))
    if jax.config.read("jax_disable_most_optimizations") != is_fast:
        jax.clear_caches()
        _set("jax_disable_most_optimizations", is_fast)


def _set(name, value):
    """Sets an option of jax here and in subprocesses."""
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)


def _share_programs(config):
    """Workers, subprocesses and the next run share compiled programs; `make clean` forgets them.

    jax finds a program by its text, the compiler's version and flags, and the machine.
    """
    if not config.pluginmanager.hasplugin("cacheprovider"):
        return
    _set("jax_compilation_cache_dir", str(config.cache.mkdir("compiled")))
    _set("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(autouse=True)
def _forget_traces():
    """`chex.assert_max_traces` counts over all tests with the same source."""
    chex.clear_trace_counter()


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Each program in memory takes over a megabyte, and slows down the compiling of others."""
    yield
    jax.clear_caches()
