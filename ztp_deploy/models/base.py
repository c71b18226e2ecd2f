"""What pruning needs to know of a backbone, and where a model came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ztp_deploy.plan import Geometry
from ztp_deploy.pruning.tokens import TokenState

Value = TypeVar("Value")


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


class _once(Generic[Value]):
    """A property that is computed when it is first asked for; unlike `cached_property` one that torch.compile can trace."""

    def __init__(self, compute: Callable[[Any], Value]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Value:
        value = self._compute(instance)
        instance.__dict__[self._name] = value  # found there from now on
        return value


@dataclass(frozen=True)
class Attention:
    """One block's self-attention, heads first after the batch; what is not asked for is not computed.

    `inputs` [B, N, C] are the tokens that enter the block; queries, keys and values [B, H, N, d]; `bias` [B or 1, 1 or H,
    1 or N, N] is added to the logits. `decided`: what a stage's own operator computed in attention's place, the mixed
    values first.
    """

    inputs: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    bias: Tensor | None = None
    decided: Sequence[Tensor] = ()

    @_once
    def logits(self) -> Tensor:
        """[B, H, N, N], bias included."""
        logits = (self.queries * self.scale) @ self.keys.transpose(-2, -1)
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)

    @_once
    def probabilities(self) -> Tensor:
        """[B, H, N, N], rows sum to 1."""
        return self.logits.softmax(dim=-1)

    @_once
    def mixed(self) -> Tensor:
        """The heads' results [B, H, N, d]."""
        return self.decided[0] if self.decided else self.probabilities @ self.values


class Host(Protocol):
    """A backbone taken apart at the places where methods act; knows no method."""

    geometry: Geometry

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] → tokens [B, S + n, C] as they enter the first block, special tokens first."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks in order; each maps tokens to tokens by itself."""

    @property
    def classifiers(self) -> Sequence[nn.Module]:
        """The linear layers that yield the logits."""

    def mix(self, block: nn.Module, tokens: Tensor, state: TokenState) -> Tensor:
        """The attention half of a block with its residual, fused as the family does it."""

    def attention(self, block: nn.Module, tokens: Tensor, state: TokenState) -> Attention:
        """The block's attention computed openly."""

    def finish(self, block: nn.Module, tokens: Tensor, mixed: Tensor) -> Tensor:
        """The rest of the attention half: tokens [B, n, C] and the heads' results [B, H, n, d] for them → [B, n, C]."""

    def transform(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """The MLP half of a block with its residual; acts on every token by itself."""

    def read_out(self, tokens: Tensor, state: TokenState) -> Tensor:
        """Tokens after the last block → logits [B, classes]."""
