"""A Zero-TPrune stage on an NVIDIA GPU: its block's attention and all its choices in four kernels.

Attention is never written to memory. Kernel by kernel: `_attend` mixes the values and lets every query vote (I′),
`_compare` ranks and finds what resembles more important tokens (S), `_revote` votes among the rest (I),
`_choose` ranks them. Ranks are counted, not sorted: a token's rank is the number of those before it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

_LOG2_E = 1.4426950408889634
_LAUNCH = {"num_warps": 8, "num_stages": 1}
"""So 256 columns of 32 rows fit registers, and keys and values the shared memory of every GPU since compute capability 8.0."""
_ROWS = 32
_OUT_OF_BOUNDS = tl.constexpr(1e-12)
"""As in `zero_tprune`: what a head counts that VHF leaves out."""


@triton.jit
def _attend(
    queries, keys, values, start, mixed, votes, normalisers, scale,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One head of one image: its results, what each token receives of the start votes, and the rows' normalisers."""
    image = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    columns = tl.arange(0, COLUMNS)
    lanes = tl.arange(0, LANES)
    there = (columns < TOKENS)[:, None] & (lanes < WIDTH)[None, :]
    key = tl.load(
        keys + image * k_batch + head * k_head + columns[None, :] * k_token + lanes[:, None],
        mask=(columns < TOKENS)[None, :] & (lanes < WIDTH)[:, None], other=0.0,
    )  # fmt: skip
    value = tl.load(
        values + image * v_batch + head * v_head + columns[:, None] * v_token + lanes[None, :], mask=there, other=0.0
    )
    received = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, TOKENS, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < TOKENS)[:, None] & (lanes < WIDTH)[None, :]
        query = tl.load(
            queries + image * q_batch + head * q_head + rows[:, None] * q_token + lanes[None, :], mask=inside, other=0.0
        )
        logits = tl.dot(query, key) * scale
        logits = tl.where((columns < TOKENS)[None, :], logits, float("-inf"))
        top = tl.max(logits, 1)
        weights = tl.exp2(logits - top[:, None])
        total = tl.sum(weights, 1)
        result = tl.dot(weights.to(value.dtype), value) / total[:, None]
        tl.store(
            mixed + ((image * TOKENS + rows[:, None]) * HEADS + head) * WIDTH + lanes[None, :],
            result.to(value.dtype), mask=inside,
        )  # fmt: skip
        place = (image * HEADS + head) * TOKENS + rows
        tl.store(normalisers + place, top + tl.log2(total), mask=rows < TOKENS)
        vote = tl.load(start + rows, mask=rows < TOKENS, other=0.0) / total
        received += tl.sum(weights * vote[:, None], 0)
    tl.store(votes + (image * HEADS + head) * TOKENS + columns, received, mask=columns < TOKENS)


@triton.jit
def _join_heads(
    votes, taking_part, spreads, image, low, high,
    HEADS: tl.constexpr, HEADS_UP: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """EIR and VHF: scores [COLUMNS] of all heads' votes, whose spreads are written."""
    heads = tl.arange(0, HEADS_UP)
    columns = tl.arange(0, COLUMNS)
    there = (heads < HEADS)[:, None] & (columns < TOKENS)[None, :]
    vote = tl.load(votes + (image * HEADS + heads[:, None]) * TOKENS + columns[None, :], mask=there, other=0.0)
    deviation = tl.where(there, vote - taking_part[None, :], 0.0)
    spread = tl.sqrt(tl.sum(deviation * deviation, 1))
    tl.store(spreads + image * HEADS + heads, spread, mask=heads < HEADS)
    weighted = vote * tl.where((spread >= low) & (spread <= high), 1.0, _OUT_OF_BOUNDS)[:, None]
    if MEAN:
        return tl.sum(weighted, 0)
    return tl.sqrt(tl.sum(weighted * weighted, 0))


@triton.jit
def _ordered(score):
    """Scores that can be ranked whatever they are: what is no number comes first, as in torch's sorting."""
    return tl.where(score == score, score, float("inf"))


@triton.jit
def _ranks(
    score, scores, first, SPECIAL: tl.constexpr, PATCHES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Ranks [ROWS] of the patches from `first` on among score [COLUMNS], which also lies at `scores`.

    They are a permutation whatever the scores are: what is addressed by them lies within its image.
    """
    columns = tl.arange(0, COLUMNS) - SPECIAL
    rows = first + tl.arange(0, ROWS)
    own = _ordered(tl.load(scores + rows, mask=rows < PATCHES, other=0.0))
    score = _ordered(score)
    ahead = (score[None, :] > own[:, None]) | ((score[None, :] == own[:, None]) & (columns[None, :] < rows[:, None]))
    patch = (columns >= 0) & (columns < PATCHES)
    return tl.sum((ahead & patch[None, :]).to(tl.int32), 1)


@triton.jit
def _compare(
    votes, keys, scores, spreads, order, likenesses, dropped, low, high, k_batch, k_head, k_token,
    HEADS: tl.constexpr, HEADS_UP: tl.constexpr, TOKENS: tl.constexpr, SPECIAL: tl.constexpr, WIDTH: tl.constexpr,
    SIMILAR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr, HALF_UP: tl.constexpr,
    MEAN: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """One image: ranks all patches, matches the less important half with the other, marks the most alike as dropped."""
    image = tl.program_id(0).to(tl.int64)
    PATCHES: tl.constexpr = TOKENS - SPECIAL
    MORE: tl.constexpr = PATCHES - PATCHES // 2
    LESS: tl.constexpr = PATCHES // 2
    columns = tl.arange(0, COLUMNS)
    score = _join_heads(
        votes, tl.full([COLUMNS], 1.0, tl.float32), spreads, image, low, high, HEADS, HEADS_UP, TOKENS, COLUMNS, MEAN
    )
    patch = (columns >= SPECIAL) & (columns < TOKENS)
    tl.store(scores + image * PATCHES + columns - SPECIAL, score, mask=patch)
    tl.store(dropped + image * TOKENS + columns, tl.zeros([COLUMNS], tl.float32), mask=columns < TOKENS)
    tl.debug_barrier()
    for first in range(0, PATCHES, ROWS):
        rows = first + tl.arange(0, ROWS)
        rank = _ranks(score, scores + image * PATCHES, first, SPECIAL, PATCHES, ROWS, COLUMNS)
        tl.store(order + image * PATCHES + rank, rows, mask=rows < PATCHES)
    tl.debug_barrier()
    half = tl.arange(0, HALF_UP)
    lanes = tl.arange(0, LANES)
    less = tl.load(order + image * PATCHES + MORE + half, mask=half < LESS, other=0) + SPECIAL
    more = tl.load(order + image * PATCHES + half, mask=half < MORE, other=0) + SPECIAL
    likeness = tl.zeros([HALF_UP, HALF_UP], tl.float32)
    less_squared = tl.zeros([HALF_UP], tl.float32)
    more_squared = tl.zeros([HALF_UP], tl.float32)
    for head in range(HEADS):
        base = keys + image * k_batch + head * k_head
        ones = tl.load(
            base + less[:, None] * k_token + lanes[None, :],
            mask=(half < LESS)[:, None] & (lanes < WIDTH)[None, :], other=0.0,
        )  # fmt: skip
        others = tl.load(
            base + more[None, :] * k_token + lanes[:, None],
            mask=(half < MORE)[None, :] & (lanes < WIDTH)[:, None], other=0.0,
        )  # fmt: skip
        likeness += tl.dot(ones, others)
        if COSINE:
            less_squared += tl.sum(ones.to(tl.float32) * ones.to(tl.float32), 1)
            more_squared += tl.sum(others.to(tl.float32) * others.to(tl.float32), 0)
    if COSINE:
        likeness = likeness / tl.maximum(tl.sqrt(more_squared), 1e-12)[None, :]
    best = tl.max(tl.where((half < MORE)[None, :], likeness, float("-inf")), 1)
    if COSINE:
        best = best / tl.maximum(tl.sqrt(less_squared), 1e-12)
    tl.store(likenesses + image * LESS + half, best, mask=half < LESS)
    best = _ordered(best)
    ahead = (best[None, :] > best[:, None]) | ((best[None, :] == best[:, None]) & (half[None, :] < half[:, None]))
    rank = tl.sum((ahead & (half < LESS)[None, :]).to(tl.int32), 1)
    tl.store(
        dropped + image * TOKENS + less, tl.full([HALF_UP], 1.0, tl.float32), mask=(half < LESS) & (rank < SIMILAR)
    )


@triton.jit
def _revote(
    queries, keys, start, normalisers, dropped, votes, scale,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, LEFT: tl.constexpr, ROUNDS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr, RENORMALISE: tl.constexpr,
):  # fmt: skip
    """One head of one image: `ROUNDS` votes among the `LEFT` tokens that are not dropped."""
    image = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    columns = tl.arange(0, COLUMNS)
    lanes = tl.arange(0, LANES)
    key = tl.load(
        keys + image * k_batch + head * k_head + columns[None, :] * k_token + lanes[:, None],
        mask=(columns < TOKENS)[None, :] & (lanes < WIDTH)[:, None], other=0.0,
    )  # fmt: skip
    stays = 1.0 - tl.load(dropped + image * TOKENS + columns, mask=columns < TOKENS, other=1.0)
    base = (image * HEADS + head) * TOKENS
    for turn in range(ROUNDS):
        received = tl.zeros([COLUMNS], tl.float32)
        for first in range(0, TOKENS, ROWS):
            rows = first + tl.arange(0, ROWS)
            query = tl.load(
                queries + image * q_batch + head * q_head + rows[:, None] * q_token + lanes[None, :],
                mask=(rows < TOKENS)[:, None] & (lanes < WIDTH)[None, :], other=0.0,
            )  # fmt: skip
            normaliser = tl.load(normalisers + base + rows, mask=rows < TOKENS, other=0.0)
            weights = tl.exp2(tl.dot(query, key) * scale - normaliser[:, None])
            # A row of very low logits would give columns beyond the last token an infinite weight.
            weights = tl.where((columns < TOKENS)[None, :], weights, 0.0)
            if turn == 0:
                vote = tl.load(start + rows, mask=rows < TOKENS, other=0.0)
            else:
                vote = tl.load(votes + base + rows, mask=rows < TOKENS, other=0.0)
            vote *= 1.0 - tl.load(dropped + image * TOKENS + rows, mask=rows < TOKENS, other=1.0)
            if RENORMALISE:
                vote /= tl.maximum(tl.sum(weights * stays[None, :], 1), 1e-30)
            received += tl.sum(weights * vote[:, None], 0)
        received *= stays
        if not RENORMALISE:
            received /= tl.maximum(tl.sum(received, 0) / LEFT, 1e-30)
        tl.debug_barrier()
        tl.store(votes + base + columns, received, mask=columns < TOKENS)
        tl.debug_barrier()


@triton.jit
def _choose(
    votes, dropped, scores, spreads, kept, low, high,
    HEADS: tl.constexpr, HEADS_UP: tl.constexpr, TOKENS: tl.constexpr, SPECIAL: tl.constexpr, KEPT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """One image: ranks what is left and lists the best patches."""
    image = tl.program_id(0).to(tl.int64)
    PATCHES: tl.constexpr = TOKENS - SPECIAL
    columns = tl.arange(0, COLUMNS)
    gone = tl.load(dropped + image * TOKENS + columns, mask=columns < TOKENS, other=0.0)
    score = _join_heads(
        votes, 1.0 - gone, spreads, image, low, high, HEADS, HEADS_UP, TOKENS, COLUMNS, MEAN
    ) - gone  # fmt: skip
    tl.store(scores + image * PATCHES + columns - SPECIAL, score, mask=(columns >= SPECIAL) & (columns < TOKENS))
    tl.debug_barrier()
    for first in range(0, PATCHES, ROWS):
        rows = first + tl.arange(0, ROWS)
        rank = _ranks(score, scores + image * PATCHES, first, SPECIAL, PATCHES, ROWS, COLUMNS)
        tl.store(kept + image * KEPT + rank, rows.to(tl.int64), mask=(rows < PATCHES) & (rank < KEPT))


def run(
    queries: Tensor, keys: Tensor, values: Tensor, start: Tensor, start_of_survivors: Tensor, scale: float,
    special: int, similar: int, rounds: int, kept: int, low: float, high: float,
    mean: bool, renormalise: bool, cosine: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See `zero_tprune_op.zero_tprune`, whose arguments and results these are; on the device of `queries`."""
    batch, heads, tokens, width = queries.shape
    patches = tokens - special
    queries, keys, values = (
        tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (queries, keys, values)
    )

    def empty(*shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=queries.device)

    sizes = {"HEADS": heads, "TOKENS": tokens, "ROWS": _ROWS, "COLUMNS": _power_of_two(tokens)}
    lanes = {"WIDTH": width, "LANES": _power_of_two(width)}
    joined = {"HEADS_UP": _power_of_two(heads, least=1), "SPECIAL": special, "MEAN": mean}
    q, k, v = (tensor.stride()[:3] for tensor in (queries, keys, values))
    per_head, per_image = (batch * heads,), (batch,)
    within_all, within_left = (
        [(count * bound) ** 0.5 for bound in (low, high)] for count in (tokens, tokens - similar)
    )
    scale *= _LOG2_E

    mixed = empty(batch, tokens, heads, width, dtype=values.dtype)
    votes, normalisers = empty(batch, heads, tokens), empty(batch, heads, tokens)
    first = start if similar else start_of_survivors
    wrap_triton(_attend)[per_head](
        queries, keys, values, first, mixed, votes, normalisers, scale, *q, *k, *v, **sizes, **lanes, **_LAUNCH
    )
    pre_score, pre_spread = empty(batch, patches), empty(batch, heads, 1)
    similarity = empty(batch, patches // 2)
    if similar:
        dropped, order = empty(batch, tokens), empty(batch, patches, dtype=torch.int32)
        wrap_triton(_compare)[per_image](
            votes, keys, pre_score, pre_spread, order, similarity, dropped, *within_all, *k, **sizes, **lanes, **joined,
            SIMILAR=similar, HALF_UP=_power_of_two(patches - patches // 2), COSINE=cosine, **_LAUNCH,
        )  # fmt: skip
    else:
        dropped = torch.zeros(batch, tokens, device=queries.device)
    if similar or rounds > 1:
        wrap_triton(_revote)[per_head](
            queries, keys, start_of_survivors, normalisers, dropped, votes, scale, *q, *k, **sizes, **lanes,
            LEFT=tokens - similar, ROUNDS=rounds, RENORMALISE=renormalise, **_LAUNCH,
        )  # fmt: skip
    score, spread = empty(batch, patches), empty(batch, heads, 1)
    chosen = empty(batch, kept, dtype=torch.int64)
    wrap_triton(_choose)[per_image](
        votes, dropped, score, spread, chosen, *within_left, **sizes, **joined, KEPT=kept, **_LAUNCH
    )
    return mixed.transpose(1, 2), chosen, pre_score, pre_spread, similarity, score, spread


def _power_of_two(number: int, least: int = 16) -> int:
    """The next one; a product's sides are 16 at least."""
    return max(least, int(triton.next_power_of_2(number)))
