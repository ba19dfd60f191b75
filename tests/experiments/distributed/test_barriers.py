"""Barriers at which processes that failed meet those that did not."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import pytest

from experiments.distributed import barriers
from experiments.distributed.barriers import shared_barrier, wait_for_others

# The names that orbax meets at when a save ends, in order.
WRITTEN, COMMITTED = "async_write_complete.5", "async_commit_complete.5"
START = "ThreadSaveMultiHostValueHolder:set_value_start"
END = "ThreadSaveMultiHostValueHolder:set_value_end"
WHOLE = [WRITTEN, COMMITTED, START, END]


class Coordinator:
    """What `jax.distributed` offers, between threads."""

    def __init__(self, processes):
        self.processes, self.lock = processes, threading.Lock()
        self.values, self.barriers = {}, {}

    def key_value_set(self, key, value):
        with self.lock:
            assert key not in self.values
            self.values[key] = value

    def key_value_dir_get(self, folder):
        with self.lock:
            return [(key, value) for key, value in self.values.items() if key.startswith(folder)]

    def wait_at_barrier(self, name, timeout_ms):
        with self.lock:
            barrier = self.barriers.setdefault(name, threading.Barrier(self.processes))
        barrier.wait(timeout_ms / 1000)


def save_together(fail_before):
    """Saves in one thread a process; each fails before a barrier, or at none. Returns errors."""
    coordinator = Coordinator(len(fail_before))

    def save(process):
        barrier = partial(shared_barrier(coordinator, process), timeout_ms=5000)
        error = None
        try:
            for name in (WRITTEN, COMMITTED):
                if name == fail_before[process]:
                    raise OSError("disk full")
                barrier(key=name)
        except OSError as caught:
            error = str(caught)
        for name in (START, END):  # orbax meets there whatever happened.
            barrier(key=name)
        return error

    with ThreadPoolExecutor(len(fail_before)) as pool:
        return list(pool.map(save, range(len(fail_before))))


@pytest.mark.parametrize(
    ("fail_before", "errors"),
    [
        ([None, None], [None, None]),
        ([None, WRITTEN], ["process 1 could not write its part", "disk full"]),
        ([WRITTEN, None], ["disk full", "process 0 could not write its part"]),
        ([WRITTEN, WRITTEN], ["disk full", "disk full"]),
        # The first process alone commits, and the others wait for it.
        ([COMMITTED, None, None], ["disk full", *["process 0 could not write its part"] * 2]),
        (
            [None, WRITTEN, None, WRITTEN],
            ["process 1 could not write its part", "disk full"] * 2,
        ),
    ],
)
def test_a_save_fails_in_every_process_or_in_none(fail_before, errors):
    assert save_together(fail_before) == errors


def test_a_save_after_another_meets_at_new_barriers():
    coordinator = Coordinator(2)

    def save_twice(process):
        barrier = shared_barrier(coordinator, process)
        for name in [*WHOLE, *WHOLE]:
            barrier(key=name, timeout_ms=5000)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(save_twice, range(2)))
    assert len(coordinator.barriers) == 8


def test_leaving_waits_for_others_only_a_while(monkeypatch):
    waits = []

    class Gone:
        def wait_at_barrier(self, name, timeout_ms):
            waits.append(timeout_ms)
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")

    wait_for_others()  # A process of its own waits for nobody.
    monkeypatch.setattr(barriers, "client", Gone)
    wait_for_others()
    assert waits == [5000]
