"""A small regression trained by nmjax, and again in NumPy, so that the two can be compared.

What a method does is written a second time by its test, in NumPy and float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nmjax

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 16))
# Inputs count less and less, so that training changes which weights are large.
Y = X * np.linspace(1, 0.1, 16) @ RNG.normal(size=(16, 4))
W = 0.3 * RNG.normal(size=(16, 4))
PARAMS = {"kernel": jnp.asarray(W, jnp.float32)}
STEPS = 24


def plan_of(pattern):
    return nmjax.make_plan(PARAMS, pattern)


def follow_nothing(state, opt_state):
    del opt_state
    return state


def train(sparsifier, tx, *, steps=STEPS, follow=follow_nothing, refresh_every=1, extra=None):
    """The weights before each step and after the last, and the last states."""
    x, y = jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32)

    def loss_fn(params, state):
        return 0.5 * jnp.sum((x @ sparsifier.apply(params, state)["kernel"] - y) ** 2) / len(X)

    def body(carry, step):
        params, state, opt_state = carry
        state = jax.lax.cond(
            step % refresh_every == 0,
            lambda: sparsifier.refresh(state, params, step),
            lambda: state,
        )
        grads = jax.grad(loss_fn)(params, state)
        given = {} if extra is None else extra(state)
        updates, opt_state = tx.update(grads, opt_state, params, **given)
        state = follow(state, opt_state)
        return (optax.apply_updates(params, updates), state, opt_state), params["kernel"]

    @jax.jit
    def run(params):
        start = params, sparsifier.init(params, jax.random.key(0)), tx.init(params)
        return jax.lax.scan(body, start, jnp.arange(steps))

    (params, state, opt_state), before = run(PARAMS)
    return np.append(before, params["kernel"][None], axis=0), state, opt_state


def gradient(sparse):
    """The gradient of the loss with respect to the weights of the forward pass."""
    return X.T @ (X @ sparse - Y) / len(X)


def sgd(rate, momentum=0.9):
    """A step of momentum, as optax.sgd takes it."""
    trace = 0.0

    def step(w, g):
        nonlocal trace
        trace = g + momentum * trace
        return w - rate * trace

    return step


def average(old, new, decay):
    return decay * old + (1 - decay) * new


def keep(w, n, m, axis=0):
    """The n largest of every m weights along an axis, 1 or 0; ties go to the lower index."""
    moved = np.moveaxis(np.abs(w), axis, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, m)
    rank = np.argsort(np.argsort(-groups, axis=-1, kind="stable"), axis=-1)
    return np.moveaxis((rank < n).reshape(moved.shape), -1, axis).astype(float)


def replay(gradient_at, step, *, steps=STEPS, w=W):
    """The weights before each step and after the last, from `(w, t) -> g` and `(w, g) -> w`."""
    weights = [w]
    for t in range(steps):
        w = step(w, gradient_at(w, t))
        weights.append(w)
    return np.array(weights)
