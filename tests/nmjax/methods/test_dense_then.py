"""Dense, then STE or SR-STE, against NumPy."""

import numpy as np
import optax
import pytest

from nmjax import methods
from tests.nmjax.methods.replay import PARAMS, gradient, keep, plan_of, replay, sgd, train

SWITCH = 9


def test_training_is_that_of_the_formula():
    def gradient_at(w, t):
        kept = keep(w, 1, 4) if t >= SWITCH else np.ones_like(w)
        return gradient(w * kept) + 0.1 * (1 - kept) * w

    sparsifier = methods.dense_then(plan_of("1:4"), SWITCH, lambda_w=0.1)
    weights, state, _ = train(sparsifier, optax.sgd(0.05, momentum=0.9))
    np.testing.assert_allclose(weights, replay(gradient_at, sgd(0.05)), atol=1e-5)
    with pytest.raises(ValueError, match="at or after step 9, and the last was at step 8"):
        sparsifier.export(PARAMS, sparsifier.refresh(state, PARAMS, 8))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="at_step"):
        methods.dense_then(plan_of("1:4"), -1)
    with pytest.raises(TypeError, match="at_step must be a Python integer"):
        methods.dense_then(plan_of("1:4"), 1.5)
