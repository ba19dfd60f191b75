"""What a compiled program says about itself: bytes, memory, copies, collectives.

`bytes_accessed` is the compiler's estimate of what the fused program reads from and writes to the
device's memory. It leaves out Pallas kernels that state no cost estimate, so their operands and
results are added here. The body of a loop counts once.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import jax

# Asynchronous operations are written as a start and a done; only the start counts.
COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)(?:-start)?\("
)
SHAPE = re.compile(r"([a-z]+)(\d*)(?:e\d+m\d+\w*)?\[([\d,]*)\]")
NAME = re.compile(r"%([\w.\-]+) = ")
OP_NAME = re.compile(r'op_name="([^"]*)"')


def statistics(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Everything that the compiler tells of a program, for one device.

    Returns:
      bytes_accessed, arguments, temporaries, peak (bytes; donated arguments count once); copies,
      and prefetches (copies between a TPU's memories, while it computes); kernels (custom calls
      by target), fusions; collectives (kind -> number), collective_names (kind -> the operations
      that they come from); optimal_seconds, where the compiler gives it.

    Raises:
      NotImplementedError: this platform's compiler does not report the memory that a program needs.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        raise NotImplementedError("this compiler reports no memory")
    text = compiled.as_text() or ""
    cost = compiled.cost_analysis() or {}
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "bytes_accessed": int(cost.get("bytes accessed", 0)) + uncounted_bytes(text),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": peak - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        "optimal_seconds": seconds if (seconds := cost.get("optimal_seconds", 0)) > 0 else None,
        **counts(text),
    }


def counts(text: str) -> dict[str, Any]:
    """Copies, custom calls, fusions and collectives in the text of a compiled program."""
    kinds: Counter[str] = Counter()
    names: dict[str, list[str]] = {}
    for line in text.splitlines():
        if found := COLLECTIVE.search(line):
            kinds[found[1]] += 1
            names.setdefault(found[1], []).append(source(line))
    return {
        "copies": text.count(" copy("),
        "prefetches": text.count(" copy-start("),
        "kernels": dict(Counter(re.findall(r'custom_call_target="([^"]+)"', text))),
        "fusions": text.count(" fusion("),
        "collectives": dict(sorted(kinds.items())),
        "collective_names": {kind: sorted(set(found)) for kind, found in sorted(names.items())},
    }


def source(line: str) -> str:
    """The operation of the user's program that an instruction comes from, and its result."""
    name = OP_NAME.search(line)
    shape = SHAPE.search(line)
    return f"{shape[0] if shape else ''} {name[1] if name else ''}".strip()


def uncounted_bytes(text: str) -> int:
    """Bytes of the Pallas kernels that state no cost: `bytes accessed` takes them for free."""
    lines = [line for line in text.splitlines() if " = " in line]
    shapes = {found[1]: line for line in lines if (found := NAME.search(line))}
    total = 0
    for line in lines:
        if '"tpu_custom_call"' in line and "cost_estimate" not in line:
            result, _, rest = line.partition(" custom-call(")
            operands = re.findall(r"%([\w.\-]+)", rest.partition(")")[0])
            total += shape_bytes(result)
            total += sum(shape_bytes(shapes[name].split("(")[0]) for name in operands)
    return total


def shape_bytes(text: str) -> int:
    """Bytes of all array shapes in a piece of text, such as `f32[8,128]`."""
    return sum(
        math.ceil(math.prod(map(int, filter(None, sizes.split(",")))) * _bits(kind, bits) / 8)
        for kind, bits, sizes in SHAPE.findall(text)
    )


def _bits(kind: str, bits: str) -> int:
    return 8 if kind == "pred" else int(bits or 0)
