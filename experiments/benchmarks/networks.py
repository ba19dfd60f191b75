"""Whole image networks, packed against dense: `python -m experiments.benchmarks.networks`.

Latency of one 224 x 224 image on one and two threads, in float32, with normalizations folded on
both sides. The baseline is the same dense network in XLA or, if it is installed and faster, in
PyTorch. Weights are random, which does not affect the time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nmjax
from experiments.benchmarks.timing import interleaved_times, rows_by_threads, write_results
from experiments.models.images.networks import dense_layers, make_image_network
from nmjax.linen import fold_batch_norm, make_plan, packed_apply
from nmjax.trees.leaves import named_leaves

# The plans that SUBP reports, by their sparsity; experiments/tasks/imagenet2012.py has the source.
NETWORKS = (
    ("resnet50", "2.0 G", f"1x16@{66 / 128}"),
    ("resnet50", "1.0 G", f"1x16@{98.5 / 128}"),
    ("mobilenet_v1", "279 M", f"1x16@{69 / 128}"),
)
SIDE = 224


def measure(name: str, multiply_adds: str, pattern: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of each side, and the ratio to the faster dense one."""
    module = make_image_network(name, 1000)
    image = jnp.asarray(np.random.default_rng(0).normal(size=(1, SIDE, SIDE, 3)), jnp.float32)
    variables = jax.jit(lambda key: module.init(key, image, train=False))(jax.random.key(0))
    exclude = dense_layers(name, blocks=True)
    plan = make_plan(module, pattern, image, call={"train": False}, exclude=exclude)
    params = nmjax.prune(variables["params"], plan)
    folded = fold_batch_norm(module, {**variables, "params": params}, image, train=False)
    packed = nmjax.unpack_slow(nmjax.pack(folded["params"], plan), rows=SIDE)
    sparse = jax.jit(lambda v, x: packed_apply(module)(v, x, train=False))
    dense = jax.jit(lambda v, x: module.apply(v, x, train=False))
    functions: dict[str, Callable[[], Any]] = {
        "packed": lambda: sparse({**folded, "params": packed}, image),
        "xla": lambda: dense(folded, image),
        **torch_function(name, folded, image),
    }
    # All sides have to compute the same, or the ratio says nothing.
    expected = np.asarray(functions["xla"]())
    for function in functions.values():
        np.testing.assert_allclose(function(), expected, rtol=0, atol=1e-3 * abs(expected).max())
    times = interleaved_times(functions, rounds=rounds, at_least=0.1, pause=0.02)
    seconds = {name: statistics.median(rounds) for name, rounds in times.items()}
    fastest = min(time for name, time in seconds.items() if name != "packed")
    return {
        "network": name,
        "multiply-adds": multiply_adds,
        "pattern": pattern,
        **{f"{side}_ms": time * 1e3 for side, time in seconds.items()},
        "packed_best_ms": min(times["packed"]) * 1e3,
        "speedup": fastest / seconds["packed"],
    }


def torch_function(name: str, variables: Any, image: jax.Array) -> dict[str, Callable[[], Any]]:
    """The folded network in PyTorch, channels last; nothing if PyTorch is not installed."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_grad_enabled(False)
    # Channels last, as on JAX's side.
    last = torch.channels_last
    x = torch.tensor(np.asarray(image)).permute(0, 3, 1, 2).contiguous(memory_format=last)
    layers: dict[str, Any] = {}
    for path, leaf in named_leaves(variables["params"]).items():
        w = torch.tensor(np.asarray(leaf))
        is_conv = w.ndim == 4
        layers[path] = w.permute(3, 2, 0, 1).contiguous(memory_format=last) if is_conv else w
    means = named_leaves(variables["batch_stats"])
    # Folding leaves a normalization nothing but a mean to subtract, which is a bias here.
    shifts = {p: -torch.tensor(np.asarray(m)) for p, m in means.items() if p.endswith("mean")}
    conv2d, relu = torch.nn.functional.conv2d, torch.nn.functional.relu_

    def conv(x: Any, layer: str, norm: str, stride: int = 1) -> Any:
        w = layers[f"{layer}/kernel"]
        groups = x.shape[1] // w.shape[1]
        shift = shifts[f"{norm}/mean"]
        return conv2d(x, w, shift, stride, padding=w.shape[-1] // 2, groups=groups)

    def resnet(x: Any) -> Any:
        x = relu(conv(x, "stem", "stem_norm", 2))
        x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
        for stage, count in enumerate((3, 4, 6, 3), start=1):
            for block in (f"stage{stage}_block{index + 1}" for index in range(count)):
                stride = 2 if stage > 1 and block.endswith("block1") else 1
                y = relu(conv(x, f"{block}/conv1", f"{block}/norm1"))
                y = relu(conv(y, f"{block}/conv2", f"{block}/norm2", stride))
                y = conv(y, f"{block}/conv3", f"{block}/norm3")
                if block.endswith("block1"):
                    x = conv(x, f"{block}/shortcut", f"{block}/shortcut_norm", stride)
                x = relu(y.add_(x))
        return x

    def mobilenet(x: Any) -> Any:
        x = relu(conv(x, "stem", "stem_norm", 2))
        for index in range(13):
            block = f"block{index + 1}"
            # The strides of MobileNetV1's blocks; see experiments/models/images/mobilenet.py.
            stride = 2 if index in (1, 3, 5, 11) else 1
            x = relu(conv(x, f"{block}/depthwise", f"{block}/depthwise_norm", stride))
            x = relu(conv(x, f"{block}/pointwise", f"{block}/pointwise_norm"))
        return x

    features = resnet if name == "resnet50" else mobilenet
    kernel, bias = layers["head/kernel"].T.contiguous(), layers["head/bias"]
    return {
        "torch": lambda: torch.nn.functional.linear(features(x).mean((2, 3)), kernel, bias).numpy()
    }


def main() -> None:
    """Runs one process for each number of threads; prints tables and writes them to results/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each side")
    parser.add_argument("--here", action="store_true", help="measure in this process, print JSON")
    arguments = parser.parse_args()
    if arguments.here:
        for network in NETWORKS:
            print(json.dumps(measure(*network, arguments.rounds)), flush=True)
        return
    command = ["-m", "experiments.benchmarks.networks", "--here", "--rounds", str(arguments.rounds)]
    by_threads = rows_by_threads(command, arguments.threads)
    results: dict[str, Any] = {"instruction_set": nmjax.backends()["ffi"]}
    results |= {f"{threads} threads": rows for threads, rows in by_threads.items()}
    print(f"written to {write_results('networks-cpu', results)}")


if __name__ == "__main__":
    main()
