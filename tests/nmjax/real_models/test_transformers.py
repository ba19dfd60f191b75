"""Hugging Face's Flax models, from transformers' last release that has them."""

import jax
import jax.numpy as jnp
import pytest

from tests.nmjax.real_models.agreement import Model, check, from_shapes, normal

transformers = pytest.importorskip("transformers", "4.57", exc_type=ImportError)
pytestmark = pytest.mark.slow

KEY = jax.random.key(0)
TOKENS = jnp.array([[33, 36, 37, 39]])
# Heads of four features, and as many tokens.
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "vocab_size": 40}
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def model_of(model, init_shapes, *inputs, **kwargs):
    """The model of a Flax model that was made without parameters."""
    # transformers draws random numbers with its own key type.
    params = jax.eval_shape(lambda: model.init_weights(jax.random.PRNGKey(0), *init_shapes))

    def forward(params, *inputs):
        return model(*inputs, params=params, train=False, **kwargs).to_tuple()

    return Model(forward, from_shapes(params), inputs)


def test_gpt2():
    """Its Conv1D keeps its kernel as (out, in)."""
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=8, use_cache=False
    )
    made = model_of(
        transformers.FlaxGPT2LMHeadModel(config, _do_init=False), [TOKENS.shape], TOKENS
    )
    check(made, tied=("transformer/wte/embedding",))


@pytest.mark.parametrize("name", ["GPTNeo", "GPTJ", "Llama", "Mistral", "Gemma", "OPT", "Bloom"])
def test_decoders(name):
    sizes = {**SMALL, "max_position_embeddings": 16, "use_cache": False}
    heads = {"num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24}
    more = {
        "GPTNeo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        "GPTJ": {"rotary_dim": 4},
        "Llama": heads,
        "Mistral": heads,
        "Gemma": heads,
        "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 16},
        "Bloom": {},
    }[name]
    config = getattr(transformers, f"{name}Config")(**{**sizes, **more})
    model = getattr(transformers, f"Flax{name}ForCausalLM")(config, _do_init=False)
    made = model_of(model, [TOKENS.shape], TOKENS)
    tied = {
        "GPTNeo": "transformer/wte/embedding",
        "Gemma": "model/embed_tokens/embedding",
        "OPT": "model/decoder/embed_tokens/embedding",
        "Bloom": "transformer/word_embeddings/embedding",
    }
    check(made, tied=[tied[name]] if name in tied else ())


@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra", "Albert", "DistilBert"])
def test_encoders(name):
    sizes = {**SMALL, "intermediate_size": 24, "max_position_embeddings": 12, "embedding_size": 16}
    more = {
        "Albert": {"num_hidden_groups": 1, "num_hidden_layers": 2},
        "DistilBert": {"dim": 16, "n_heads": 4, "n_layers": 2, "hidden_dim": 24},
    }.get(name, {})
    config = getattr(transformers, f"{name}Config")(**{**sizes, **more})
    model = getattr(transformers, f"Flax{name}ForMaskedLM")(config, _do_init=False)
    made = model_of(model, [TOKENS.shape], TOKENS)
    tied = [
        name
        for name in made.shapes()
        if name.endswith(("word_embeddings/embedding", "lm_head/decoder/kernel"))
    ]
    check(made, tied=tied)


def test_vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        image_size=12,
        patch_size=4,
        num_labels=10,
    )
    model = transformers.FlaxViTForImageClassification(config, _do_init=False)
    # One pixel of a patch, so that the oracle sees the channels alone.
    pixels = jnp.zeros((1, 3, 12, 12)).at[0, :, 5, 6].set(normal(3))
    check(model_of(model, [(1, 12, 12, 3)], pixels))


def test_resnet():
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24], depths=[2, 1], layer_type="basic"
    )
    model = transformers.FlaxResNetForImageClassification(config, _do_init=False)
    variables = jax.eval_shape(lambda: model.init_weights(jax.random.PRNGKey(0), (1, 3, 8, 8)))
    statistics = jax.tree.map(lambda s: jnp.ones(s.shape), variables["batch_stats"])

    def forward(params, pixels):
        both = {"params": params, "batch_stats": statistics}
        return model(pixels, params=both, train=False).logits

    check(Model(forward, from_shapes(variables["params"]), (normal(1, 3, 2, 2),)))


@pytest.mark.parametrize("name", ["T5", "MT5"])
def test_t5(name):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=40,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = getattr(transformers, f"Flax{name}ForConditionalGeneration")(config, _do_init=False)

    def forward(params, tokens):
        return model(tokens, decoder_input_ids=tokens, params=params, train=False).to_tuple()

    params = jax.eval_shape(lambda: model.init_weights(jax.random.PRNGKey(0), TOKENS.shape))
    tied = ("shared/embedding",) if config.tie_word_embeddings else ()
    check(Model(forward, from_shapes(params), (TOKENS,)), tied=tied)


def test_whisper():
    config = transformers.WhisperConfig(
        vocab_size=40,
        num_mel_bins=16,
        encoder_layers=1,
        encoder_attention_heads=4,
        decoder_layers=1,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        d_model=16,
        max_source_positions=4,
        max_target_positions=8,
        pad_token_id=0,
        decoder_start_token_id=1,
    )
    model = transformers.FlaxWhisperForConditionalGeneration(
        config, input_shape=(1, 16, 8), _do_init=False
    )
    params = jax.eval_shape(lambda: model.init_weights(jax.random.PRNGKey(0), (1, 16, 8)))

    def forward(params, sound, tokens):
        return model(sound, tokens, params=params, train=False).to_tuple()

    made = Model(forward, from_shapes(params), (normal(1, 16, 8), TOKENS))
    check(made, tied=("model/decoder/embed_tokens/embedding",))


def test_clip():
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": 40,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 8,
            "eos_token_id": 39,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 8,
            "patch_size": 4,
        },
        projection_dim=12,
    )
    model = transformers.FlaxCLIPModel(config, _do_init=False)
    params = jax.eval_shape(
        lambda: model.init_weights(jax.random.PRNGKey(0), ((1, 4), (1, 8, 8, 3)))
    )

    def forward(params, tokens, pixels):
        outputs = model(tokens, pixels, params=params, train=False)
        return outputs.text_embeds, outputs.image_embeds

    pixels = jnp.zeros((1, 3, 8, 8)).at[0, :, 5, 6].set(normal(3))
    check(Model(forward, from_shapes(params), (TOKENS, pixels)))
