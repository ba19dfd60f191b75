"""Sup-tickets and FreeTickets, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nmjax
from nmjax import methods
from tests.nmjax.methods.replay import PARAMS, RNG, gradient, keep, plan_of, replay, sgd, train

RATE, LAMBDA, BEGIN, EVERY, TICKETS = 0.05, 0.1, 6, 5, 3


def regrow(w, kept, drop, n=2, m=4):
    """Group by group, with sorted lists of places."""
    places = [tuple(p) for p in np.argwhere(kept)]
    places.sort(key=lambda p: abs(w[p]))
    dropped = set(places[: int(drop * len(places))])
    new = np.zeros_like(kept)
    for i in range(0, w.shape[0], m):
        for j in range(w.shape[1]):
            group = [(row, j) for row in range(i, i + m)]
            stay = [p for p in group if kept[p] and p not in dropped]
            others = sorted((p for p in group if not kept[p]), key=lambda p: -abs(w[p]))
            again = sorted((p for p in group if p in dropped), key=lambda p: -abs(w[p]))
            for p in (stay + others + again)[:n]:
                new[p] = 1
    return new


class Cycles:
    """The masks of each step, and the tickets."""

    def __init__(self, drop):
        self.drop, self.tickets, self.kept = drop, [], None

    def refresh(self, w, t):
        place = t - BEGIN
        ends = place in (EVERY, 2 * EVERY, 3 * EVERY)
        if ends:
            self.tickets.append(w * (keep(w, 2, 4) if self.drop is None else self.kept))
        if self.drop is None or place < 0:
            self.kept = keep(w, 2, 4)
        elif place == 0:
            self.kept = regrow(w, keep(w, 2, 4), self.drop)
        elif ends and len(self.tickets) < TICKETS:
            self.kept = regrow(w, self.kept, self.drop)

    def gradient_at(self, w, t):
        self.refresh(w, t)
        return gradient(w * self.kept) + LAMBDA * (1 - self.kept) * w


def expected(drop):
    cycles = Cycles(drop)
    end = BEGIN + EVERY * TICKETS
    weights = replay(cycles.gradient_at, sgd(RATE), steps=end)
    cycles.refresh(weights[-1], end)
    return weights, cycles


@pytest.mark.parametrize("drop", [0.5, pytest.param(0.8, marks=pytest.mark.slow), None])
def test_training_is_that_of_the_formula(drop):
    weights, cycles = expected(drop)
    end = BEGIN + EVERY * TICKETS
    tx = optax.sgd(RATE, momentum=0.9)
    for weighting in ("cumulative", "halving"):
        sparsifier = methods.sup_tickets(
            plan_of("2:4"), BEGIN, EVERY, TICKETS, drop=drop, weighting=weighting, lambda_w=LAMBDA
        )
        ours, state, _ = train(sparsifier, tx, steps=end)
        np.testing.assert_allclose(ours, weights, atol=1e-5)
        params = {"kernel": jnp.asarray(ours[-1])}
        with pytest.raises(ValueError, match="averages 3 tickets and has 2: the last one ends in"):
            sparsifier.export(params, state)
        average = cycles.tickets[0]
        for count, ticket in enumerate(cycles.tickets[1:], start=2):
            share = 1 / count if weighting == "cumulative" else 0.5
            average = (1 - share) * average + share * ticket
        state = sparsifier.refresh(state, params, end)
        exported = sparsifier.export(params, state)["kernel"]
        np.testing.assert_allclose(exported, average * keep(average, 2, 4), atol=1e-5)
        nmjax.check_sparse({"kernel": exported}, plan_of("2:4"))


def test_free_tickets_are_those_of_the_formula():
    weights, cycles = expected(0.8)
    end = BEGIN + EVERY * TICKETS
    sparsifier = methods.free_tickets(plan_of("2:4"), BEGIN, EVERY, TICKETS, lambda_w=LAMBDA)
    ours, state, _ = train(sparsifier, optax.sgd(RATE, momentum=0.9), steps=end)
    np.testing.assert_allclose(ours, weights, atol=1e-5)
    params = {"kernel": jnp.asarray(ours[-1])}
    with pytest.raises(ValueError, match="collects 3 tickets, and the last has not ended"):
        methods.tickets_of(params, state)
    exported = sparsifier.export(params, state)
    state = sparsifier.refresh(state, params, end)
    tickets = methods.tickets_of(params, state)
    np.testing.assert_allclose([t["kernel"] for t in tickets], cycles.tickets, atol=1e-5)
    np.testing.assert_array_equal(tickets[-1]["kernel"], exported["kernel"])
    for ticket in tickets:
        nmjax.check_sparse(ticket, plan_of("2:4"))

    x = jnp.asarray(RNG.normal(size=(3, 16)), jnp.float32)
    logits = np.array([np.asarray(x) @ t for t in cycles.tickets])
    softmax = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    predicted = methods.ensemble(lambda params, x: x @ params["kernel"], tickets, x)
    np.testing.assert_allclose(predicted, softmax.mean(axis=0), atol=1e-5)


def test_blocks_are_dropped_whole_and_rows_stay_balanced():
    w = RNG.normal(size=(8, 4))
    params = {"kernel": jnp.asarray(w, jnp.float32)}
    plan = nmjax.make_plan(params, "1x2@0.5")
    before = np.asarray(nmjax.compute_masks(params, plan)["kernel"])
    state = methods.sup_tickets(plan, 0, 3, 1, drop=0.5).init(params, jax.random.key(0))
    after = np.asarray(state.masks["kernel"])

    size = np.abs(w).reshape(8, 2, 2).sum(axis=-1)  # Inputs x rows of blocks.
    kept = before.reshape(8, 2, 2)[..., 0]
    dropped = kept & (size <= np.sort(size[kept])[3])
    assert dropped.sum() == 4
    expected = kept & ~dropped
    for row in range(2):
        others = np.where(kept[:, row], -1, size[:, row])
        expected[np.argsort(-others)[: dropped[:, row].sum()], row] = True
    np.testing.assert_array_equal(after, np.repeat(expected, 2, axis=1))


def test_rates_of_halves():
    rate = methods.ticket_rate(
        optax.linear_schedule(1.0, 0.0, 10), 10, 6, low=0.1, high=0.2, shape="halves"
    )
    found = [float(rate(step)) for step in (0, 5, *range(10, 17))]
    np.testing.assert_allclose(found, [1, 0.5, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.2], rtol=1e-6)


@pytest.mark.parametrize("make", [methods.sup_tickets, methods.free_tickets])
def test_wrong_arguments(make):
    plan = plan_of("2:4")
    with pytest.raises(ValueError, match=r"0 <= drop <= 1; got 1\.5"):
        make(plan, 0, 5, 3, drop=1.5)
    with pytest.raises(ValueError, match="tickets must be at least 1"):
        make(plan, 0, 5, 0)
    with pytest.raises(TypeError, match="begin must be a Python integer"):
        make(plan, 0.5, 5, 3)
    with pytest.raises(TypeError, match="expected a state of type"):
        make(plan, 0, 5, 3).apply(PARAMS, ())


def test_other_wrong_arguments():
    with pytest.raises(ValueError, match="weighting must be"):
        methods.sup_tickets(plan_of("2:4"), 0, 5, 3, weighting="newest")
    with pytest.raises(ValueError, match="shape must be"):
        methods.ticket_rate(0.1, 0, 5, low=0.1, high=0.2, shape="square")
    with pytest.raises(ValueError, match="at least one ticket"):
        methods.ensemble(lambda params: params, [])
