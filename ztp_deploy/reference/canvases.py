"""Canvases: a real handwritten digit somewhere on a textured ground among strokes and fragments that are none.

The digits are the 1,797 scans that scikit-learn ships (the test part of the UCI collection of Alpaydin and Kaynak).
They are split here by a fixed rule, 1,200 for training and 597 for tests, stratified by class; writers are not
known, so one writer's digits may lie in both parts.

`python -m ztp_deploy.reference.canvases --part train --count 100 --out DIR` writes some as PNG files.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ztp_deploy.atomic import write_bytes
from ztp_deploy.entrypoint import run_and_exit
from ztp_deploy.errors import BadRequest

Part = Literal["train", "test"]
Floats = NDArray[np.float32]

SIDE = 112
PATCH = 8
TEST_DIGITS = 597
LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SPLIT_SEED = 20261124
_SEEDS: dict[Part, int] = {"train": 1, "test": 2}
_GRID = 2  # strokes are drawn this much larger and then reduced, which smooths their edges


@dataclass(frozen=True, slots=True)
class Canvas:
    """One drawn canvas: uint8 pixels [SIDE, SIDE, 3], the digit's label and its scan's index.

    `plain` is the same canvas without clutter and with little texture, for the beginning of a training; `coverage`
    [196] is how much of each patch is digit.
    """

    pixels: NDArray[np.uint8]
    plain: NDArray[np.uint8]
    label: int
    digit: int
    coverage: Floats


@cache
def scans() -> tuple[Floats, NDArray[np.int64]]:
    """All scans, [1797, 8, 8] ink in 0 … 1, and their labels."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return (loaded.images / 16).astype(np.float32), loaded.target.astype(np.int64)


@cache
def split() -> dict[Part, tuple[int, ...]]:
    """The scans' indices by part: drawn class by class, as many tests of each class as its share asks for."""
    labels = scans()[1]
    random = np.random.default_rng(_SPLIT_SEED)
    shuffled = [random.permutation(np.flatnonzero(labels == label)) for label in range(10)]
    shares = np.array([len(members) * TEST_DIGITS / len(labels) for members in shuffled])
    counts = np.floor(shares).astype(int)
    for label in np.argsort(counts - shares, kind="stable")[: TEST_DIGITS - counts.sum()]:
        counts[label] += 1
    test = sorted(int(index) for members, count in zip(shuffled, counts, strict=True) for index in members[:count])
    chosen = set(test)
    return {"train": tuple(index for index in range(len(labels)) if index not in chosen), "test": tuple(test)}


def draw(part: Part, index: int) -> Canvas:
    """The canvas of that number, the same on every machine up to rounding.

    Test canvases go through the scans in turn, so that each is equally often seen; training canvases draw theirs.
    """
    random = np.random.default_rng([_SEEDS[part], index])
    members = split()[part]
    digit = members[index % len(members)] if part == "test" else members[random.integers(len(members))]
    pictures, labels = scans()
    scale = float(np.exp(random.uniform(np.log(32), np.log(56))))
    mask = _placed(pictures[digit], scale, random, reach=1.0)
    clutter = np.maximum(_strokes(random, scale), _fragments(random, members, scale)) * random.uniform(0.7, 1.0)
    ground, ink = _colours(random)
    texture = _texture(random)[:, :, None]
    ink = ink + 0.08 * _noise(random, 14)[:, :, None]
    grain = random.normal(0, 0.03, (SIDE, SIDE, 1)).astype(np.float32)

    def paint(cover: Floats, strength: float) -> NDArray[np.uint8]:
        alpha = cover[:, :, None]
        pixels = (ground + strength * texture) * (1 - alpha) + ink * alpha + grain
        return (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8)

    patches = mask.reshape(SIDE // PATCH, PATCH, SIDE // PATCH, PATCH).mean((1, 3)).ravel()
    full = np.maximum(mask, clutter * (1 - 0.85 * _near(mask)))
    return Canvas(paint(full, 0.6), paint(mask, 0.1), int(labels[digit]), digit, patches)


def _placed(scan: Floats, scale: float, random: np.random.Generator, reach: float) -> Floats:
    """The scan's ink on the canvas, `scale` pixels wide, turned, sheared and moved at random."""
    angle, shear, stretch = random.normal(0, 0.13), random.normal(0, 0.12), float(np.exp(random.normal(0, 0.1)))
    cosine, sine = np.cos(angle), np.sin(angle)
    matrix = np.array([[cosine, -sine], [sine, cosine]]) @ np.array([[1, shear], [0, stretch]]) * (8 / scale)
    margin = scale / 2 * reach
    centre = random.uniform(margin, SIDE - margin, 2)
    shift = np.array([4.0, 4.0]) - matrix @ centre
    padded = np.zeros((12, 12), np.float32)
    padded[2:10, 2:10] = scan
    data = (*matrix[0], shift[0] + 2, *matrix[1], shift[1] + 2)
    drawn = Image.fromarray(padded).transform((SIDE, SIDE), Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)
    ink: Floats = ((np.asarray(drawn) - 0.35) / 0.3).clip(0, 1).astype(np.float32)
    return ink


def _strokes(random: np.random.Generator, scale: float) -> Floats:
    """Lines and curves that are not digits: crossing much of the canvas, or short."""
    sheet = Image.new("L", (SIDE * _GRID, SIDE * _GRID))
    pen = ImageDraw.Draw(sheet)
    steps = np.linspace(0, 1, 13)[:, None]
    for _ in range(random.integers(4, 10)):
        length = SIDE * random.uniform(0.6, 1.3) if random.random() < 0.45 else scale * random.uniform(0.15, 0.5)
        start, bend = random.uniform(0, SIDE, 2), random.normal(0, 0.35 * length, 2)
        angle = random.uniform(0, 2 * np.pi)
        end = start + length * np.array([np.cos(angle), np.sin(angle)])
        middle = (start + end) / 2 + bend
        points = (1 - steps) ** 2 * start + 2 * steps * (1 - steps) * middle + steps**2 * end
        width = max(2, round(_GRID * scale * random.uniform(0.05, 0.13)))
        pen.line([tuple(point) for point in points * _GRID], fill=255, width=width, joint="curve")
    return np.asarray(sheet.reduce(_GRID), np.float32) / np.float32(255)


def _fragments(random: np.random.Generator, members: tuple[int, ...], scale: float) -> Floats:
    """Pieces of other digits, too small to be read."""
    pictures = scans()[0]
    sheet = np.zeros((SIDE, SIDE), np.float32)
    for _ in range(random.integers(2, 7)):
        top, left = random.integers(0, 6, 2)
        piece = np.zeros((8, 8), np.float32)
        piece[2:5, 2:5] = pictures[members[random.integers(len(members))], top : top + 3, left : left + 3]
        sheet = np.maximum(sheet, _placed(piece, scale * random.uniform(0.7, 1.1), random, reach=0.3))
    return sheet


def _colours(random: np.random.Generator) -> tuple[Floats, Floats]:
    """Ground and lighter ink, [3] each, a random contrast apart."""
    contrast = random.uniform(0.25, 0.75)
    middle = random.uniform(contrast / 2 + 0.1, 0.9 - contrast / 2)
    tints = random.normal(0, 0.05, (2, 3))
    ground, ink = middle - contrast / 2 + tints[0], middle + contrast / 2 + tints[1]
    return ground.astype(np.float32), ink.astype(np.float32)


def _texture(random: np.random.Generator) -> Floats:
    """A ground of noise at several scales and, half of the time, a grating."""
    texture = sum(_noise(random, cells) * random.uniform(0, 0.22) for cells in (3, 7, 14, 28))
    if random.random() < 0.5:
        angle, period = random.uniform(0, np.pi), random.uniform(5, 30)
        rows, columns = np.mgrid[:SIDE, :SIDE]
        phase = (rows * np.sin(angle) + columns * np.cos(angle)) * 2 * np.pi / period + random.uniform(0, 2 * np.pi)
        texture = texture + np.sin(phase) * random.uniform(0, 0.2)
    return np.asarray(texture, np.float32)


def _noise(random: np.random.Generator, cells: int) -> Floats:
    """Smooth noise of standard deviation about 1 with that many cells to a side."""
    coarse = Image.fromarray(random.normal(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)


def _near(mask: Floats) -> Floats:
    """1 on the digit and around it, falling off: clutter fades there, so that the digit stays readable."""
    small = Image.fromarray(mask).reduce(8)
    near: Floats = np.sqrt(np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).clip(0, 1))
    return near


def write(directory: Path, part: Part, count: int, *, by_class: bool, first: int = 0) -> Iterator[Path]:
    """`count` canvases of a part as PNG files, one at a time, from number `first` on; what is there already is kept.

    In a folder for each class, or in one folder that says nothing of labels. Raises BadRequest for less than one and for
    a `first` below 0, WriteFailed where the system refuses to write.
    """
    if count < 1 or first < 0:
        raise BadRequest(f"--count {count} and --first {first} were asked for.", "Give at least 1, from number 0 on.")
    labels, members = scans()[1], split()[part]
    for index in range(first, first + count):
        path = directory / f"canvas_{index:05}.png"
        if by_class:
            # Test canvases are known without drawing them; training canvases are not.
            label = int(labels[members[index % len(members)]]) if part == "test" else draw(part, index).label
            path = directory / LABELS[label] / path.name
        if not path.exists():
            written = io.BytesIO()
            Image.fromarray(draw(part, index).pixels).save(written, format="PNG", compress_level=1)
            write_bytes(path, written.getvalue())
        yield path


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    found = argparse.ArgumentParser(description="Write canvases as PNG files.")
    found.add_argument("--part", choices=("train", "test"), required=True, help="Whose scans they show.")
    found.add_argument("--count", type=int, required=True, help="How many.")
    found.add_argument("--first", type=int, default=0, help="Number of the first.")
    found.add_argument("--by-class", action="store_true", help="A folder for each class; otherwise one for all.")
    found.add_argument("--out", type=Path, required=True, help="The folder.")
    return found


def main() -> None:
    given = parser().parse_args()

    def run() -> None:
        written = write(given.out, given.part, given.count, by_class=given.by_class, first=given.first)
        print(sum(1 for _ in written), "canvases in", given.out)

    run_and_exit(run)


if __name__ == "__main__":
    main()
