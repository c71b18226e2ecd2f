"""Where a model came from: its name and sizes, its weights, how a picture becomes its input. Records, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


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
    """What a model is: its name here, its timm architecture, weights, preprocessing, class names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    family: str
    architecture: str | None
    size: ModelSize = ModelSize()
    weights: Weights
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None = None
