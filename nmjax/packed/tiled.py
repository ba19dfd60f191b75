"""N:M weights laid out for the registers of a TPU, and the exact way there and back.

A TPU register holds 8 rows of 128 words of 32 bits. The kept values lie in n planes
(groups, outputs); a word holds the values of neighboring groups, so the codes of these groups share
a word too, each in its own lane of the values' width. A register of codes serves several registers
of values, one shift apart: no rows are interleaved, and no bits cross lanes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.layouts.axes import Shape
from nmjax.packed.weight import Packed, cuts, is_packed
from nmjax.patterns.nm import NM
from nmjax.patterns.pattern import LeafPlan, Pattern

_SUBLANES, _WORD = 8, 32
# Values that a kernel for TPUs multiplies; float8 is widened to bfloat16 there.
_DTYPES = ("bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")
# Groups that a kernel takes at a time. Their planes fit into a TPU core's memory many times.
_BLOCK, _STEP = 1024, 128


@dataclass(frozen=True)
class Tiling:
    """How groups share words.

    Attributes:
      lane: bits of a word that belong to one group: 8 for int8 values, otherwise 16.
      field: bits of a group's code, a power of two.
    """

    lane: int
    field: int

    @property
    def groups_per_word(self) -> int:
        """Groups whose values share a word."""
        return _WORD // self.lane

    @property
    def shifts(self) -> int:
        """Registers of values that one register of codes serves."""
        return self.lane // self.field

    @property
    def tile(self) -> int:
        """Groups whose values share a register."""
        return _SUBLANES * self.groups_per_word

    @property
    def groups(self) -> int:
        """Groups that one register of codes serves."""
        return self.tile * self.shifts

    def code_rows(self, groups: int) -> int:
        """Rows of codes for so many groups."""
        return groups // (self.groups_per_word * self.shifts)

    def chunk(self, pattern: NM) -> int:
        """How few groups a kernel can take at a time: whole registers of codes and of inputs."""
        return math.lcm(self.groups, _STEP // math.gcd(_STEP, pattern.m))

    def block(self, groups: int) -> int:
        """How many groups a kernel takes at a time, of a weight with so many."""
        count = max(math.ceil(groups / _BLOCK), 1)
        # The inputs of a block lie along lanes, 128 at a time, unless there is only one block.
        step = self.groups if count == 1 else math.lcm(self.groups, _STEP)
        return math.ceil(groups / count / step) * step

    def padded(self, groups: int) -> int:
        """How many groups are stored: whole blocks."""
        return math.ceil(groups / self.block(groups)) * self.block(groups)


def tiling(pattern: Pattern, dtype: Any) -> Tiling:
    """How weights of a pattern and dtype are laid out.

    Raises:
      NotImplementedError: they have no such layout.
    """
    if not isinstance(pattern, NM):
        raise NotImplementedError(
            f"TPUs have no kernel for {pattern}: blocks that a TPU can skip are 128 outputs wide"
        )
    if dtype not in _DTYPES:
        raise NotImplementedError(
            f"the layout for TPUs takes values of {', '.join(_DTYPES)}, not {dtype}; cast them "
            "with packed.astype(jnp.bfloat16)"
        )
    lane = 8 if dtype == np.int8 else 16
    field = _field(pattern)
    if pattern.m < 2 or field > lane:
        raise NotImplementedError(
            f"the code of a group of {pattern} takes {field} bits; the layout for TPUs has at most "
            f"{lane} with values of {dtype}"
        )
    return Tiling(lane, field)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "codes"],
    meta_fields=["leaf_plan", "lane"],
)
@dataclass(frozen=True, eq=False)
class TiledNM(Packed, pattern=None):
    """A packed N:M matrix, or a stack of them, in the layout for TPUs; a pytree node.

    Groups are padded with zeros to whole registers. Outputs are the last axis of both arrays, so
    a sharding of the outputs still applies. `nmjax.for_platform` makes it.

    Attributes:
      values: (*stack, n, groups, outputs), the kept weights: plane i has each group's i-th.
      codes: int32 (*stack, rows, outputs), where the values were. A group of 2:4 has four bits,
        which say what is kept; any other pattern has n positions of ceil(log2 m) bits.
      leaf_plan: pattern, axes and shape of the weight; static.
      lane: `Tiling.lane`, which values that are cast later keep; static.
    """

    excess: ClassVar[str] = "groups keep more than"

    values: jax.Array
    codes: jax.Array
    leaf_plan: LeafPlan
    lane: int

    @classmethod
    def pack(cls, w: jax.Array, mask: jax.Array, leaf_plan: LeafPlan) -> Self:
        """Packs the weights that a mask keeps, as `PackedNM.pack` does."""
        return cls.of(Packed.kind_for(leaf_plan.pattern).pack(w, mask, leaf_plan))

    @classmethod
    def of(cls, packed: Any) -> Self:
        """The same weight in this layout, from a `PackedNM`.

        Raises:
          NotImplementedError: there is no such layout for its pattern or dtype, or it is a
            convolution.
        """
        way = tiling(packed.pattern, packed.dtype)
        if _has_taps(packed):
            raise NotImplementedError(
                f"the layout for TPUs is for matrices, not for the kernel {packed.shape}"
            )
        groups = packed.values.shape[-3]
        values = jnp.moveaxis(_pad(packed.values, -3, way.padded(groups)), -2, -3)
        fields = _pad(_fields(packed.positions(), packed.pattern), -2, way.padded(groups))
        return cls(values, _join(fields, way), packed.leaf_plan, way.lane)

    def portable(self) -> Packed:
        """The same weight as `nmjax.pack` makes it. Its gradient reaches the values."""
        self.check_arrays()
        groups = self.leaf_plan.inputs // self.pattern.m
        values = jnp.moveaxis(self.values[..., :groups, :], -3, -2)
        fields = _split(self.codes, self.tiling)[..., :groups, :]
        # `PackedNM`; imported here, it would make the chain of imports longer.
        kind: Any = Packed.kind_for(self.pattern)
        packed: Packed = kind.at(values, _positions(fields, self.pattern), self.leaf_plan)
        return packed

    def unpack(self) -> jax.Array:
        """The weight, with zeros where nothing was kept. Its gradient reaches the values."""
        return self.portable().unpack()

    def check_arrays(self) -> None:
        """Checks the dtypes and shapes of the arrays against the plan.

        Raises:
          TypeError: a dtype that the layout does not have.
          ValueError: a shape that the plan does not allow, even for a shard of the outputs.
        """
        super().check_arrays()
        plan, way, shape = self.leaf_plan, self.tiling, np.shape(self.values)
        groups = way.padded(plan.inputs // self.pattern.m)
        if shape[-3:-1] != (self.pattern.n, groups) or not cuts(shape[-1], plan.outputs):
            raise ValueError(
                f"values of shape {shape} cannot hold {self}; expected (..., {self.pattern.n}, "
                f"{groups}, {plan.outputs}), or equal parts of the outputs"
            )
        rows = way.code_rows(groups)
        self.check_array("codes", np.dtype(np.int32), (*shape[:-3], rows, shape[-1]))

    @classmethod
    def misfits(cls, kept: jax.Array, leaf_plan: LeafPlan) -> tuple[int, int]:
        """How many groups keep more than n entries, and how many groups there are."""
        return Packed.kind_for(leaf_plan.pattern).misfits(kept, leaf_plan)

    def check(self) -> None:
        """Raises ValueError unless the arrays are what `for_platform` could have made."""
        jax.tree.map(np.asarray, self.portable()).check()

    @property
    def pattern(self) -> NM:
        """The weight's pattern."""
        pattern = self.leaf_plan.pattern
        if not isinstance(pattern, NM):
            raise TypeError(f"{type(self).__name__} does not hold weights with {pattern}")
        return pattern

    @property
    def tiling(self) -> Tiling:
        """How groups share words."""
        return Tiling(self.lane, _field(self.pattern))

    @property
    def least_nbytes(self) -> int:
        """Bytes for the values, and log2 C(m, n) bits for each group's positions."""
        return self.portable().least_nbytes

    @property
    def leading(self) -> Shape:
        """Sizes of the axes in front of one matrix."""
        return self.values.shape[:-3]

    @property
    def outputs(self) -> int:
        """Number of outputs that the arrays hold."""
        return self.values.shape[-1]


def for_platform(packed: Any, platform: Literal["cpu", "gpu", "tpu"] = "tpu") -> Any:
    """Lays packed weights out for the platform that will multiply by them; call it once at load.

    For TPUs, N:M matrices become `nmjax.TiledNM`, which `nmjax.packed_matmul` reads without
    unpacking it in memory: the patterns N:M whose group's code fits into a value's width (2:4,
    1:4, 1:8, 4:8 and others), with values of bfloat16, float8 or int8. Every other leaf is as it
    was. For CPUs and GPUs, `nmjax.TiledNM` becomes `nmjax.PackedNM` again, which is also what
    `nmjax.save_packed` stores. Both ways are exact, bit for bit.

    Args:
      packed: a packed weight, or a tree with packed leaves.
      platform: where the products will run.

    Returns:
      The same tree with other packed leaves.

    Raises:
      ValueError: an unknown platform.

    >>> import nmjax
    >>> params = {"kernel": jnp.ones((512, 256), jnp.bfloat16)}
    >>> plan = nmjax.make_plan(params, "2:4")
    >>> packed = nmjax.pack(nmjax.prune(params, plan), plan)
    >>> tiled = for_platform(packed, "tpu")
    >>> tiled["kernel"].values.shape, tiled["kernel"].codes.shape
    ((2, 128, 256), (16, 256))
    >>> bool((nmjax.unpack(tiled)["kernel"] == nmjax.unpack(packed)["kernel"]).all())
    True
    """
    if platform not in ("cpu", "gpu", "tpu"):
        raise ValueError(f'platform must be "cpu", "gpu" or "tpu", got {platform!r}')

    def convert(leaf: Any) -> Any:
        if not is_packed(leaf):
            return leaf
        if platform != "tpu":
            return leaf.portable()
        return TiledNM.of(leaf) if _has_layout(leaf) else leaf

    return jax.tree.map(convert, packed, is_leaf=is_packed)


def _has_layout(packed: Packed) -> bool:
    if isinstance(packed, TiledNM):
        return False
    try:
        tiling(packed.leaf_plan.pattern, packed.dtype)
    except NotImplementedError:
        return False
    return not _has_taps(packed)


def _has_taps(packed: Packed) -> bool:
    # Leading axes that the plan does not know are a stack, as for `first_layer`.
    return packed.leaf_plan.pattern.needs_taps or bool(packed.leaf_plan.tap_axes)


def _field(pattern: NM) -> int:
    """Bits of a group's code, rounded up to a power of two, so that codes do not cross words."""
    bits = 4 if _is_bitmask(pattern) else pattern.n * (pattern.m - 1).bit_length()
    return 1 << max(bits - 1, 0).bit_length()


def _is_bitmask(pattern: NM) -> bool:
    """Whether a group's code says what is kept. At 2:4 that takes the fewest instructions."""
    return (pattern.n, pattern.m) == (2, 4)


def _fields(positions: jax.Array, pattern: NM) -> jax.Array:
    """Codes of groups, uint32 (*stack, groups, outputs), from positions (..., n, outputs)."""
    wide = positions.astype(jnp.uint32)
    if _is_bitmask(pattern):
        return jnp.sum(jnp.uint32(1) << wide, axis=-2, dtype=jnp.uint32)
    width = (pattern.m - 1).bit_length()
    places = [wide[..., i, :] << np.uint32(i * width) for i in range(pattern.n)]
    return jnp.sum(jnp.stack(places), axis=0, dtype=jnp.uint32)


def _positions(fields: jax.Array, pattern: NM) -> jax.Array:
    """Inverse of `_fields`; uint8 (*stack, groups, n, outputs)."""
    if _is_bitmask(pattern):
        low = jnp.stack([fields >> np.uint32(i) & np.uint32(1) for i in range(4)], axis=-2)
        # The first kept member follows the dropped ones, and the last one precedes them.
        first = jnp.argmax(low, axis=-2)
        last = 3 - jnp.argmax(low[..., ::-1, :], axis=-2)
        return jnp.stack([first, last], axis=-2).astype(jnp.uint8)
    width = (pattern.m - 1).bit_length()
    mask = np.uint32(2**width - 1)
    places = [fields >> np.uint32(i * width) & mask for i in range(pattern.n)]
    return jnp.stack(places, axis=-2).astype(jnp.uint8)


def _join(fields: jax.Array, way: Tiling) -> jax.Array:
    """Words of codes from the codes of groups."""
    *stack, groups, outputs = fields.shape
    tiles = groups // way.groups
    parts = fields.reshape(*stack, tiles, way.shifts, _SUBLANES, way.groups_per_word, outputs)
    words = jnp.sum(parts << _places(way, parts.ndim), axis=(-4, -2), dtype=jnp.uint32)
    return words.astype(jnp.int32).reshape(*stack, tiles * _SUBLANES, outputs)


def _split(codes: jax.Array, way: Tiling) -> jax.Array:
    """Inverse of `_join`."""
    *stack, rows, outputs = codes.shape
    words = codes.astype(jnp.uint32).reshape(*stack, rows // _SUBLANES, 1, _SUBLANES, 1, outputs)
    parts = words >> _places(way, words.ndim) & np.uint32(2**way.field - 1)
    return parts.reshape(*stack, -1, outputs)


def _places(way: Tiling, ndim: int) -> np.ndarray:
    """Where a word holds the code of a group: (..., shifts, 1, groups per word, 1)."""
    shifts = np.arange(way.shifts, dtype=np.uint32)[:, None, None, None] * np.uint32(way.field)
    lanes = np.arange(way.groups_per_word, dtype=np.uint32)[:, None] * np.uint32(way.lane)
    places = shifts + lanes
    return places.reshape(*[1] * (ndim - 4), *places.shape)


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)
