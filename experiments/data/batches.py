"""Batches of arrays that a data set yields, and the rows of a batch that a process reads."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Batch = dict[str, np.ndarray]
# Which rows of a batch, ascending.
Rows = NDArray[np.integer[Any]]
