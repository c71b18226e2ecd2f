"""Photographs for proofs, prepared as a model's input."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ztp_deploy.defaults import CHECK_IMAGES
from ztp_deploy.errors import BadRequest
from ztp_deploy.preprocessing import open_image, transform_for
from ztp_deploy.source import Preprocessing

DEFAULT_ORIGIN = "crops of scikit-learn's sample photographs"
_OF_THE_SYSTEM = ("thumbs.db", "desktop.ini")
"""Files that Windows leaves in folders of pictures."""
_CROP_SIDES = (160, 200, 240, 280, 320, 360, 400)


@dataclass(frozen=True)
class ImageSet:
    """Pictures as model input [M, 3, H, W], where they came from, and a hash of the pixels.

    `shared`: how many of a set for calibration are also in the set for checks.
    """

    pixels: NDArray[Any]
    names: tuple[str, ...]
    origin: str
    shared: int = 0

    @property
    def sha256(self) -> str:
        """Hash over the prepared pixels."""
        return hashlib.sha256(np.ascontiguousarray(self.pixels).tobytes()).hexdigest()


def load_images(
    folder: Path | str | None,
    preprocessing: Preprocessing,
    dtype: Literal["float32", "uint8"],
    count: int = CHECK_IMAGES,
    purpose: Literal["check", "calibration"] = "check",
) -> ImageSet:
    """`count` prepared pictures: evenly picked from a folder (sub-folders too), or the default crops.

    Pictures for calibration are others than those for checks, and where a folder has too few others, those as well.
    Raises BadRequest for a missing or empty folder and for any file in it that is not an image.
    """
    if count < 1:
        raise BadRequest(f"count={count} images were asked for.", "Ask for at least 1.")
    transform = transform_for(preprocessing, dtype)
    if folder is None:
        crops = photograph_crops(count, first=0 if purpose == "check" else CHECK_IMAGES)
        pixels = np.stack([transform(crop) for crop in crops.values()])
        return ImageSet(pixels, tuple(crops), f"{count} {DEFAULT_ORIGIN}")
    root = Path(folder)
    files = image_files(root)
    checked = _evenly(files, count)
    chosen = checked if purpose == "check" else _other_than(checked, files, count)
    pixels = np.stack([transform(open_image(path)) for path in chosen])
    names = tuple(str(path.relative_to(root)) for path in chosen)
    shared = len(set(chosen) & set(checked)) if purpose == "calibration" else 0
    return ImageSet(pixels, names, f"{len(chosen)} of {len(files)} images in {root.name}", shared)


def photograph_crops(count: int, first: int = 0) -> dict[str, Image.Image]:
    """Distinct square crops of scikit-learn's photographs, the same everywhere, from the `first` on.

    Sides cycle through 160 … 400 pixels, positions follow a low-discrepancy sequence.
    """
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    photographs = [Image.fromarray(np.asarray(picture)) for picture in samples.images]
    names = [Path(name).stem for name in samples.filenames]
    crops: dict[str, Image.Image] = {}
    for index in range(first, first + count):
        which = index % len(photographs)
        photograph = photographs[which]
        side = _CROP_SIDES[index // len(photographs) % len(_CROP_SIDES)]
        # R2 sequence (powers of the plastic number): positions that never repeat.
        left = int((photograph.width - side) * math.modf(0.5 + index * 0.7548776662466927)[0])
        top = int((photograph.height - side) * math.modf(0.5 + index * 0.5698402909980532)[0])
        crops[f"{names[which]}[{left},{top},{side}]"] = photograph.crop((left, top, left + side, top + side))
    return crops


def image_files(root: Path) -> list[Path]:
    """All files of a folder and its sub-folders, hidden ones apart.

    Raises BadRequest for a missing or empty folder and for a file whose name is not an image's.
    """
    if not root.is_dir():
        raise BadRequest(f"images={str(root)!r} is not a folder.", "Give a folder of photographs.")
    files, strange = listed_files(root)
    if strange:
        raise BadRequest(f"{first_of(strange)} is not an image.", "Keep only photographs in the folder.")
    if not files:
        raise BadRequest(f"images={str(root)!r} holds no images.", "Give a folder of photographs.")
    return files


def listed_files(root: Path) -> tuple[list[Path], list[Path]]:
    """All files of a folder and its sub-folders, hidden ones apart; and those of them whose name is not an image's."""
    known = Image.registered_extensions()
    files = sorted(path for path in root.rglob("*") if path.is_file() and not is_hidden(path.relative_to(root)))
    return files, [path for path in files if path.suffix.lower() not in known]


def first_of(things: Sequence[object]) -> str:
    """The first, and how many more there are."""
    return f"{things[0]}{f' (and {len(things) - 1} more)' if len(things) > 1 else ''}"


def is_hidden(path: Path) -> bool:
    """Whether a path below a folder of pictures is passed over: hidden, or the system's own."""
    return any(part.startswith(".") for part in path.parts) or path.name.lower() in _OF_THE_SYSTEM


def _evenly(files: Sequence[Path], count: int) -> list[Path]:
    picked = min(len(files), count)
    return [files[index * len(files) // picked] for index in range(picked)]


def _other_than(checked: Sequence[Path], files: Sequence[Path], count: int) -> list[Path]:
    """`count` files, of the checked ones only what is missing to that."""
    others = _evenly(sorted(set(files) - set(checked)), count)
    return others + _evenly(checked, count - len(others))
