"""What a data set yields: batches of arrays, of which a process may read some rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Batch = dict[str, np.ndarray]
# Which rows of a batch, ascending.
Rows = NDArray[np.integer[Any]]
