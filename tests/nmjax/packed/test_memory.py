"""Memory of packing and unpacking, as XLA plans it: some bytes for each weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax

# Groups of all sizes, with positions and with bitmasks, and the bytes for each weight that packing
# and unpacking may take: measured, and rounded up. Counters and places of 4 bytes take most of
# them, so the dtype changes only the unpacking of long bitmasks.
BYTES = {
    "2:4": (4, 1),
    "4:8": (4, 2),
    "1:16": (4, 1),
    "16:32": (4, 2),
    "32:64": (10, {"float32": 5, "bfloat16": 9}),
    "5:64": (8, 25),
    "128:256": (16, {"float32": 5, "bfloat16": 9}),
    "1:300": (11, 1),
    "60:1000": (11, 31),
}


@pytest.mark.optimized
@pytest.mark.parametrize("pattern", BYTES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_n(pattern, dtype):
    m = int(pattern.split(":")[1])
    w = jax.ShapeDtypeStruct((max(1024 // m, 2) * m, 64), dtype)
    plan = nmjax.make_plan({"kernel": w}, pattern, axes={"kernel": -2})
    masks = {"kernel": jax.ShapeDtypeStruct(w.shape, bool)}
    packing = jax.jit(lambda w, masks: nmjax.pack({"kernel": w}, plan, masks))
    packed = jax.eval_shape(packing, w, masks)
    calls = ((packing, (w, masks)), (jax.jit(nmjax.unpack), (packed,)))
    for (function, arguments), bound in zip(calls, BYTES[pattern], strict=True):
        most = bound[dtype] if isinstance(bound, dict) else bound
        planned = function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
        assert planned <= most * w.size, f"{planned / w.size:.1f} bytes for each weight"


@pytest.mark.parametrize("pattern", ["1500:3000", "50:3000", "1:3000", "2999:3000"])
def test_groups_as_large_as_the_weight(pattern):
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(6000, 3)), jnp.float32)}
    plan = nmjax.make_plan(params, pattern, axes={"kernel": -2})
    pruned = nmjax.prune(params, plan)
    packed = nmjax.pack(pruned, plan)
    np.testing.assert_array_equal(nmjax.unpack(packed)["kernel"], pruned["kernel"])
    jax.tree.map(np.asarray, packed["kernel"]).check()
    n = int(pattern.split(":")[0])
    places = (np.asarray(pruned["kernel"]).T.reshape(3, 2, 3000) != 0).nonzero()[-1]
    np.testing.assert_array_equal(
        np.asarray(packed["kernel"].positions()).transpose(2, 0, 1).ravel(), places
    )
    assert packed["kernel"].values.shape == (2, n, 3)
