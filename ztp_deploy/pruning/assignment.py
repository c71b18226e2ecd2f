"""`assign`: what became of every patch, from the positions that stages report. NumPy alone: engines are asked it, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def assign(kept: Sequence[NDArray[Any]], merged: Sequence[NDArray[Any]], patch_tokens: int) -> list[NDArray[np.int32]]:
    """Per stage, for every patch [B, n0] the index of its token in the sorted positions, -1 where it is dropped.

    `kept` [B, k] are positions in slot order, -1 masked; `merged` [B, n] the slots that entering slots went
    into, empty for methods that only drop.
    """
    found = []
    slots = np.tile(np.arange(patch_tokens, dtype=np.int32), (len(kept[0]) if kept else 0, 1))
    for index, positions in enumerate(kept):
        if merged:
            slots = np.where(slots < 0, -1, np.take_along_axis(merged[index], slots.clip(0), axis=1))
        else:
            slots = _slots_by_position(positions, patch_tokens)
        order = np.argsort(positions, axis=1, kind="stable")
        ranks = np.argsort(order, axis=1, kind="stable").astype(np.int32)
        found.append(np.where(slots < 0, np.int32(-1), np.take_along_axis(ranks, slots.clip(0), axis=1)))
    return found


def _slots_by_position(positions: NDArray[Any], patch_tokens: int) -> NDArray[np.int32]:
    slots = np.full((len(positions), patch_tokens + 1), -1, dtype=np.int32)
    numbers = np.broadcast_to(np.arange(positions.shape[1], dtype=np.int32), positions.shape)
    np.put_along_axis(slots, positions.astype(np.int64), numbers, axis=1)  # -1 lands in the last column
    return slots[:, :patch_tokens]
