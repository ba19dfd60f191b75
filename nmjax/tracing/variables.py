"""Which operands of a jaxpr's equation are variables."""

from __future__ import annotations

from typing import Any


def is_variable(operand: Any) -> bool:
    """Whether an operand is a variable; the others are literals, which carry their value.

    It tests for `jax.extend.core.Var` without importing `jax.extend`: that also loads Pallas, which
    takes 15 ms, a fifth of `import nmjax`.
    """
    return not hasattr(operand, "val")
