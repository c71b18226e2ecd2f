"""Labelled pictures for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_pictures(root: Path) -> Path:
    """Twenty-two pictures of several sizes in folders 0, 3 and 9, the numbers of their classes."""
    generator = np.random.default_rng(0)
    for index in range(22):
        folder = root / str((0, 3, 9)[index % 3])
        folder.mkdir(exist_ok=True)
        noise = generator.integers(0, 256, (100 + 7 * index, 150 - 3 * index, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((60 + 9 * index, 200)).save(folder / f"{index:02}.png")
    return root
