"""What pruning needs to know of a backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from ztp_deploy.plan import Geometry
from ztp_deploy.pruning.tokens import TokenState

Value = TypeVar("Value")


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


# --- answers that many families give ------------------------------------------------------------


def own_keys(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`Family.translate` of families whose official checkpoints have the module's own keys."""
    return state


def of_another_family(model: nn.Module) -> bool:
    """`Family.adapts` of families whose modules are another's, and so is their host."""
    return False
