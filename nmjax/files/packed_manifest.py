"""What the header of a packed file says about its leaves, as JSON: written, and read with doubt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.export
import jax.numpy as jnp
import numpy as np

from nmjax.files.tensor_files import read_note
from nmjax.packed.bits import check_dtype
from nmjax.packed.blocks import PackedBlocks
from nmjax.packed.nm import PackedNM
from nmjax.packed.quantized import Quantized
from nmjax.packed.weight import Packed
from nmjax.patterns import parse_pattern
from nmjax.patterns.pattern import LeafPlan
from nmjax.tables import printable

# Older nmjax reads the first version. Only random keys and left out leaves need the second, and
# only quantized weights the third.
FORMAT, VERSIONS = "packed", (1, 2, 3)

_AXES = ("reduction_axes", "output_axes", "tap_axes")
_LARGEST = 2**31 - 1  # The largest size that XLA can index.


class Leaf(NamedTuple):
    """What a file says about a packed leaf.

    Attributes:
      plan: pattern, axes and shape.
      dtype: name of the weight's dtype.
      inputs: if its values are int8, with scales: what products multiply by; otherwise None.
    """

    plan: LeafPlan
    dtype: str
    inputs: Any

    @property
    def is_quantized(self) -> bool:
        """Whether its values are int8, with scales."""
        return self.inputs is not None

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the arrays that store the leaf."""
        names = Packed.kind_for(self.plan.pattern).array_names(self.plan)
        steps = ("input_steps",) if self.inputs == "static" else ()
        return (*names, "scales", *steps) if self.is_quantized else names


class Manifest(NamedTuple):
    """What a file says about its leaves.

    Attributes:
      packed: name of a packed leaf -> what it is.
      keys: name of a random key -> its implementation, such as "threefry2x32".
      left_out: names of leaves that are not stored, because they are not arrays.
    """

    packed: dict[str, Leaf]
    keys: dict[str, str]
    left_out: list[str]


def write_manifest(
    packed: Mapping[str, Packed], keys: Mapping[str, str], left_out: list[str]
) -> str:
    """Describes leaves as JSON."""
    more = {"keys": dict(keys), "left_out": left_out} if keys or left_out else {}
    leaves = {
        name: {**_describe(leaf.leaf_plan), "dtype": leaf.dtype.name}
        for name, leaf in packed.items()
    }
    version = VERSIONS[1] if more else VERSIONS[0]
    quantized = {
        name: leaf.inputs_are for name, leaf in packed.items() if isinstance(leaf, Quantized)
    }
    if quantized:
        version, more = VERSIONS[2], {"keys": dict(keys), "left_out": left_out}
        more["quantized"] = quantized
    return json.dumps({"format": FORMAT, "version": version, "leaves": leaves, **more})


def read_manifest(metadata: Mapping[str, str]) -> Manifest:
    """Reads what `write_manifest` wrote, from the header of a file.

    Raises:
      ValueError: the text is something else, or from a newer version.
    """
    manifest = read_note(metadata)
    if manifest.get("format") != FORMAT:
        raise ValueError("it has no packed parameters (`python -m nmjax pack` writes such files)")
    version = _typed(manifest.get("version"), int, "the version")
    if version not in VERSIONS:
        raise ValueError(
            f"it has version {version}, but this nmjax reads version {VERSIONS[-1]}; update nmjax"
        )
    # Unknown keys may change the meaning of known ones, so they are errors too.
    more = ((), ("keys", "left_out"), ("keys", "left_out", "quantized"))[version - 1]
    _check_keys(manifest, ("format", "version", "leaves", *more), "the header")
    leaves = _typed(manifest["leaves"], dict, "the leaves")
    keys = _typed(manifest.get("keys", {}), dict, "the keys")
    left_out = _typed(manifest.get("left_out", []), list, "left_out")
    quantized = _read_quantized(manifest.get("quantized", {}), leaves)
    return Manifest(
        {name: _read_leaf(name, text, quantized.get(name)) for name, text in leaves.items()},
        {name: _typed(kind, str, f"the kind of {printable(name)}") for name, kind in keys.items()},
        [_typed(name, str, "a name in left_out") for name in left_out],
    )


def _describe(plan: LeafPlan) -> dict[str, Any]:
    axes = {span: list(getattr(plan, span)) for span in _AXES}
    return {"pattern": str(plan.pattern), "shape": list(plan.shape), **axes}


def _read_quantized(described: Any, leaves: Mapping[str, Any]) -> dict[str, str]:
    """Name of a quantized leaf -> what its products multiply by."""
    quantized = {
        name: _typed(inputs, str, f"the inputs of {printable(name)}")
        for name, inputs in _typed(described, dict, "quantized").items()
    }
    if unknown := quantized.keys() - leaves.keys():
        raise ValueError(f"{printable(unknown.pop())} is quantized, but it is not a packed leaf")
    return quantized


def _read_leaf(name: str, description: Any, inputs: str | None) -> Leaf:
    shown = printable(name)[:80]
    _check_keys(_typed(description, dict, shown), ("pattern", "shape", *_AXES, "dtype"), shown)
    plan = _read_plan(shown, description)
    dtype = _typed(description["dtype"], str, f"the dtype of {shown}")
    return Leaf(plan, dtype, inputs)


def _read_plan(name: str, description: Mapping[str, Any]) -> LeafPlan:
    shape = _integers(description["shape"], f"the shape of {name}")
    spans = {span: _integers(description[span], f"the {span} of {name}") for span in _AXES}
    text = _typed(description["pattern"], str, f"the pattern of {name}")
    pattern = parse_pattern(text[:100])  # A forged text may have megabytes of digits.
    reduction, output, taps = (spans[span] for span in _AXES)
    plan = LeafPlan(pattern, reduction, output, shape, taps)
    named = [axis for span in spans.values() for axis in span]
    # save_packed writes the canonical spelling; another one means that the file was forged.
    if (
        str(pattern) != text
        or not plan.reduction_axes
        or not all(-len(shape) <= axis < 0 for axis in named)
        or len(set(named)) < len(named)
        or pattern.place(plan.axes) != plan.axes
    ):
        raise ValueError(f"{name} of shape {shape} cannot have {text[:100]} along the axes {spans}")
    if not all(1 <= size <= _LARGEST for size in (*shape, plan.inputs, plan.outputs)):
        raise ValueError(f"{name} has an impossible shape: {shape}")
    return plan


def _plan_to_bytes(static: tuple[LeafPlan]) -> bytes:
    return json.dumps(_describe(*static)).encode()


def _plan_from_bytes(data: bytes) -> tuple[LeafPlan]:
    return (_read_plan("a packed argument", json.loads(data)),)


def _dtype_to_bytes(static: tuple[np.dtype, str]) -> bytes:
    return json.dumps([static[0].name, static[1]]).encode()


def _dtype_from_bytes(data: bytes) -> tuple[np.dtype, str]:
    dtype, inputs = json.loads(data)
    return as_floating(dtype, "a packed argument"), inputs


def as_floating(name: str, what: str) -> np.dtype:
    """The dtype of a weight, which a file names.

    Raises:
      ValueError: packed weights cannot have it.
    """
    try:
        dtype = jnp.dtype(name[:20])
        check_dtype(dtype, what)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return np.dtype(dtype)


# So that programs from `jax.export` can take packed parameters as arguments.
for _kind in (PackedNM, PackedBlocks):
    jax.export.register_pytree_node_serialization(
        _kind,
        serialized_name=f"nmjax.{_kind.__name__}",
        serialize_auxdata=_plan_to_bytes,
        deserialize_auxdata=_plan_from_bytes,
    )
jax.export.register_pytree_node_serialization(
    Quantized,
    serialized_name="nmjax.Quantized",
    serialize_auxdata=_dtype_to_bytes,
    deserialize_auxdata=_dtype_from_bytes,
)


def _typed(value: Any, kind: type, what: str) -> Any:
    """Returns the value if it has exactly that type: `isinstance` would accept True as an int."""
    if type(value) is not kind:
        raise ValueError(f"{what} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _integers(values: Any, what: str) -> tuple[int, ...]:
    return tuple(_typed(value, int, what) for value in _typed(values, list, what))


def _check_keys(values: Mapping[str, Any], keys: tuple[str, ...], what: str) -> None:
    if values.keys() != set(keys):
        raise ValueError(f"{what} should have the keys {keys}, got {tuple(values)[:20]}")
