from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def cpu_features() -> dict[str, bool]: ...
def copy_rows(
    to_pointers: NDArray[np.uint64],
    to_strides: NDArray[np.int64],
    from_pointers: NDArray[np.uint64],
    from_strides: NDArray[np.int64],
    to_row_bytes: NDArray[np.int64],
    from_row_bytes: NDArray[np.int64],
    to_limits: NDArray[np.int64],
    from_limits: NDArray[np.int64],
    rows_to: NDArray[np.int64],
    rows_from: NDArray[np.int64],
    threads: int,
    store: int,
) -> None: ...
def page_keys(
    tokens: Sequence[int] | NDArray[np.integer], page_size: int, seed: bytes, sha: int
) -> list[bytes]: ...
