"""Images in batches that an engine takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray


def filled(images: NDArray[Any], smallest: int) -> NDArray[Any]:
    """Images [B, …], the last one repeated up to `smallest`; the first B of the outputs are theirs."""
    missing = smallest - len(images)
    return images if missing <= 0 else np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])


def filled_batches(images: NDArray[Any], largest: int, smallest: int) -> Iterator[tuple[NDArray[Any], int]]:
    """Images [M, …] in batches of `smallest` to `largest`, and how many of each count."""
    for start in range(0, len(images), largest):
        chunk = images[start : start + largest]
        yield filled(chunk, smallest), len(chunk)
