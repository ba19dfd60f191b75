"""Files of all variables of NNX modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nmjax
import nmjax.nnx
from nmjax.packed.weight import is_packed
from tests.nmjax.nnx.networks import Call, Network, assert_same, normal, scanned, stack_of_layers

X = normal(5, 16)


def pruned(model, x=X, pattern="2:4"):
    plan = nmjax.nnx.make_plan(model, pattern, inputs=(x,))
    nmjax.nnx.prune(model, plan)
    return model, plan


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("pattern", [None, "2:4", "1x4@0.5"])
def test_all_variables_come_back(path, pattern, implementation):
    model = Network(nnx.Rngs(jax.random.key(3, impl=implementation)))
    model(X)  # Statistics and counts that a fresh module does not have.
    if pattern:
        model = nmjax.nnx.pack(*pruned(model, pattern=pattern))
    nmjax.nnx.save(path, model)
    fresh = Network(nnx.Rngs(7))
    assert nmjax.nnx.load(path, fresh) is fresh
    assert_same(nnx.state(fresh), nnx.state(model), rtol=0)
    assert nnx.graphdef(fresh) == nnx.graphdef(model)
    assert str(jax.random.key_impl(fresh.dropout.rngs.key[...])) == implementation
    assert is_packed(fresh.head.kernel.get_value()) == bool(pattern)
    np.testing.assert_array_equal(fresh(X), model(X))  # The same dropout, too.


def test_modules_of_shapes_alone(path):
    model = nmjax.nnx.pack(*pruned(Network(nnx.Rngs(0))))
    nmjax.nnx.save(path, model)
    loaded = nmjax.nnx.load(path, nnx.eval_shape(lambda: Network(nnx.Rngs(0))))
    np.testing.assert_array_equal(loaded(X), model(X))


def test_dense_variables_return_to_a_packed_module(path):
    model = Network(nnx.Rngs(0))
    nmjax.nnx.save(path, model)
    packed = nmjax.nnx.pack(*pruned(Network(nnx.Rngs(1))))
    nmjax.nnx.load(path, packed)
    assert_same(nnx.state(packed), nnx.state(model), rtol=0)
    np.testing.assert_array_equal(packed(X), model(X))
    again = nmjax.nnx.pack(*pruned(packed))
    assert is_packed(again.head.kernel.get_value())


def test_stacks_and_shared_kernels(path):
    class Tied(nnx.Module):
        def __init__(self, seed):
            rngs = nnx.Rngs(seed)
            self.a, self.b = (nnx.Linear(16, 16, rngs=rngs) for _ in range(2))
            self.b.kernel = self.a.kernel
            self.stack = Call(stack_of_layers(rngs), scanned)

        def __call__(self, x):
            return self.stack(self.b(nnx.tanh(self.a(x))))

    model = nmjax.nnx.pack(*pruned(Tied(0)))
    nmjax.nnx.save(path, model)
    fresh = nmjax.nnx.load(path, Tied(1))
    assert fresh.a.kernel is fresh.b.kernel
    np.testing.assert_array_equal(fresh(X), model(X))


def test_arrays_outside_variables(path):
    class Shifted(nnx.Module):
        def __init__(self, shift):
            self.shift = jnp.full(3, shift)
            self.table = nnx.Variable({"a": jnp.full(2, shift), "b": jnp.arange(2)})

    nmjax.nnx.save(path, Shifted(2.0))
    loaded = nmjax.nnx.load(path, Shifted(0.0))
    assert loaded.shift.tolist() == [2.0] * 3
    assert loaded.table.get_value()["a"].tolist() == [2.0] * 2


def test_others_can_read_the_file(path):
    model = nmjax.nnx.pack(*pruned(Network(nnx.Rngs(0))))
    nmjax.nnx.save(path, model)
    tree = nmjax.load_packed(path)
    np.testing.assert_array_equal(
        tree["head"]["kernel"].unpack(), model.head.kernel.get_value().unpack()
    )
    assert tree["dropout"]["rngs"]["key"] == model.dropout.rngs.key[...]


def test_variables_that_are_no_arrays(path):
    class Counter(nnx.Module):
        def __init__(self):
            self.count = nnx.Variable(0)

    with pytest.raises(TypeError, match=r"count holds a int; make .* nnx.Variable\(jnp.array"):
        nmjax.nnx.save(path, Counter())
    with pytest.raises(TypeError, match="expected an NNX module, got State"):
        nmjax.nnx.save(path, nnx.state(Counter()))
    with pytest.raises(TypeError, match="expected an NNX module, got dict"):
        nmjax.nnx.load(path, {})


def test_files_of_other_modules_change_nothing(path):
    nmjax.nnx.save(path, Network(nnx.Rngs(0)))
    other = Network(nnx.Rngs(1), width=8)
    before = jax.tree.map(jnp.copy, nnx.state(other))
    with pytest.raises(ValueError, match=r"head/kernel: float32\(16, 4\) in the file, float32\(8,"):
        nmjax.nnx.load(path, other)
    assert_same(nnx.state(other), before, rtol=0)
    nmjax.nnx.save(path, nnx.LayerNorm(16, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="bias: not in the module\n  kernel: not in the file"):
        nmjax.nnx.load(path, nnx.Linear(16, 16, use_bias=False, rngs=nnx.Rngs(0)))


def test_packed_kernels_of_layers_that_cannot_use_them(path):
    nmjax.nnx.save(path, nmjax.nnx.pack(*pruned(nnx.Linear(16, 8, rngs=nnx.Rngs(0)))))

    class Other(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.ones((16, 8), jnp.float32))
            self.bias = nnx.Param(jnp.ones(8, jnp.float32))

    other = Other()
    with pytest.raises(TypeError, match="kernel: it is the 'kernel' of Other"):
        nmjax.nnx.load(path, other)
    assert not is_packed(other.kernel.get_value())


def test_keys_of_other_shapes(path):
    """The keys of a stack do not fit the one of a module."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        return nnx.Dropout(0.5, rngs=rngs)

    nmjax.nnx.save(path, nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    stacked = stack(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"rngs/key: random key\(\) in the file, random key\(3,\)"):
        nmjax.nnx.load(path, stacked)
    nmjax.nnx.save(path, stacked)
    assert_same(nnx.state(nmjax.nnx.load(path, stack(nnx.Rngs(1)))), nnx.state(stacked), rtol=0)
