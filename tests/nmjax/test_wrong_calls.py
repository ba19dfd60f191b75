"""Wrong arguments, at every door: each ends in an error of nmjax that says what it wants."""

import linecache
import tempfile
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax

ROOT = str(Path(nmjax.__file__).parent)
KEY = jax.random.key(0)
PARAMS = {
    "a": {"kernel": jax.random.normal(KEY, (8, 4)), "bias": jnp.ones(4)},
    "b": {"kernel": jnp.cos(jnp.arange(32.0)).reshape(8, 4)},
}
W, X = PARAMS["b"]["kernel"], jnp.ones((3, 8))
PLAN = nmjax.make_plan(PARAMS, "2:4")
BLOCKS = nmjax.make_plan(PARAMS, "1x2@0.5")
MASKS, BLOCK_MASKS = nmjax.compute_masks(PARAMS, PLAN), nmjax.compute_masks(PARAMS, BLOCKS)
MASK = MASKS["b/kernel"]
SPARSE = nmjax.prune(PARAMS, PLAN)
PACKED = nmjax.pack(SPARSE, PLAN)
SHAPE = jax.ShapeDtypeStruct(W.shape, W.dtype)
KEY_SHAPE = {"key": jax.eval_shape(lambda: KEY)}
RAMP = nmjax.linear_ramp(0, 9)
CHANNELS = nmjax.Channels((("a/kernel", -1),), (("a/bias", -1),))
NAN, INF = float("nan"), float("inf")
NO_ARRAYS = ["text", None, {}, [], len, PLAN, [[1.0], [2.0, 3.0]]]


def forward(params, x):
    return x @ params["a"]["kernel"] + params["a"]["bias"][None] + x @ params["b"]["kernel"]


def saved(tree):
    with tempfile.TemporaryDirectory() as folder:
        nmjax.save_packed(f"{folder}/x.safetensors", tree)


def changed(leaf):
    return {**PARAMS, "b": {"kernel": leaf}}


def every_mask(value):
    return dict.fromkeys(MASKS, value)


WRONG = {
    "plan": ["2:4", {}, [], PARAMS, len, 3, nmjax.NM(2, 4), nmjax.Plan, W, PLAN["b/kernel"]],
    "params": [
        *("2:4", None, [], PLAN, len, 3, {1, 2}, b"x", PACKED, {"params": PARAMS}, PARAMS["a"]),
        *map(changed, ["text", len, None, [[1.0]], (8, 4), jax.random.key(1), W.astype(int), W.T]),
        {**PARAMS, 1: W},
    ],
    # Functions that compute need values; plans need only shapes.
    "shapes": [jax.eval_shape(lambda: PARAMS), changed(jax.ShapeDtypeStruct((8, 4), float))],
    "tree": ["2:4", None, [], len, 3, {**PARAMS, 1: W}],
    "masks": [
        *("text", [], 3, W, len, PARAMS, PLAN, {}, {"a": MASKS}),
        *map(every_mask, [None, "text", [True], jax.ShapeDtypeStruct(MASK.shape, bool), W, MASK.T]),
    ],
    "array": [*NO_ARRAYS, SHAPE, W.astype(int), W > 0, W.astype(complex), KEY],
    "input": [*NO_ARRAYS, jax.ShapeDtypeStruct(X.shape, float), KEY, jnp.ones((3, 8), int)],
    "integer": ["2", None, 2.5, [2], True, 0, -1, NAN, len, "４"],
    "sparsity": ["0.5", None, [0.5], True, -0.1, 1.0, NAN, 50],
    "axis": ["x", None, 1.0, 5, (0, 0), (), True, NAN, {}, len],
    "pattern": [
        *(None, 2, (2, 4), "", "２:４", "2:4\n", "\n2:4", "1x２@0.5", "1x2@0.5\n", "1x2@0.５"),
        *("two:four", ["2:4"], {}, nmjax.NM, PLAN, "5:4", "0:4", "1x0@0.5", "1x2@1.5", b"2:4"),
        *(PARAMS, "2:" + "4" * 5000, "1x2@nan"),
    ],
    "lambda": [
        "1",
        NAN,
        INF,
        [1.0],
        {},
        True,
        1j,
        PLAN,
        np.ones(2),
        jax.ShapeDtypeStruct((), float),
        np.float32("nan"),
    ],
    "rules": [3, [3], [None], "(", "nothing", {"a": "2:4"}, len, PLAN],
    "pattern rules": ["a", ["a"], {3: "2:4"}, {"(": "2:4"}, {"nothing": "2:4"}, {"a": "x"}, PLAN],
    "axes rules": ["a", -2, {"kernel": "x"}, {"kernel": None}, {"kernel": 5}, {"kernel": ()}],
    "function": ["text", None, 3, {}, [], PLAN],
    "score": ["l1", None, 3, lambda w: w.sum(), lambda w: None, lambda w: "x"],
    "block score": ["x", None, 3, lambda b: b, lambda b: None, lambda b: "x"],
    "choice": ["x", None, [], True, 3],
    "state": [None, {}, MASKS, PARAMS, (), PLAN, "text"],
    # The number of the step, of a refresh.
    "count": ["x", None, KEY, [1], np.ones(2), 1j, True, jax.ShapeDtypeStruct((), int)],
    "step": ["x", None, 0.5, NAN, -1, True, [1]],
    "time": ["x", None, [1], NAN, INF, -1, {}, len, True],
    "channels": ["x", None, {}, [], ("a/kernel", -1), PARAMS],
    "groups": ["x", None, {}, ["x"], CHANNELS, 3],
    "order": ["x", None, [0], {}, [0.5] * 4, [0, 0, 1, 2]],
    "leaf axes": ["x", None, 3, {}, ("a/kernel", -1), ((1, 2),)],
    "inputs": [X, "x", None, (3, 8), {"x": X}, (), 3],
    "packed tree": [jax.eval_shape(lambda: PACKED)],
    "nothing to save": [None, {}, [None], 3, jax.eval_shape(lambda: PACKED), KEY_SHAPE],
    "packed": [W, PACKED, jax.eval_shape(lambda: PACKED["b"]["kernel"]), None, "text", PLAN],
}


def update(updates, params, masks=None):
    tx = nmjax.add_sparse_refined(PLAN)
    return tx.update(updates, tx.init(params), params, masks=masks)


def scored(pattern, score):
    return nmjax.compute_masks(PARAMS, nmjax.make_plan(PARAMS, pattern, score=score))


def with_masks(masks):
    return nmjax.one_shot(PLAN, masks=masks).init(PARAMS, KEY)


ONE_SHOT, SUBP = nmjax.one_shot(PLAN, at_step=2), nmjax.soft_uniform_blocks(BLOCKS, RAMP)
TAKEN, SOFT = ONE_SHOT.init(PARAMS, KEY), SUBP.init(PARAMS, KEY)
LAYER = PACKED["b"]["kernel"]
APPLY = {"compute_masks": PARAMS, "sparsify": PARAMS, "prune": PARAMS, "check_sharding": PARAMS}
MADE_SPARSE = {"pack": SPARSE, "check_sparse": SPARSE}
TWO_MASKS = ["sad", "total_sad", "flip_rate"]
RAMPS = ["cubic_ramp", "linear_ramp", "cosine_ramp"]

# A function, right arguments, and the kinds of wrong ones that take the place of each.
DOORS = [
    *(
        (getattr(nmjax, n), [p, PLAN], {0: "params", 1: "plan"})
        for n, p in {**APPLY, **MADE_SPARSE}.items()
    ),
    *((getattr(nmjax, n), [PARAMS, PLAN, MASKS], {2: "masks"}) for n in ("prune", "pack")),
    (nmjax.sparsify, [PARAMS, PLAN], {"masks": "masks", "lambda_w": "lambda"}),
    (nmjax.add_sparse_refined, [PLAN, 0.1], {0: "plan", 1: "lambda"}),
    (update, [PARAMS, PARAMS, MASKS], {1: "params", 2: "masks"}),
    (nmjax.parse_pattern, ["2:4"], {0: "pattern"}),
    (nmjax.make_plan, [PARAMS, "2:4"], {0: "tree", 1: "pattern", "rules": "pattern rules"}),
    (nmjax.make_plan, [PARAMS, "2:4"], {"exclude": "rules", "include": "rules"}),
    (nmjax.make_plan, [PARAMS, "2:4"], {"on_unknown": "choice", "on_indivisible": "choice"}),
    (nmjax.make_plan, [PARAMS, "2:4"], {"axes": "axes rules"}),
    (
        lambda f, inputs: nmjax.make_plan(PARAMS, "2:4", forward=f, inputs=inputs),
        [forward, (X,)],
        {0: "function", 1: "inputs"},
    ),
    (scored, ["2:4", nmjax.magnitude], {1: "score"}),
    (scored, ["1x2@0.5", nmjax.magnitude], {1: "score"}),
    (nmjax.check_axes, [PLAN, forward, PARAMS, X], {0: "plan", 1: "function", 2: "tree"}),
    (nmjax.cost, [forward, PARAMS, X], {0: "function", "plan": "plan"}),
    (nmjax.find_channels, [forward, PARAMS, X], {0: "function", 1: "tree"}),
    *((getattr(nmjax, n), [MASKS, MASKS], {0: "masks", 1: "masks"}) for n in TWO_MASKS),
    (nmjax.density, [MASKS], {0: "flat masks"}),
    (nmjax.total_density, [MASKS], {0: "flat masks"}),
    (nmjax.blocks_per_row, [BLOCK_MASKS, BLOCKS], {0: "masks", 1: "plan"}),
    (nmjax.row_balance, [BLOCK_MASKS, BLOCKS], {0: "masks", 1: "plan"}),
    (nmjax.blocks_regrown, [BLOCK_MASKS, BLOCK_MASKS, BLOCKS], {0: "masks", 1: "masks", 2: "plan"}),
    (nmjax.straight_through, [PLAN], {0: "plan", "lambda_w": "lambda"}),
    (nmjax.one_shot, [PLAN], {0: "plan", "at_step": "step"}),
    (with_masks, [MASKS], {0: "masks"}),
    (nmjax.soft_uniform_blocks, [BLOCKS, RAMP], {0: "plan", 1: "function", "variant": "choice"}),
    (nmjax.soft_uniform_blocks, [BLOCKS, RAMP], {"temperature": "time", "soft": "text"}),
    (ONE_SHOT.init, [PARAMS, KEY], {0: "params"}),
    (ONE_SHOT.refresh, [TAKEN, PARAMS, 3], {0: "state", 1: "params", 2: "count"}),
    (ONE_SHOT.apply, [PARAMS, TAKEN], {0: "params", 1: "state"}),
    (ONE_SHOT.export, [SPARSE, TAKEN], {0: "params", 1: "state"}),
    (SUBP.init, [PARAMS, KEY], {0: "params"}),
    (SUBP.refresh, [SOFT, PARAMS, 3], {0: "state", 1: "params", 2: "count"}),
    (SUBP.apply, [PARAMS, SOFT], {0: "params", 1: "state"}),
    (SUBP.export, [nmjax.prune(PARAMS, BLOCKS), SOFT], {0: "params", 1: "state"}),
    *((getattr(nmjax, n), [0, 9], {0: "time", 1: "time"}) for n in RAMPS),
    (
        lambda begin, rate: nmjax.exponential_ramp(begin, 9, rate=rate),
        [0, 1],
        {0: "time", 1: "time"},
    ),
    (nmjax.NM, [1, 4], {0: "integer", 1: "integer", 2: "choice"}),
    (nmjax.Block1xN, [2, 0.5], {0: "integer", 1: "sparsity", 2: "text"}),
    (nmjax.magnitude, [W], {0: "no array"}),
    (nmjax.nm_mask, [W, 1, 4, -2], {0: "array", 1: "integer", 2: "integer", 3: "axis"}),
    (nmjax.nm_mask, [W, 1, 4], {"score": "score"}),
    (nmjax.block_mask, [W, 2, 0.5], {0: "array", 1: "integer", 2: "sparsity", 3: "block score"}),
    (nmjax.block_mask, [W, 2, 0.5], {"reduction_axes": "axis", "output_axes": "axis"}),
    (nmjax.transposable_mask, [W, 1, 4], {0: "array", 1: "integer", 2: "integer"}),
    (nmjax.transposable_mask, [W, 1, 4, (-2, -1)], {3: "axis", "score": "score"}),
    (nmjax.prune_ste, [W, MASK], {0: "array", 1: "no array"}),
    (nmjax.prune_sr_ste, [W, MASK, 0.1], {0: "array", 1: "no array", 2: "lambda"}),
    (nmjax.Channels, [(("a/kernel", -1),)], {0: "leaf axes", 1: "leaf axes"}),
    (nmjax.l1_order, [PARAMS, CHANNELS], {0: "tree", 1: "channels"}),
    (nmjax.permute_channels, [PARAMS, CHANNELS, [3, 2, 1, 0]], {1: "channels", 2: "order"}),
    (nmjax.sort_channels, [PARAMS, [CHANNELS]], {0: "tree", 1: "groups"}),
    (nmjax.unpack_slow, [PACKED], {0: "packed tree", "rows": "integer"}),
    (nmjax.unpack, [PACKED], {0: "packed tree"}),
    *((getattr(nmjax, n), [PARAMS, PLAN], {0: "shapes"}) for n in ("compute_masks", "sparsify")),
    *((getattr(nmjax, n), [SPARSE, PLAN], {0: "shapes"}) for n in MADE_SPARSE),
    (nmjax.prune, [PARAMS, PLAN, MASKS], {0: "shapes"}),
    (nmjax.straight_through(PLAN).refresh, [(), PARAMS, 3], {2: "count"}),
    (nmjax.straight_through(PLAN).apply, [PARAMS, ()], {0: "shapes"}),
    (saved, [PACKED], {0: "nothing to save"}),
    (
        nmjax.packed_matmul,
        [X, LAYER],
        {0: "input", 1: "packed", 2: "bias", "implementation": "name"},
    ),
]
WRONG |= {
    # Masks of any names and shapes have a density.
    "flat masks": [*WRONG["masks"][:7], *WRONG["masks"][8:-1]],
    "no array": [wrong for wrong in NO_ARRAYS if wrong != []],
    "text": ["x", None, 3, []],
    "name": ["x", 3],
    "bias": ["text", len, KEY, jax.random.split(KEY, 4), jax.ShapeDtypeStruct((4,), float), W],
}
PLACES = [(door, place) for door in DOORS for place in door[2]]


def call_with(function, right, place, wrong):
    if isinstance(place, str):
        return function(*right, **{place: wrong})
    return function(*right[:place], wrong, *right[place + 1 :])


def raised_by_nmjax(error):
    """Whether the traceback ends at a `raise` in the library, not at an operation that failed."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    statement = linecache.getline(last.filename, last.lineno).strip()
    return last.filename.startswith(ROOT) and statement.startswith("raise")


@pytest.mark.parametrize("door", DOORS)
def test_right_arguments_pass(door):
    function, right, _ = door
    if function not in (ONE_SHOT.export, SUBP.export):
        function(*right)


@pytest.mark.parametrize(("door", "place"), PLACES)
def test_wrong_arguments_are_named(door, place):
    function, right, kinds = door
    for wrong in WRONG[kinds[place]]:
        with pytest.raises((TypeError, ValueError)) as caught:
            call_with(function, right, place, wrong)
        assert raised_by_nmjax(caught.value), f"{wrong!r}: {caught.value!r}"
        assert len(str(caught.value)) > 25, f"{wrong!r}: {caught.value!r}"


# Arguments that changed places


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (lambda: nmjax.make_plan("2:4", PARAMS), "swap the two arguments"),
        (lambda: nmjax.make_plan(PARAMS, PARAMS), "got dict"),
        (lambda: nmjax.cost(PLAN, PARAMS), r"cost\(forward, params, x, plan=plan\)"),
        (lambda: nmjax.save_packed(PACKED, "f.safetensors"), r"save_packed\(path, packed\)"),
        (lambda: nmjax.packed_matmul(LAYER, X), r"packed_matmul\(x, packed\)"),
    ],
)
def test_swapped_arguments_are_named_without_weights(call, advice):
    with pytest.raises(TypeError, match=advice) as caught:
        call()
    assert "Array(" not in str(caught.value)


@pytest.mark.parametrize(
    ("swapped", "has_note"),
    [(lambda x, p: x @ p["a"]["kernel"], True), (lambda params, x: x["a"] @ params, False)],
)
def test_errors_of_a_forward_pass_say_what_it_takes(swapped, has_note):
    with pytest.raises(TypeError) as caught:
        nmjax.make_plan(PARAMS, "2:4", forward=swapped, inputs=(X,))
    notes = "".join(getattr(caught.value, "__notes__", []))
    assert ("forward is called as forward(params, *inputs)" in notes) == has_note
