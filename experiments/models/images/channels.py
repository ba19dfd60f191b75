"""Which leaves of our image networks share an order of channels.

For `nmjax.tracing.channel_order`, which sorts the channels of a trained network so that the
neighbors in a 1xN block are alike.
"""

from __future__ import annotations

import re
from typing import Any

from nmjax.tracing.channel_order import Channels, LeafAxis
from nmjax.trees.leaves import named_leaves


def network_channels(variables: Any) -> list[Channels]:
    """All channels of a ResNet or MobileNetV1 that may be reordered.

    Args:
      variables: of a network from `experiments.models.images.networks`, "params" and "batch_stats".

    Raises:
      ValueError: it is neither.
    """
    names = list(named_leaves(variables))
    blocks = _numbered(names, r"^params/(stage(\d+)_block(\d+))/") or _numbered(
        names, r"^params/(block(\d+))/"
    )
    if not blocks or "params/stem/kernel" not in names:
        raise ValueError("these are not the variables of a ResNet or of MobileNetV1")
    if f"params/{blocks[0]}/depthwise/kernel" in names:
        return _mobilenet_channels(blocks)
    return _resnet_channels(blocks, set(names))


def _mobilenet_channels(blocks: list[str]) -> list[Channels]:
    """One group from each convolution across channels to the next, through a depthwise one."""
    found, writer, norm = [], "stem", "stem_norm"
    for block in blocks:
        depthwise = (
            ("params/" + block + "/depthwise/kernel", -1),
            *_norm(f"{block}/depthwise_norm"),
        )
        readers = (*_norm(norm), *depthwise, _input(f"{block}/pointwise"))
        found.append(Channels((_output(writer),), readers))
        writer, norm = f"{block}/pointwise", f"{block}/pointwise_norm"
    return [*found, Channels((_output(writer),), (*_norm(norm), _input("head")))]


def _resnet_channels(blocks: list[str], names: set[str]) -> list[Channels]:
    """The channels inside each block, and the streams that blocks add to."""
    found = []
    writers, followers = [_output("stem")], [*_norm("stem_norm")]
    for block in blocks:
        last = 3 if f"params/{block}/conv3/kernel" in names else 2
        for i in range(1, last):
            inner = (*_norm(f"{block}/norm{i}"), _input(f"{block}/conv{i + 1}"))
            found.append(Channels((_output(f"{block}/conv{i}"),), inner))
        followers.append(_input(f"{block}/conv1"))
        if f"params/{block}/shortcut/kernel" in names:  # Here one stream ends, the next begins.
            followers.append(_input(f"{block}/shortcut"))
            found.append(Channels(tuple(writers), tuple(followers)))
            writers, followers = [_output(f"{block}/shortcut")], [*_norm(f"{block}/shortcut_norm")]
        writers.append(_output(f"{block}/conv{last}"))
        followers += _norm(f"{block}/norm{last}")
    followers.append(_input("head"))
    return [*found, Channels(tuple(writers), tuple(followers))]


def _numbered(names: list[str], rule: str) -> list[str]:
    """The folders that a rule's first group matches, in the order of the numbers in it."""
    matches = {m[1]: tuple(map(int, m.groups()[1:])) for n in names if (m := re.match(rule, n))}
    return sorted(matches, key=lambda folder: matches[folder])


def _output(layer: str) -> LeafAxis:
    return f"params/{layer}/kernel", -1


def _input(layer: str) -> LeafAxis:
    return f"params/{layer}/kernel", -2


def _norm(layer: str) -> tuple[LeafAxis, ...]:
    """Scale, bias and running statistics of a batch normalisation."""
    params = tuple((f"params/{layer}/{leaf}", -1) for leaf in ("scale", "bias"))
    return (*params, *((f"batch_stats/{layer}/{leaf}", -1) for leaf in ("mean", "var")))
