"""Where a model came from: its name and sizes, its weights, how a picture becomes its input. Records, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ztp_deploy.errors import BadRequest


class ModelSize(BaseModel):
    """Sizes that override those of a named model; None keeps its own. Image and patch sides in pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    img_size: int | None = Field(default=None, ge=1)
    patch_size: int | None = Field(default=None, ge=1)
    embed_dim: int | None = Field(default=None, ge=1)
    depth: int | None = Field(default=None, ge=1)
    num_heads: int | None = Field(default=None, ge=1)
    mlp_ratio: float | None = Field(default=None, gt=0)
    num_classes: int | None = Field(default=None, ge=2)

    def given(self) -> dict[str, Any]:
        """The sizes that were set."""
        return self.model_dump(exclude_none=True)


class Preprocessing(BaseModel):
    """How an image becomes the model's input, in timm's terms (`timm.data.create_transform`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_size: tuple[int, int, int]
    interpolation: str = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_pct: float = 0.875
    crop_mode: str = "center"


class Weights(BaseModel):
    """Where the weights came from; `sha256` is over names, shapes and bytes of the state dict."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["pretrained", "random", "file", "given"]
    origin: str
    licence: str | None = None
    sha256: str

    @property
    def shown(self) -> str:
        """For reports, which others read: a file goes by its name alone."""
        return f"{self.kind} ({Path(self.origin).name if self.kind == 'file' else self.origin})"


class Source(BaseModel):
    """What a model is: its name here, its timm architecture, weights, preprocessing, class names.

    `own`: what of these last two its user gave and the model would not have by itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    family: str
    architecture: str | None
    size: ModelSize = ModelSize()
    weights: Weights
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None = None
    own: tuple[Literal["labels", "preprocessing"], ...] = ()


def check_labels(labels: Sequence[str], classes: int) -> tuple[str, ...]:
    """The class names. Raises BadRequest unless there is one for each of the classes, each its own, in one line of text."""
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise BadRequest(
            f"labels is a {type(labels).__name__}, not a list of class names.",
            "Give a list of names, in the order of classes.",
        )
    first: dict[str, int] = {}
    for number, name in enumerate(labels, 1):
        if not isinstance(name, str) or not name or name != name.strip() or not name.isprintable():
            raise BadRequest(
                f"Class name {number} is {name!r}, which is not one line of text without spaces around it.",
                "Give every class a name; in a file one a line, without empty lines between them.",
            )
        if name in first:
            raise BadRequest(
                f"Class names {first[name]} and {number} are both {name!r}.", "Give every class a name of its own."
            )
        first[name] = number
    if len(labels) != classes:
        raise BadRequest(
            f"{len(labels)} class {'name was' if len(labels) == 1 else 'names were'} given, and the model tells {classes} classes apart.",
            f"Give {classes} names, in the order of classes, or say how many classes your checkpoint has: --num-classes, "
            "in Python overrides={'num_classes': …}.",
        )
    return tuple(labels)


def read_labels(path: Path) -> tuple[str, ...]:
    """The lines of a text file in UTF-8, without blank ones at its end. Raises BadRequest where it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror or str(error)
        raise BadRequest(
            f"--labels {str(path)!r} cannot be read: {why}.",
            "Give a text file in UTF-8 with one class name a line, in the order of classes.",
        ) from error
    while lines and not lines[-1].strip():
        lines.pop()
    return tuple(lines)
