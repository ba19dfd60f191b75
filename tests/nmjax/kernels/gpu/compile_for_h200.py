"""Compiles programs for an H200 on a machine without one, and prints what is in them as JSON.

Needs JAX's plugin for CUDA, `ptxas`, and JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1; nothing runs.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

import nmjax
from nmjax.kernels.gpu import cusparselt, decode

H200 = """
gpu_device_info {
  name: "NVIDIA H200"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  platform_version: "Compute Capability 9.0a"
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000
  device_memory_size: 150754820096
  l2_cache_size: 62914560
  device_address_bits: 64
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


def masked(w):
    return nmjax.nm_mask(w, 2, 4) * w


def masked_4_8(w):
    return nmjax.nm_mask(w, 4, 8) * w


def masked_8_32(w):
    return nmjax.nm_mask(w, 8, 32) * w


def dense_training(w, x):
    return w - 0.1 * jax.grad(lambda w: jnp.square(x @ w).mean())(w)


def sr_ste_training(w, x):
    params = {"w": w}
    plan = nmjax.make_plan(params, "2:4")
    tx = optax.chain(nmjax.add_sparse_refined(plan, 2e-4), optax.sgd(0.1))

    def loss(params):
        return jnp.square(x @ nmjax.sparsify(params, plan)["w"]).mean()

    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
    return optax.apply_updates(params, updates)["w"]


def sparse_dense(w, x):
    return jax.value_and_grad(lambda w, x: nmjax.kernels.sparse_dense(x, w).sum(), (0, 1))(w, x)


def with_cusparselt(w, x):
    compressed = cusparselt.compress(masked(w))
    return cusparselt.matmul(x, compressed, jnp.ones(w.shape[1]), "relu")


def with_decode(w, x):
    plan = nmjax.make_plan({"w": w}, "2:4")
    packed = nmjax.pack(nmjax.prune({"w": w}, plan), plan)
    integers = nmjax.quantize(packed)["w"]
    return decode.matmul(x, packed["w"]), decode.matmul(x, integers)


def main():
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    on_h200 = jax.sharding.SingleDeviceSharding(topology.devices[0])
    programs = [masked, masked_4_8, masked_8_32, dense_training, sr_ste_training, sparse_dense]
    ready = {name for name, state in nmjax.backends().items() if state.startswith("ready")}
    programs += [with_cusparselt] * ("cusparselt" in ready) + [with_decode] * ("decode" in ready)
    found = {}
    for program in programs:
        is_mask = program.__name__.startswith("masked")
        shapes = [(4096, 4096)] if is_mask else [(512, 256), (64, 512)]
        shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=on_h200) for s in shapes]
        compiled = jax.jit(program).lower(*shapes).compile()
        text = compiled.as_text()
        entry = text[text.index("ENTRY") :]
        found[program.__name__] = {
            "operations": re.findall(r"= \S+ ([a-z-]+)\(", entry),
            "sorts": len(re.findall(r"= \S+ (?:sort|gather|scatter)\(", text)),
            "calls": re.findall(r'custom_call_target="([^"]+)"', text),
            "temporary": compiled.memory_analysis().temp_size_in_bytes,
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
