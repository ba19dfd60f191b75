"""google-tunix's decoders: einsum kernels with the heads on axes of their own."""

import jax.numpy as jnp
import pytest
from flax import nnx

from tests.nmjax.real_models.agreement import Model, check, from_shapes

pytest.importorskip("tunix")
pytestmark = pytest.mark.slow

TOKENS = 4
SIZES = {
    "num_layers": 2,
    "embed_dim": 16,
    "hidden_dim": 24,
    "num_heads": 4,
    "head_dim": 4,
    "num_kv_heads": 2,
}


def model_of(module):
    """The model of an NNX decoder: from tokens to logits, with a causal mask."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def forward(params, tokens):
        mask = jnp.tri(TOKENS, dtype=bool)[None]
        return nnx.merge(graph, params, rest)(tokens, jnp.arange(TOKENS)[None], None, mask)[0]

    return Model(forward, from_shapes(nnx.to_pure_dict(params)), (jnp.array([[33, 36, 37, 39]]),))


@pytest.mark.parametrize("remat", ["NONE", "BLOCK"])
@pytest.mark.parametrize("tying", [True, False])
def test_llama(tying, remat):
    from tunix.models.llama3 import model as llama

    config = llama.ModelConfig(
        **SIZES,
        vocab_size=40,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=tying,
        remat_config=llama.RematConfig[remat],
    )
    made = model_of(llama.Llama3(config, rngs=nnx.Rngs(0)))
    check(made, tied=("embedder/input_embedding",) if tying else ())


def test_qwen2():
    from tunix.models.qwen2 import model as qwen

    config = qwen.ModelConfig(**SIZES, vocab_size=40, rope_theta=10_000, norm_eps=1e-5)
    check(model_of(qwen.Qwen2(config, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize("experts", [None, 6])
def test_qwen3(experts):
    from tunix.models.qwen3 import model as qwen

    config = qwen.ModelConfig(
        **SIZES,
        vocab_size=40,
        rope_theta=10_000,
        norm_eps=1e-5,
        num_experts=experts,
        num_experts_per_tok=experts and 3,
    )
    made = model_of(qwen.Qwen3(config, rngs=nnx.Rngs(0)))
    check(made, added=[f"layers/{i}/mlp/down_proj" for i in range(2)] if experts else ())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_gemma(kv_heads):
    """Queries, keys, and values share a kernel if they have as many heads."""
    from tunix.models.gemma import model as gemma

    config = gemma.ModelConfig(
        **{**SIZES, "num_kv_heads": kv_heads},
        num_embed=40,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=False,
        attention_types=[gemma.AttentionType.GLOBAL, gemma.AttentionType.LOCAL_SLIDING],
        sliding_window_size=8,
    )
    check(model_of(gemma.Gemma(config, rngs=nnx.Rngs(0))), tied=("embedder/input_embedding",))


def test_gemma3():
    from tunix.models.gemma3 import model as gemma

    config = gemma.ModelConfig(
        **SIZES, num_embed=40, sliding_window_size=8, param_dtype=jnp.float32
    )
    check(model_of(gemma.Gemma3(config, rngs=nnx.Rngs(0))), tied=("embedder/input_embedding",))
