"""A whole Zero-TPrune stage as one operator of torch, `ztp::zero_tprune`: its block's attention and what it chooses.

A program holds it by name. On an NVIDIA GPU it is the kernels of `zero_tprune_triton`, elsewhere what `zero_tprune` says;
a compiler gets either written out (`write_out`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ztp_deploy.methods.zero_tprune import Options, Selection, Starts, score_names, select
from ztp_deploy.plan import Stage

if TYPE_CHECKING:
    from torch import fx

    from ztp_deploy.models.base import Attention

MAX_TOKENS = 256
"""So many columns of attention, for a few rows, fit the registers of a GPU's processor."""
MAX_WIDTH = 64
"""So wide may a head be for the keys and values of so many tokens to fit its shared memory."""
CAPABILITY = (8, 0)
"""The first GPUs whose processors have that much."""
_ALL = torch.finfo(torch.float32).max
"""The upper bound of a variance where every head counts."""


class Outcome(NamedTuple):
    """What attention makes of the values [B, H, N, d], kept patch slots [B, k] int64, and the scores, in float32.

    Scores are the five of a stage with an S-stage in the order of `score_names`; without one, the first three mean
    nothing.
    """

    mixed: Tensor
    kept: Tensor
    pre_score: Tensor
    pre_spread: Tensor
    similarity: Tensor
    score: Tensor
    spread: Tensor

    def selection(self, stage: Stage) -> Selection:
        """The choice, with the scores that the stage has."""
        return Selection(self.kept, {name: getattr(self, name) for name in score_names(stage)})


def misfit(attention: Attention, options: Options) -> str | None:
    """Why the operator does not cover a stage, as a clause; None where it does."""
    _, _, tokens, width = attention.queries.shape
    if attention.queries.dtype not in (torch.float16, torch.bfloat16):
        return "its kernels multiply in half precision"
    if tokens > MAX_TOKENS or width > MAX_WIDTH:
        return f"its kernels hold {MAX_TOKENS} tokens and heads {MAX_WIDTH} wide"
    if attention.bias is not None:
        return "its kernels know no bias of attention"
    if options.partition != "importance" or options.metric not in ("cosine", "dot"):
        return "its kernels compare with the important half, by products"
    if options.features != "keys" or options.feature_heads != "concatenated":
        return "its kernels compare keys, all heads together"
    if options.temperature != 1:
        return "its kernels vote with the attention that mixes the values"
    return None


def decide(attention: Attention, stage: Stage, starts: Starts, special_tokens: int, options: Options) -> Outcome:
    """The operator on a block's attention; `misfit` must have been None."""
    low, high = options.variance_bounds or (0.0, _ALL)
    return Outcome(
        *zero_tprune(
            attention.queries,
            attention.keys,
            attention.values,
            starts.everyone,
            starts.survivors,
            attention.scale,
            special_tokens,
            stage.static["similar"],
            stage.static["rounds"],
            stage.tokens_out,
            low,
            high,
            options.heads == "mean",
            options.renormalise,
            options.metric == "cosine",
        )
    )


def write_out(module: fx.GraphModule, kernels: bool) -> bool:
    """Replaces every such operator by its kernels or by torch's operators, for a compiler; False where there is none.

    What is traced of a module with kernels holds them by their numbers in this process: it cannot be saved.
    """
    found = [node for node in module.graph.nodes if node.target is torch.ops.ztp.zero_tprune.default]
    for node in found:
        node.target = _kernels if kernels else _plain
    module.recompile()
    return bool(found)


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels run on a device: NVIDIA GPUs of compute capability 8.0 or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY


@torch.library.custom_op("ztp::zero_tprune", mutates_args=())
def zero_tprune(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    start_of_survivors: Tensor,
    scale: float,
    special_tokens: int,
    similar: int,
    rounds: int,
    kept: int,
    low: float,
    high: float,
    mean: bool,
    renormalise: bool,
    cosine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, N, d] and start votes [N] → an `Outcome`, by the options of `zero_tprune`."""
    return _plain(
        queries, keys, values, start, start_of_survivors, scale, special_tokens, similar, rounds, kept, low, high,
        mean, renormalise, cosine,
    )  # fmt: skip


def _plain(
    queries: Tensor, keys: Tensor, values: Tensor, start: Tensor, start_of_survivors: Tensor, scale: float,
    special_tokens: int, similar: int, rounds: int, kept: int, low: float, high: float,
    mean: bool, renormalise: bool, cosine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """In torch's own operators."""
    options = Options(
        variance_bounds=None if high == _ALL else (low, high),
        heads="mean" if mean else "rms",
        renormalise=renormalise,
        metric="cosine" if cosine else "dot",
    )
    tokens_in = queries.shape[2] - special_tokens
    static = {"similar": similar, "rounds": rounds}
    stage = Stage(block=1, place="after_block", tokens_in=tokens_in, tokens_out=kept, static=static)
    probabilities = ((queries * scale) @ keys.transpose(-2, -1)).softmax(-1)
    mixed = probabilities @ values
    chosen = select(
        probabilities.float(),
        keys,
        stage,
        Starts(start, start_of_survivors),
        special_tokens=special_tokens,
        options=options,
    )
    # Tokens lie before heads, as the kernels write them and the projection behind reads them.
    found = {"mixed": mixed.transpose(1, 2).contiguous().transpose(1, 2), "kept": chosen.kept.contiguous()}
    scores = {name: value.contiguous() for name, value in chosen.scores.items()}
    return _empty(queries, special_tokens, kept)._replace(**found, **scores)


@zero_tprune.register_fake
def _fake(
    queries: Tensor, keys: Tensor, values: Tensor, start: Tensor, start_of_survivors: Tensor, scale: float,
    special_tokens: int, similar: int, rounds: int, kept: int, *flags: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _empty(queries, special_tokens, kept)


@zero_tprune.register_kernel("cuda")
def _on_cuda(queries: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return (_kernels if has_kernels(queries.device) else _plain)(queries, *arguments)


def _kernels(*arguments: Any) -> tuple[Tensor, ...]:
    from ztp_deploy.methods import zero_tprune_triton

    return zero_tprune_triton.run(*arguments)


def _empty(queries: Tensor, special_tokens: int, kept: int) -> Outcome:
    """Zeros in the shapes, types and layout of an outcome."""
    batch, heads, tokens, width = queries.shape
    patches = tokens - special_tokens

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return queries.new_zeros(shape, dtype=dtype)

    return Outcome(
        mixed=zeros(batch, tokens, heads, width, dtype=queries.dtype).transpose(1, 2),
        kept=zeros(batch, kept, dtype=torch.int64),
        pre_score=zeros(batch, patches),
        pre_spread=zeros(batch, heads, 1),
        similarity=zeros(batch, patches // 2),
        score=zeros(batch, patches),
        spread=zeros(batch, heads, 1),
    )
