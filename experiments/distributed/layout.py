"""Where the arrays of a run are placed: a mesh of devices, and how it splits each parameter.

Everything else follows its parameter: an array of a training state whose name ends in a
parameter's name and whose shape ends in its shape (momentum, masks, gradients) is split as that
parameter is. All other arrays are whole on every device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nmjax.trees.leaves import map_named, named_leaves
from nmjax.trees.path_rules import check_rules, first_match

Shape = tuple[int, ...]
Preset = Literal["data", "fsdp", "tensor"]

# In a rule: this axis is not split.
_WHOLE = "*"


@dataclass(frozen=True)
class Layout:
    """A mesh, and how each parameter is split over it. Hashable.

    Attributes:
      mesh: of devices.
      specs: name, shape and split of every parameter.
      batch_axes: mesh axes that split each batch.
    """

    mesh: Mesh
    specs: tuple[tuple[str, Shape, PartitionSpec], ...]
    batch_axes: tuple[str, ...]

    def sharding(self, name: str, shape: Shape) -> NamedSharding:
        """Returns the sharding of an array of a training state, by its name and shape."""
        parts = name.split("/")
        # The longest ending first: a name may end in another parameter's name too.
        for start in range(len(parts)):
            found = self._by_name.get("/".join(parts[start:]))
            if found is not None:
                own, spec = found
                extra = len(shape) - len(own)
                fits = extra >= 0 and shape[extra:] == own
                return self._named(PartitionSpec(*[None] * extra, *spec) if fits else _NOWHERE)
        return self._named(_NOWHERE)

    def place_like(self, tree: Any) -> Any:
        """Adds to a tree of shapes the shardings that arrays of these names and shapes have."""
        return map_named(
            lambda name, leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=self.sharding(name, leaf.shape)
            ),
            tree,
        )

    def constrain(self, tree: Any) -> Any:
        """Inside `jax.jit`: returns the same arrays with the shardings of this layout."""
        # On Explicit axes the sharding is a part of the type, which only `reshard` changes.
        put = jax.sharding.reshard if self.is_explicit else jax.lax.with_sharding_constraint
        return map_named(lambda name, leaf: put(leaf, self.sharding(name, leaf.shape)), tree)

    def batch_sharding(self, axis: int = 0) -> NamedSharding:
        """Returns the sharding of an array of a batch, with its examples along this axis."""
        # One entry with all axes: together they split the examples.
        return self._named(PartitionSpec(*[None] * axis, self.batch_axes))

    @property
    def batch_shards(self) -> int:
        """Number of parts that each batch is split into."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch_axes)

    @cached_property
    def own_batch_shards(self) -> tuple[int, ...]:
        """The parts that this process's devices hold, ascending, not always in a row."""
        shards = self.batch_shards
        # An array of one row a shard: the index of a row is the number of its shard.
        held = self.batch_sharding().addressable_devices_indices_map((shards,))
        return tuple(sorted({index[0].indices(shards)[0] for index in held.values() if index}))

    @property
    def is_explicit(self) -> bool:
        """Whether the axes of the mesh are Explicit."""
        return AxisType.Explicit in self.mesh.axis_types

    @cached_property
    def _by_name(self) -> dict[str, tuple[Shape, PartitionSpec]]:
        return {name: (shape, spec) for name, shape, spec in self.specs}

    def _named(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def __str__(self) -> str:
        """Formats a table: every parameter, its shape, its split, and the shape of a shard."""
        axes = ", ".join(f"{name}={size}" for name, size in self.mesh.shape.items())
        width = max(len(name) for name, _, _ in self.specs)
        rows = (
            f"  {name:{width}}  {shape}  {_spell(spec)}  {self._named(spec).shard_shape(shape)}"
            for name, shape, spec in self.specs
        )
        head = f"mesh {axes}; batches split over {', '.join(self.batch_axes)}"
        return "\n".join([head, "  parameter, shape, axes split over, shape of a shard", *rows])


_NOWHERE = PartitionSpec()


def parse_mesh(text: str, axis_type: AxisType = AxisType.Auto) -> Mesh:
    """Makes a mesh of this machine's devices, or all processes' devices, from "data=4,model=2".

    Args:
      text: names and sizes of the axes, the slowest first.
      axis_type: of all axes.

    Raises:
      ValueError: it does not parse, names an axis twice, or its size does not divide the number of
        devices; with several processes, if it does not use all their devices.
    """
    axes = dict(_axes(text))
    size, present = math.prod(axes.values()), jax.device_count()
    if present % size:
        raise ValueError(
            f"the mesh {text!r} has {size} devices, which does not divide the {present} present; "
            f"choose sizes whose product is {present} or divides it"
        )
    if size < present and jax.process_count() > 1:
        raise ValueError(
            f"the mesh {text!r} has {size} devices, but the {jax.process_count()} processes have "
            f"{present}, and all must take part; choose sizes whose product is {present}"
        )
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), (axis_type,) * len(axes), devices=jax.devices()[:size]
    )


def make_layout(
    mesh: Mesh,
    params: Any,
    *,
    preset: Preset = "data",
    rules: Sequence[str] = (),
    batch_axes: Sequence[str] = (),
) -> Layout:
    """Decides how each parameter is split.

    A rule is REGEX=AXES: a regular expression, searched in the parameter's name, and one entry for
    each trailing axis: "*" to leave it whole, a mesh axis, or several joined by "+". The first rule
    that matches wins. If none does, the preset decides:

    - `data`: whole on every device.
    - `fsdp`: the last axis over the axes of the batch.
    - `tensor`: the last axis over the last axis of the mesh; vectors are whole.

    A preset leaves an axis whole if it cannot split it evenly. For a rule that is an error.

    Args:
      mesh: of devices.
      params: a tree of arrays or shapes.
      preset: for parameters that no rule matches.
      rules: such as `"attention/out/kernel=model,*,*"`.
      batch_axes: mesh axes that split each batch; by default the first.

    Raises:
      ValueError: a rule does not parse, matches nothing, names an axis that is not in the mesh or
        names one twice, or splits unevenly. Lists all such leaves.
    """
    batch_axes = tuple(batch_axes) or mesh.axis_names[:1]
    _check_axes("--batch-axes", batch_axes, mesh)
    shapes = {name: tuple(leaf.shape) for name, leaf in named_leaves(params).items()}
    parsed = dict(_parse_rule(rule, mesh) for rule in rules)
    check_rules(parsed, shapes)
    specs = []
    complaints: list[str] = []
    for name, shape in shapes.items():
        rule = first_match(parsed, name)
        entries = _preset_entries(preset, shape, mesh, batch_axes) if rule is None else parsed[rule]
        complaints += _complaints(name, shape, entries, mesh)
        spec = PartitionSpec(*[None] * (len(shape) - len(entries)), *entries)
        specs.append((name, shape, spec))
    if complaints:
        raise ValueError("these parameters cannot be split that way:\n" + "\n".join(complaints))
    return Layout(mesh, tuple(specs), batch_axes)


Entry = tuple[str, ...] | None


def _preset_entries(
    preset: Preset, shape: Shape, mesh: Mesh, batch_axes: tuple[str, ...]
) -> tuple[Entry, ...]:
    if preset == "data" or not shape or (preset == "tensor" and len(shape) < 2):
        return ()
    # The last axis holds outputs. Groups of N:M run along inputs, so no shard cuts one.
    axes = batch_axes if preset == "fsdp" else mesh.axis_names[-1:]
    return (axes,) if shape[-1] % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()


def _parse_rule(rule: str, mesh: Mesh) -> tuple[str, tuple[Entry, ...]]:
    # The last "=", because the regular expression may have some of its own.
    pattern, equals, text = rule.rpartition("=")
    if not (pattern and equals and text):
        raise ValueError(
            f"a rule is REGEX=AXES, such as 'kernel=*,{mesh.axis_names[-1]}', got {rule!r}"
        )
    entries = tuple(None if part == _WHOLE else tuple(part.split("+")) for part in text.split(","))
    _check_axes(f"the rule {rule!r}", [axis for entry in entries for axis in entry or ()], mesh)
    return pattern, entries


def _check_axes(what: str, axes: Sequence[str], mesh: Mesh) -> None:
    unknown = [axis for axis in axes if axis not in mesh.shape]
    if unknown or len(set(axes)) < len(axes):
        raise ValueError(
            f"{what} must name axes of the mesh ({', '.join(mesh.axis_names)}), each at most once, "
            f"got {', '.join(axes)}"
        )


def _complaints(name: str, shape: Shape, entries: Sequence[Entry], mesh: Mesh) -> Iterator[str]:
    if len(entries) > len(shape):
        yield f"  {name} {shape}: the rule names {len(entries)} axes"
        return
    for axis, entry in zip(range(-len(entries), 0), entries, strict=True):
        shards = math.prod(mesh.shape[part] for part in entry or ())
        if shape[axis] % shards:
            yield f"  {name} {shape}: axis {axis} does not split evenly into {shards}"


def _axes(text: str) -> Iterator[tuple[str, int]]:
    seen: Mapping[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not name.isidentifier() or not size.isdecimal() or int(size) < 1 or name in seen:
            raise ValueError(
                "a mesh is NAME=SIZE,NAME=SIZE with distinct names and positive sizes, such as "
                f"'data=4,model=2', got {text!r}"
            )
        seen = {**seen, name: int(size)}
        yield name, int(size)


def _spell(spec: PartitionSpec) -> str:
    entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    return ",".join("+".join(entry) or _WHOLE for entry in entries) or "whole"
