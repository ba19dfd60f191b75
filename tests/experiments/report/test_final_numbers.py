"""The bound that unequal rows set on the speed-up of threads, by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.report.final_numbers import speed_up_bound
from experiments.report.numbers import balance

kept_blocks = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any).map(np.array)


@given(kept_blocks, st.integers(1, 16))
def test_the_bound_is_that_of_the_slowest_thread(kept, threads):
    """Rows are dealt out one after the other; the first threads get one more."""
    several, more = divmod(len(kept), min(threads, len(kept)))
    rows, work = iter(kept.tolist()), []
    for thread in range(min(threads, len(kept))):
        work.append(sum(next(rows) for _ in range(several + (thread < more))))
    assert speed_up_bound(kept, threads) == pytest.approx(sum(kept) / max(work))
    assert 1 <= speed_up_bound(kept, threads) <= threads


@given(st.integers(1, 9), st.integers(1, 12))
def test_equal_rows_are_in_balance_and_reach_as_many_threads_as_divide_them(kept, rows):
    equal = np.full(rows, kept)
    assert balance(equal) == 1
    for threads in range(1, rows + 1):
        if rows % threads == 0:
            assert speed_up_bound(equal, threads) == pytest.approx(threads)
