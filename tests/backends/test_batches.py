"""Batches that an engine takes: filled up with the last image, and how many of each count."""

from __future__ import annotations

import numpy as np
import pytest

from ztp_deploy.backends.batches import filled, filled_batches

IMAGES = np.arange(5)[:, None]


@pytest.mark.parametrize("smallest, expected", [(1, [3, 4]), (2, [3, 4]), (4, [3, 4, 4, 4])])
def test_the_last_image_fills_a_batch_up(smallest, expected):
    assert filled(IMAGES[3:], smallest)[:, 0].tolist() == expected


@pytest.mark.parametrize(
    "largest, smallest, expected",
    [
        (8, 1, [([0, 1, 2, 3, 4], 5)]),
        (2, 1, [([0, 1], 2), ([2, 3], 2), ([4], 1)]),
        (4, 3, [([0, 1, 2, 3], 4), ([4, 4, 4], 1)]),
        (8, 8, [([0, 1, 2, 3, 4, 4, 4, 4], 5)]),
    ],
)
def test_batches_and_how_many_of_each_count(largest, smallest, expected):
    assert [(chunk[:, 0].tolist(), count) for chunk, count in filled_batches(IMAGES, largest, smallest)] == expected
