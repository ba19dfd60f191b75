"""What 2:4 training of a 7-billion-parameter Transformer needs from a mesh, by compiling it.

    python -m experiments.benchmarks.large_model

Nothing runs and no array is allocated: the training step is lowered from shapes and compiled for 64
simulated devices, dense and with SR-STE. The table counts the collectives in the compiled program
(one in the loop over the layers counts once) and the bytes that a device needs. It uses the CPU
compiler, which keeps float32 copies of what other devices multiply in bfloat16; both sides are
compared under the same compiler.

The decoder has RMS norms, causal attention, gated feed-forward layers, and a scan over blocks with
remat. Weights and AdamW's moments are float32 and split over both axes of the mesh. Weights are
pruned and rounded to bfloat16 where they lie, and only then gathered over "data", by layers. So
masks need no communication, and no more bytes are gathered than in dense training.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import nmjax
from experiments.benchmarks.timing import print_table, write_results

Params = dict[str, Any]

# How each kernel lies on ("data", "model"): (axes at rest, axes in use), behind the axis of layers.
LAYOUT = {
    "query": (P("data", "model"), P(None, "model")),
    "key": (P("data", "model"), P(None, "model")),
    "value": (P("data", "model"), P(None, "model")),
    "out": (P("model", "data"), P("model", None)),
    "gate": (P("data", "model"), P(None, "model")),
    "up": (P("data", "model"), P(None, "model")),
    "down": (P("model", "data"), P("model", None)),
}
LAMBDA_W = 2e-4
ACTIVATIONS = P("data", None, None)
# Asynchronous collectives are written as a start and a done; only the start counts.
COLLECTIVES = r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)(?:-start)?\("


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder; those of Llama 7B by default.

    With fewer `key_heads` than `heads`, queries share keys and values.
    """

    layers: int = 32
    width: int = 4096
    hidden: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    key_heads: int | None = None

    def kernels(self) -> dict[str, tuple[int, int]]:
        """Name -> (inputs, outputs) of each kernel of a block."""
        d, h = self.width, self.hidden
        shared = (d, d // self.heads * (self.key_heads or self.heads))
        attention = {"query": (d, d), "key": shared, "value": shared, "out": (d, d)}
        return {**attention, "gate": (d, h), "up": (d, h), "down": (h, d)}

    def shapes(self, mesh: Mesh) -> Params:
        """The parameters as float32 shapes with shardings."""

        def shape(spec: P, *sizes: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(mesh, spec))

        blocks: Params = {
            name: {"kernel": shape(P(None, *LAYOUT[name][0]), self.layers, *sizes)}
            for name, sizes in self.kernels().items()
        }
        for name in ("attention_norm", "forward_norm"):
            blocks[name] = {"scale": shape(P(), self.layers, self.width)}
        return {
            "embedding": shape(P(None, "model"), self.vocabulary, self.width),
            "blocks": blocks,
            "norm": {"scale": shape(P(), self.width)},
            "head": {"kernel": shape(P("data", "model"), self.width, self.vocabulary)},
        }


def loss(
    model: Decoder,
    plan: nmjax.Plan | None,
    params: Params,
    tokens: jax.Array,
    *,
    lambda_w: float = LAMBDA_W,
    remat: bool = True,
    unroll: int = 1,
    once: bool = False,
) -> jax.Array:
    """Mean cross entropy of the next token, computed in bfloat16.

    Args:
      model: sizes.
      plan: of the kernels of one block; None for dense.
      params: float32.
      tokens: (sequences, length + 1) integers.
      lambda_w: weight of SR-STE's term; 0 is STE.
      remat: the backward pass computes each block again; otherwise what it needs is kept.
      unroll: blocks that one turn of the loop has.
      once: weights are pruned and rounded once a step, before the loop; otherwise in the loop, and
        with remat again in the backward pass.
    """
    x = params["embedding"].astype(jnp.bfloat16)[tokens[:, :-1]]
    blocks = _rounded(params["blocks"], plan, lambda_w) if once else params["blocks"]

    def block(x: jax.Array, weights: Params) -> tuple[jax.Array, None]:
        if plan is not None and not once:
            # With the pull here, a mask lives no longer than its layer's turn in the loop.
            weights = nmjax.sparsify(weights, plan, lambda_w=lambda_w or None)
        return _block(model, weights, x), None

    body = jax.checkpoint(block) if remat else block
    x, _ = jax.lax.scan(body, _constrain(x, ACTIVATIONS), blocks, unroll=unroll)
    logits = _normalize(x, params["norm"]) @ _gather(params["head"], P(None, "model"))
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), tokens[:, 1:]
    )
    return losses.mean()


def _rounded(blocks: Params, plan: nmjax.Plan | None, lambda_w: float) -> Params:
    """The kernels of all blocks in bfloat16, where they lie; sparse if there is a plan."""
    if plan is not None:
        blocks = nmjax.sparsify(blocks, plan, lambda_w=lambda_w or None, dtype=jnp.bfloat16)

    def at_rest(name: str, weights: Params) -> Params:
        kernel = weights["kernel"].astype(jnp.bfloat16)
        return {"kernel": _constrain(kernel, P(None, *LAYOUT[name][0]))}

    return {name: at_rest(name, w) if name in LAYOUT else w for name, w in blocks.items()}


def _block(model: Decoder, weights: Params, x: jax.Array) -> jax.Array:
    w = {name: _gather(weights[name], in_use) for name, (_, in_use) in LAYOUT.items()}
    normed = _normalize(x, weights["attention_norm"])
    heads = (*x.shape[:2], -1, model.width // model.heads)
    query, key, value = ((normed @ w[name]).reshape(heads) for name in ("query", "key", "value"))
    attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = _constrain(x + attended.reshape(x.shape) @ w["out"], ACTIVATIONS)
    normed = _normalize(x, weights["forward_norm"])
    hidden = jax.nn.silu(normed @ w["gate"]) * (normed @ w["up"])
    return _constrain(x + hidden @ w["down"], ACTIVATIONS)


def _normalize(x: jax.Array, weights: Params) -> jax.Array:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    return (wide * scale * weights["scale"]).astype(x.dtype)


def _gather(weights: Params, in_use: P) -> jax.Array:
    return _constrain(weights["kernel"].astype(jnp.bfloat16), in_use)


def _constrain(x: jax.Array, spec: P) -> jax.Array:
    constrained: jax.Array = jax.lax.with_sharding_constraint(x, spec)
    return constrained


def compile_step(
    model: Decoder,
    mesh: Mesh,
    pattern: str | None,
    *,
    sequences: int,
    length: int,
    lambda_w: float = LAMBDA_W,
    remat: bool = True,
    unroll: int = 1,
    once: bool = False,
) -> jax.stages.Compiled:
    """Compiles a training step from shapes.

    Args:
      model: sizes.
      mesh: with axes "data", over which sequences are split, and "model".
      pattern: of the sparse weights; None for dense.
      sequences: in a batch.
      length: of each, in tokens.
      lambda_w: weight of SR-STE's term; 0 is STE.
      remat: see `loss`.
      unroll: see `loss`.
      once: see `loss`.

    Raises:
      ValueError: shards cut groups.
    """
    params = model.shapes(mesh)
    plan = None
    if pattern is not None:
        plan = plan_block(model, mesh, pattern, sequences=sequences, length=length)
        plan = nmjax.shard_plan(params["blocks"], plan)
    tx = optax.adamw(3e-4)
    mean_loss = partial(loss, lambda_w=lambda_w, remat=remat, unroll=unroll, once=once)

    def step(params: Params, state: Any, tokens: jax.Array) -> tuple[Params, Any]:
        grads = jax.grad(mean_loss, argnums=2)(model, plan, params, tokens)
        # Gradients are summed where their weights lie.
        grads = jax.tree.map(_constrain, grads, specs)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, params)
    state = optax.tree_map_params(
        tx,
        lambda moment, leaf: jax.ShapeDtypeStruct(
            moment.shape, moment.dtype, sharding=leaf.sharding
        ),
        jax.eval_shape(tx.init, params),
        params,
    )
    tokens = jax.ShapeDtypeStruct(
        (sequences, length + 1), jnp.int32, sharding=NamedSharding(mesh, P("data"))
    )
    with jax.set_mesh(mesh):
        out = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
        lowered = jax.jit(step, donate_argnums=(0, 1), out_shardings=out).lower(
            params, state, tokens
        )
        return lowered.compile()


def plan_block(
    model: Decoder, mesh: Mesh, pattern: str, *, sequences: int, length: int
) -> nmjax.Plan:
    """Plans the weights of one block; the same plan fits the stack of all blocks."""
    block = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), model.shapes(mesh)["blocks"]
    )
    x = jax.ShapeDtypeStruct((sequences, length, model.width), jnp.bfloat16)
    with jax.set_mesh(mesh):
        return nmjax.make_plan(block, pattern, forward=partial(_block, model), inputs=(x,))


def needs(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Counts the collectives of a compiled step by kind, and the bytes of one device.

    Raises:
      NotImplementedError: this platform's compiler does not report the memory that a program needs.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        raise NotImplementedError(f"no memory analysis on {jax.default_backend()}")
    counts = Counter(re.findall(COLLECTIVES, compiled.as_text() or ""))
    return {
        "collectives": dict(sorted(counts.items())),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        # Donated arguments become outputs in place: `alias` counts them once.
        "peak_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
    }


def compare(
    model: Decoder, mesh: Mesh, pattern: str, *, sequences: int, length: int
) -> dict[str, Any]:
    """What a step needs dense and sparse, and the ratio of their peak bytes."""
    sides = {
        name: needs(compile_step(model, mesh, chosen, sequences=sequences, length=length))
        for name, chosen in (("sparse", pattern), ("dense", None))
    }
    return {**sides, "ratio": sides["sparse"]["peak_bytes"] / sides["dense"]["peak_bytes"]}


def main() -> None:
    """Prints the table and writes it to results/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--data", type=int, default=8, help="devices that share the batch")
    parser.add_argument("--model", type=int, default=8, help="devices that share each layer")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    flags = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", flags.data * flags.model)
    mesh = jax.make_mesh((flags.data, flags.model), ("data", "model"), (AxisType.Auto,) * 2)
    model = Decoder()
    found = compare(model, mesh, flags.pattern, sequences=flags.sequences, length=flags.length)
    rows = [
        {
            "step": name,
            "collectives": sum(found[name]["collectives"].values()),
            **{
                f"{kind} MB": found[name][f"{kind}_bytes"] / 1e6
                for kind in ("argument", "temporary", "peak")
            },
            "of dense": found[name]["peak_bytes"] / found["dense"]["peak_bytes"],
        }
        for name in ("dense", "sparse")
    ]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.shapes(mesh)))
    print_table(f"{parameters:,} parameters, {flags.pattern}, mesh {dict(mesh.shape)}", rows)
    write_results("large_model-cpu", {"flags": vars(flags), "parameters": parameters, **found})


if __name__ == "__main__":
    main()
