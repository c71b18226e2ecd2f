"""Photographs, their patches and stages, made up or pruned, for the tests of `ztp show`."""

from __future__ import annotations

import numpy as np

import ztp_deploy as ztp
from ztp_deploy.show.painting import StagePicture

PATCHES, SIDE = 36, 16


def photo_of(size=96, seed=0):
    """A photograph [size, size, 3] of noise, no two patches alike."""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def picture(carried, dropped=None, earlier=(), heat=None, merges=False):
    """A stage made up: who carries each patch, and why others went."""
    carried = np.array(carried)
    return StagePicture(
        stage=1,
        block=3,
        tokens_in=len(carried),
        kept=np.unique(carried[carried >= 0]),
        carried=carried,
        dropped={reason: np.array(positions) for reason, positions in (dropped or {}).items()},
        earlier=np.array(earlier, dtype=int),
        heat=None if heat is None else np.array(heat, dtype=float),
        heat_name=None if heat is None else "importance",
        merges=merges,
    )


def patch(pixels, number, side=SIDE, columns=6):
    """The pixels of one patch."""
    top, left = number // columns * side, number % columns * side
    return pixels[top : top + side, left : left + side]


def pruned_by(model, method, **request):
    return ztp.prune(model, ztp.make_plan(model, method, **(request or {"ratio": 0.6})))
