"""Hugging Face's Flax models, from transformers' last release that has them."""

import jax
import jax.numpy as jnp
import pytest

from tests.nmjax.real_models.agreement import Model, check, from_shapes, normal

transformers = pytest.importorskip("transformers", "4.57", exc_type=ImportError)
pytestmark = pytest.mark.slow

TOKENS = jnp.array([[33, 36, 37, 39]])
# Heads of four features, and as many tokens.
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "vocab_size": 40}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}


def initialized(model, *shapes):
    """Parameters of a Flax model that was made without them."""
    return from_shapes(jax.eval_shape(lambda: model.init_weights(jax.random.key(0), *shapes)))


def model_of(model, *inputs):
    """The model of a Flax model that takes tokens."""

    def forward(params, *inputs):
        return model(*inputs, params=params).to_tuple()

    return Model(forward, initialized(model, TOKENS.shape), inputs)


def test_gpt2():
    """Its Conv1D keeps its kernel as (out, in)."""
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=8, use_cache=False
    )
    made = model_of(transformers.FlaxGPT2LMHeadModel(config, _do_init=False), TOKENS)
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
    made = model_of(model, TOKENS)
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
    made = model_of(model, TOKENS)
    tied = [
        name
        for name in made.shapes()
        if name.endswith(("word_embeddings/embedding", "lm_head/decoder/kernel"))
    ]
    check(made, tied=tied)


def one_pixel(size):
    """An image with one pixel that is not black: a patch reaches one tap."""
    return jnp.zeros((1, 3, size, size)).at[0, :, 5, 6].set(normal(3))


def test_vit():
    config = transformers.ViTConfig(**VISION, num_labels=10)
    model = transformers.FlaxViTForImageClassification(config, _do_init=False)

    def forward(params, pixels):
        out = model(pixels, params=params, output_hidden_states=True)
        return out.logits, out.hidden_states[-1]

    check(Model(forward, initialized(model, (1, 8, 8, 3)), (one_pixel(8),)))


@pytest.mark.parametrize("layer", ["basic", "bottleneck"])
def test_resnet(layer):
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 1], layer_type=layer
    )
    model = transformers.FlaxResNetForImageClassification(config, _do_init=False)
    variables = initialized(model, (1, 8, 8, 3))
    statistics = jax.tree.map(jnp.ones_like, variables["batch_stats"])

    def forward(params, pixels):
        both = {"params": params, "batch_stats": statistics}
        return model(pixels, params=both, train=False).logits

    check(Model(forward, variables["params"], (normal(1, 3, 1, 1),)))


@pytest.mark.parametrize("name", ["T5", "MT5"])
def test_t5(name, monkeypatch):
    # transformers calls it with names that JAX has removed.
    clip = jnp.clip
    monkeypatch.setattr(jnp, "clip", lambda x, a_min=None, a_max=None: clip(x, a_min, a_max))
    config = getattr(transformers, f"{name}Config")(
        vocab_size=40,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    model = getattr(transformers, f"Flax{name}ForConditionalGeneration")(config, _do_init=False)

    def forward(params, tokens):
        return model(tokens, decoder_input_ids=tokens, params=params).to_tuple()

    tied = ("shared/embedding",) if config.tie_word_embeddings else ()
    check(Model(forward, initialized(model, TOKENS.shape), (TOKENS,)), tied=tied)


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
    sound = normal(1, 16, 8)
    model = transformers.FlaxWhisperForConditionalGeneration(
        config, input_shape=sound.shape, _do_init=False
    )

    def forward(params, sound, tokens):
        return model(sound, tokens, params=params).to_tuple()

    made = Model(forward, initialized(model, sound.shape), (sound, TOKENS))
    check(made, tied=("model/decoder/embed_tokens/embedding",))


def test_clip():
    text = {
        "vocab_size": 40,
        "max_position_embeddings": 8,
        "eos_token_id": 39,
        **{name: size for name, size in VISION.items() if name[-5:] != "_size"},
        "hidden_size": 16,
        "intermediate_size": 24,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)
    model = transformers.FlaxCLIPModel(config, _do_init=False)

    def forward(params, tokens, pixels):
        out = model(tokens, pixels, params=params)
        parts = (out.text_model_output, out.vision_model_output)
        return out.text_embeds, out.image_embeds, [part.last_hidden_state for part in parts]

    params = initialized(model, (TOKENS.shape, (1, 8, 8, 3)))
    check(Model(forward, params, (TOKENS, one_pixel(8))))
