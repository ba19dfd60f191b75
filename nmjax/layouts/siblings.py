"""The leaves around a leaf: its bias, the normalization that follows, vectors close by."""

from __future__ import annotations

from collections.abc import Mapping

from nmjax.layouts.axes import Shape
from nmjax.layouts.names import Leaf


class Siblings:
    """Finds the leaves around a leaf."""

    def __init__(self, leaves: Mapping[Leaf, Shape]) -> None:
        self._shapes = dict(leaves)
        self._above_vectors = {
            leaf.module[:depth]
            for leaf, shape in leaves.items()
            if len(shape) == 1
            for depth in range(len(leaf.module) + 1)
        }

    def shape(self, module: tuple[str, ...], leaf: str, part: str = "") -> Shape:
        """The shape of a leaf; empty if there is none."""
        return self._shapes.get(Leaf(module, leaf, part), ())

    def bias(self, leaf: Leaf) -> Shape:
        """The shape of the bias beside a weight; empty if there is none."""
        return self.shape(leaf.module, "bias") or self.shape(leaf.module, "b")

    def next_norm(self, leaf: Leaf) -> Shape:
        """The shape of the normalization that follows a layer in a numbered sequence."""
        if not leaf.parent.isdigit():
            return ()
        following = (*leaf.module[:-1], str(int(leaf.parent) + 1))
        weight = self.shape(following, "weight")
        same = (self.shape(following, "bias"), self.shape(following, "running_mean"))
        return weight if len(weight) == 1 and weight in same else ()

    def is_beside_a_vector(self, leaf: Leaf) -> bool:
        """Whether the layer's surroundings have a 1-D leaf, which a stack of layers has not."""
        return leaf.module[:-1] in self._above_vectors
