"""How a picture becomes a model's input: with Pillow and NumPy, as timm prepares pictures for evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import ValidationError

from ztp_deploy.errors import BadRequest, first_fault, suggestion
from ztp_deploy.source import Preprocessing

Transform = Callable[[Image.Image], NDArray[Any]]

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


def transform_for(preprocessing: Preprocessing, dtype: Literal["float32", "uint8"]) -> Transform:
    """timm's evaluation transform in Pillow and NumPy, bit for bit: RGB picture → [3, H, W]; uint8 stops before the normalisation.

    Raises BadRequest for an interpolation, a crop or numbers that are not known here.
    """
    resample, fitted = _known(preprocessing)
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))

    def apply(image: Image.Image) -> NDArray[Any]:
        pixels = np.ascontiguousarray(np.array(fitted(image, preprocessing, resample)).transpose(2, 0, 1))
        if dtype == "uint8":
            return pixels
        normalised: NDArray[Any] = (pixels.astype(np.float32) / np.float32(255) - mean) / std
        return normalised

    return apply


def _known(preprocessing: Preprocessing) -> tuple[Image.Resampling, Fitted]:
    """How it resizes, and what makes a picture as large as the input. Raises BadRequest."""
    resample, fitted = _RESAMPLING.get(preprocessing.interpolation), _CROPS.get(preprocessing.crop_mode)
    if resample is None:
        raise BadRequest(
            f"Pictures cannot be resized by interpolation={preprocessing.interpolation!r}.",
            f"Known are: {', '.join(_RESAMPLING)}.",
        )
    if fitted is None:
        raise BadRequest(
            f"Pictures cannot be cropped by crop_mode={preprocessing.crop_mode!r}.", f"Known are: {', '.join(_CROPS)}."
        )
    if not all(0 < value < math.inf for value in (preprocessing.crop_pct, *preprocessing.std)):
        raise BadRequest(
            f"Pictures cannot be prepared with crop_pct={preprocessing.crop_pct} and std={list(preprocessing.std)}.",
            "All of these are numbers above zero.",
        )
    if not all(map(math.isfinite, preprocessing.mean)):
        raise BadRequest(
            f"Pictures cannot be prepared with mean={list(preprocessing.mean)}.", "All of these are numbers."
        )
    if min(_scaled(preprocessing)) < 1:
        raise BadRequest(
            f"Pictures cannot be prepared with crop_pct={preprocessing.crop_pct}: nothing would be left of them.",
            "It is the share of a picture's side that is looked at, such as 0.875.",
        )
    return resample, fitted


def adapted(usual: Preprocessing, wanted: Preprocessing | Mapping[str, Any]) -> Preprocessing:
    """A model's preprocessing with what its user knows better: the fields that differ, or all of them.

    Raises BadRequest for a field that there is not, for what `transform_for` refuses, for a crop in percent, for means and
    deviations of pixels from 0 to 255, and for another size of the input, which is the model's.
    """
    if not isinstance(wanted, (Preprocessing, Mapping)):
        raise BadRequest(
            f"preprocessing is a {type(wanted).__name__}, not a preprocessing.",
            "Give a Preprocessing, or its fields that differ in a dict, such as {'crop_pct': 1.0}.",
        )
    known = [name for name in Preprocessing.model_fields if name != "input_size"]
    fields = dict(wanted)
    for name in fields:
        if name not in Preprocessing.model_fields:
            raise BadRequest(f"Preprocessing has no {name!r}.", suggestion(name, known))
    try:
        found = Preprocessing(**{**dict(usual), **fields})
    except ValidationError as error:
        where, why = first_fault(error, "preprocessing", depth=1)
        raise BadRequest(
            f"Preprocessing has no {where}={fields.get(where)!r}: {why}.",
            "Means and standard deviations are three numbers, crop_pct is one, interpolation and crop_mode are names.",
        ) from error
    if found.input_size != usual.input_size:
        raise BadRequest(
            f"The preprocessing says input_size={fields['input_size']}, which is not its to say: the model takes "
            f"{usual.input_size}.",
            "Leave it out; --img-size, in Python overrides={'img_size': …}, changes the model's.",
        )
    _known(found)
    if not 0.1 <= found.crop_pct <= 2:
        raise BadRequest(
            f"crop_pct={found.crop_pct:g} is not the share of a picture's side that is looked at.",
            "Give a share such as 0.875, or 1 for all of it; it is not a percentage.",
        )
    if max(*found.mean, *found.std) > 1 or min(found.mean) < 0:
        raise BadRequest(
            f"mean={list(found.mean)} and std={list(found.std)} are not those of pixels from 0 to 1.",
            "Divide by 255, means and standard deviations alike, where yours are of pixels from 0 to 255.",
        )
    return found


def _center(image: Image.Image, preprocessing: Preprocessing, resample: Image.Resampling) -> Image.Image:
    """Resized so that the input fits into it, then cropped."""
    _, height, width = preprocessing.input_size
    if height == width:
        short = _scaled(preprocessing)[1]
        long = int(short * max(image.size) / min(image.size))
        size = (short, long) if image.width <= image.height else (long, short)
    else:
        size = _by_ratio(image, preprocessing, min)
    return _cropped(_resized(image, size, resample), width, height, (0, 0, 0))


def _squash(image: Image.Image, preprocessing: Preprocessing, resample: Image.Resampling) -> Image.Image:
    """Both sides resized for themselves."""
    _, height, width = preprocessing.input_size
    return _cropped(_resized(image, _scaled(preprocessing), resample), width, height, (0, 0, 0))


def _border(image: Image.Image, preprocessing: Preprocessing, resample: Image.Resampling) -> Image.Image:
    """Resized so that it fits into the input, the rest filled with the mean."""
    _, height, width = preprocessing.input_size
    red, green, blue = (round(255 * value) for value in preprocessing.mean)
    size = _by_ratio(image, preprocessing, max)
    if not all(size):
        raise BadRequest(
            f"A picture of {image.width} x {image.height} pixels is too narrow: nothing is left of it in {width} x {height}.",
            "Take it out, or crop it.",
        )
    return _cropped(_resized(image, size, resample), width, height, (red, green, blue))


def _scaled(preprocessing: Preprocessing) -> tuple[int, int]:
    """Width and height that the crop is taken from."""
    _, height, width = preprocessing.input_size
    return math.floor(width / preprocessing.crop_pct), math.floor(height / preprocessing.crop_pct)


def _by_ratio(
    image: Image.Image, preprocessing: Preprocessing, which: Callable[[float, float], float]
) -> tuple[int, int]:
    """The picture's own proportions, by the smaller or the larger of the ratios of its sides to the wanted ones."""
    width, height = _scaled(preprocessing)
    ratio = which(image.height / height, image.width / width)
    return round(image.width / ratio), round(image.height / ratio)


def _resized(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    return image if image.size == size else image.resize(size, resample)


def _cropped(image: Image.Image, width: int, height: int, fill: tuple[int, int, int]) -> Image.Image:
    """The middle of a picture; one that is smaller is framed, an odd pixel to the right and below."""
    wide, high = max(0, width - image.width), max(0, height - image.height)
    if wide or high:
        frame = (wide // 2, high // 2, (wide + 1) // 2, (high + 1) // 2)
        image = ImageOps.expand(image, border=frame, fill=fill)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


Fitted = Callable[[Image.Image, Preprocessing, Image.Resampling], Image.Image]
_CROPS: dict[str, Fitted] = {"center": _center, "squash": _squash, "border": _border}


def open_image(image: Image.Image | NDArray[Any] | Path | str) -> Image.Image:
    """A picture in RGB, as timm's own loaders make it: EXIF rotation is not applied, transparency is dropped.

    An array is uint8 [H, W, 3] in RGB. 16-bit greys are scaled to 8 bits. Raises BadRequest for what is not a readable image.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(image, "The image")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise BadRequest(
                f"An array of {image.dtype} {list(image.shape)} is not a picture.",
                "Give uint8 arrays [H, W, 3] in RGB (from OpenCV: image[..., ::-1]), PIL images or paths.",
            )
        return Image.fromarray(np.ascontiguousarray(image))
    if not isinstance(image, (str, Path)):
        raise BadRequest(
            f"{type(image).__name__} is not a picture.", "Give PIL images, paths, or uint8 arrays [H, W, 3] in RGB."
        )
    path = Path(image)
    if path.is_dir():
        raise BadRequest(f"{path} is a folder, not a file.", f"Give the images in it, such as {path}/*.jpg.")
    if not path.is_file():
        raise BadRequest(f"There is no file {path}.", "Check the path.")
    try:
        with Image.open(path) as opened:
            return _to_rgb(opened, str(path))
    except UnidentifiedImageError as error:
        raise BadRequest(
            f"{path} is not an image that Pillow can read.", "Take it out, or convert it to PNG or JPEG."
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadRequest(f"{path} cannot be read: {error}.", "Take it out, or save it again.") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadRequest(f"{name} has {image.mode} pixels, whose range is not known.", "Save it with 8 bits a channel.")
    return image.convert("RGB")
