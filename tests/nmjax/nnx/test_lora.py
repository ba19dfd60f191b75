"""LoRA layers: dense adapters beside a sparse base."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nmjax
import nmjax.nnx
from nmjax.packed.weight import is_packed
from tests.nmjax.nnx.networks import assert_same, normal

X, Y = normal(8, 16), normal(8, 8, seed=2)


class Adapter(nnx.Param):
    """A type of adapter weights that NNX does not know."""


class Adapted(nnx.Module):
    """Both layers of Flax, with adapters of several types."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        settings = {"b_initializer": nnx.initializers.normal(0.1), "rngs": rngs}
        self.linear = nnx.LoRALinear(16, 16, lora_rank=4, **settings)
        base = nnx.Linear(16, 8, rngs=rngs)
        self.wrapped = nnx.LoRA(16, 4, 8, base_module=base, lora_param_type=Adapter, **settings)

    def __call__(self, x):
        return self.wrapped(nnx.tanh(self.linear(x)))


BASES = {"linear/kernel", "wrapped/base_module/kernel"}
ADAPTERS = {f"{layer}/lora_{half}" for layer in ("linear/lora", "wrapped") for half in "ab"}


def test_adapters_stay_dense():
    plan = nmjax.nnx.make_plan(Adapted(), "2:4", inputs=(X,))
    assert set(plan) == BASES
    assert {n for n, reason in plan.dense.items() if reason == "LoRA adapter"} == ADAPTERS
    plan = nmjax.nnx.make_plan(Adapted(), "2:4", inputs=(X,), exclude="linear")
    assert set(plan) == {"wrapped/base_module/kernel"}


@pytest.mark.not_under("jax_numpy_dtype_promotion")
def test_adapters_train_beside_a_sparse_base():
    model = Adapted()
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=(X,))
    nmjax.nnx.prune(model, plan)
    is_adapter = nnx.Any(nnx.LoRAParam, Adapter)
    base = jax.tree.map(jnp.copy, nnx.state(model, nnx.Not(is_adapter)))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=is_adapter)

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            return ((nmjax.nnx.sparsify(model, plan)(X) - Y) ** 2).mean()

        of_adapters = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, is_adapter))
        loss, grads = of_adapters(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert_same(nnx.state(model, nnx.Not(is_adapter)), base, rtol=0)
    packed = nmjax.nnx.pack(model, plan)
    assert is_packed(packed.linear.kernel[...])
    assert is_packed(packed.wrapped.base_module.kernel[...])
    np.testing.assert_allclose(packed(X), model(X), rtol=1e-5, atol=1e-5)


def test_packed_bases_and_adapters_are_saved(tmp_path):
    model = Adapted()
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=(X,))
    nmjax.nnx.prune(model, plan)
    nmjax.nnx.save(tmp_path / "x.safetensors", nmjax.nnx.pack(model, plan))
    loaded = nmjax.nnx.load(tmp_path / "x.safetensors", Adapted(1))
    np.testing.assert_allclose(loaded(X), model(X), rtol=1e-5, atol=1e-5)


def test_a_merged_kernel_is_not_sparse_until_it_is_pruned_again():
    model = Adapted()
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=(X,))
    nmjax.nnx.prune(model, plan)
    masks = nmjax.compute_masks(nnx.state(model, nnx.Param), plan)
    merged, before = nnx.clone(model), model(X)
    for kernel, adapter in (
        (merged.linear.kernel, merged.linear.lora),
        (merged.wrapped.base_module.kernel, merged.wrapped),
    ):
        kernel[...] += adapter.lora_a[...] @ adapter.lora_b[...]
        adapter.lora_b[...] = jnp.zeros_like(adapter.lora_b[...])
    np.testing.assert_allclose(merged(X), before, rtol=1e-4, atol=1e-5)
    # Merging fills the zeros, and that does not stay silent.
    with pytest.raises(ValueError, match="linear/kernel"):
        nmjax.check_sparse(nnx.state(merged, nnx.Param), plan)
    nmjax.nnx.prune(merged, plan, masks)
    nmjax.check_sparse(nnx.state(merged, nnx.Param), plan)
    packed = nmjax.nnx.pack(merged, plan, masks)
    np.testing.assert_array_equal(
        packed.linear.kernel.get_value().unpack() != 0, masks["linear/kernel"]
    )
