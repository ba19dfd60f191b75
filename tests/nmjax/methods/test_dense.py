"""The dense baseline."""

import nmjax
from tests.nmjax.methods.cases import KEY, PARAMS


def test_dense_changes_nothing():
    sparsifier = nmjax.dense()
    state = sparsifier.refresh(sparsifier.init(PARAMS, KEY), PARAMS, 0)
    assert state == ()
    assert sparsifier.apply(PARAMS, state) is PARAMS
