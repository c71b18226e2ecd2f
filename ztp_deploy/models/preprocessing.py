"""How a picture becomes a model's input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ztp_deploy.errors import BadRequest
from ztp_deploy.models.base import Preprocessing

Transform = Callable[[Image.Image], NDArray[Any]]


def transform_for(preprocessing: Preprocessing, dtype: Literal["float32", "uint8"]) -> Transform:
    """timm's own evaluation transform: PIL image → [3, H, W]; uint8 stops before the normalisation."""
    from timm.data import create_transform

    transform = create_transform(**preprocessing.model_dump(), is_training=False, normalize=dtype == "float32")

    def apply(image: Image.Image) -> NDArray[Any]:
        prepared: NDArray[Any] = np.asarray(transform(image))
        return prepared

    return apply


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
