"""Layers with correlated inputs, and the methods' formulas in NumPy, in float64."""

import numpy as np


def layer(inputs, outputs, rows=2048, seed=0):
    """Calibration inputs, other inputs, and weights, with strong correlations and uneven scales."""
    rng = np.random.RandomState(seed)
    shared = rng.randn(inputs // 2, inputs) / np.sqrt(inputs // 2)
    scales = np.exp(0.8 * rng.randn(inputs))
    calibration, fresh = (
        (rng.randn(rows, inputs) + 3 * rng.randn(rows, inputs // 2) @ shared) * scales
        for _ in range(2)
    )
    return calibration, fresh, rng.randn(inputs, outputs)


def error(x, w, pruned):
    """|x (w' - w)|^2 / |x w|^2."""
    difference = x @ (np.asarray(pruned, np.float64) - w)
    return (difference**2).sum() / ((x @ w) ** 2).sum()


def top(scores, n):
    """The mask of the n highest scores of a group (m, outputs); ties go to the lower input."""
    rank = np.argsort(np.argsort(-scores, axis=0, kind="stable"), axis=0)
    return rank < n


def in_groups(scores, n, m):
    return np.concatenate([top(group, n) for group in scores.reshape(-1, m, scores.shape[1])])


def wanda(w, gram, n, m):
    return w * in_groups(abs(w) * np.sqrt(np.diag(gram))[:, None], n, m)


def sparse_gpt(w, gram, n, m):
    """One input after the other, with the inverse written out."""
    w = w.copy()
    h = gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    mask = np.zeros(w.shape, bool)
    for i in range(len(w)):
        if i % m == 0:
            mask[i : i + m] = top(w[i : i + m] ** 2 / np.diag(u)[i : i + m, None] ** 2, n)
        e = np.where(mask[i], 0, w[i]) / u[i, i]
        w[i:] -= u[i, i:, None] * e
    return w * mask


def admm(w, gram, n, m, steps=20, pruning_steps=15):
    """With the gradual mask of the paper's code."""
    scale = np.sqrt(np.diag(gram))[:, None]
    k = gram / scale / scale.T + 0.1 * np.eye(len(w))
    inverse = np.linalg.inv(k + np.eye(len(w)))
    target = k @ (w * scale)
    v, u = w * scale, np.zeros_like(w)
    for t in range(steps):
        if t < pruning_steps:
            size = abs(v + u)
            mask = in_groups(size, n, m)
            dropped = int(np.round((~mask).sum() * (1 - (t + 1) / pruning_steps) ** 3))
            others = np.where(mask, -1, size).ravel()
            mask.ravel()[np.argsort(-others, kind="stable")[:dropped]] = True
        z = (v + u) * mask
        u += v - z
        v = inverse @ (target + z - u)
    return (v + u) * mask / scale


def least_squares(w, gram, mask):
    h = gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    fitted = np.zeros_like(w)
    for o in range(w.shape[1]):
        k = mask[:, o]
        fitted[k, o] = np.linalg.solve(h[np.ix_(k, k)], (h @ w[:, o])[k])
    return fitted
