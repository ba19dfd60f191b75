"""A decoder of seven billion parameters is planned from its shapes alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import nmjax

LAYERS, WIDTH, HEADS, HIDDEN, VOCABULARY = 32, 4096, 32, 11008, 32000


class Einsum(nn.Module):
    """A product with a kernel named `w`."""

    spec: str
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        return jnp.einsum(self.spec, x, self.param("w", nn.initializers.normal(), self.shape))


class Decoder(nn.Module):
    """A decoder in the manner of Llama, with its layers one after the other."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH, name="embedder")(tokens)
        for i in range(LAYERS):
            x = Layer(name=f"layer_{i}")(x)
        x = nn.RMSNorm(name="final_norm")(x)
        return Einsum("BTD,DV->BTV", (WIDTH, VOCABULARY), name="lm_head")(x)


class Layer(nn.Module):
    """Attention and a gated pair of products."""

    @nn.compact
    def __call__(self, x):
        head, length = WIDTH // HEADS, x.shape[1]
        y = nn.RMSNorm(name="attention_norm")(x)
        q, k, v = (
            Einsum("BTD,DNH->BTNH", (WIDTH, HEADS, head), name=f"{name}_proj")(y) for name in "qkv"
        )
        logits = jnp.einsum("BTNH,BSNH->BNTS", q, k) / head**0.5
        logits = jnp.where(jnp.tri(length, dtype=bool), logits, -1e9)
        y = jnp.einsum("BNTS,BSNH->BTNH", nn.softmax(logits), v)
        x = x + Einsum("BTNH,NHD->BTD", (HEADS, head, WIDTH), name="o_proj")(y)
        y = nn.RMSNorm(name="mlp_norm")(x)
        gate, up = (
            nn.Dense(HIDDEN, use_bias=False, name=name)(y) for name in ("gate_proj", "up_proj")
        )
        return x + nn.Dense(WIDTH, use_bias=False, name="down_proj")(nn.silu(gate) * up)


AXES = {
    "q_proj": (-3,),
    "k_proj": (-3,),
    "v_proj": (-3,),
    "o_proj": (-3, -2),
    "gate_proj": (-2,),
    "up_proj": (-2,),
    "down_proj": (-2,),
    "lm_head": (-2,),
}
TOKENS = jax.ShapeDtypeStruct((1, 2048), jnp.int32)


@pytest.fixture(scope="module")
def params():
    return jax.eval_shape(Decoder().init, jax.random.key(0), TOKENS)["params"]


def test_axes_are_read_off_the_program(params):
    def forward(params, tokens):
        return Decoder().apply({"params": params}, tokens)

    plan = nmjax.make_plan(params, "2:4", forward=forward, inputs=(TOKENS,))
    assert len(plan) == 7 * LAYERS + 1
    assert sum(leaf.weights for leaf in plan.values()) == 6_607_077_376
    for name, leaf in plan.items():
        assert leaf.reduction_axes == AXES[name.split("/")[-2]], name


def test_without_the_program_the_heads_are_unknown(params):
    with pytest.raises(ValueError, match=r"unknown axes(.|\n)*layer_0/q_proj/w"):
        nmjax.make_plan(params, "2:4")
