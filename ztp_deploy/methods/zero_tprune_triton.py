"""A Zero-TPrune stage on an NVIDIA GPU: its block's attention and all its choices in four kernels.

Attention is never written to memory. Kernel by kernel: `_attend` mixes the values and lets every query vote (I′),
`_compare` ranks and finds what resembles more important tokens (S), `_withdraw` takes their votes back (I), or `_revote`
votes anew among the rest, `_choose` ranks them. Ranks are counted, not sorted: a token's rank is the number of those
before it. Numbers with a fraction are constants of a kernel: torch's compiler would hand them over in float64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

_LOG2_E = 1.4426950408889634
_OUT_OF_BOUNDS = tl.constexpr(1e-12)
"""As in `zero_tprune`: what a head counts that VHF leaves out."""
# As timed on an H200 in the kernels' first form (DeiT-S, batch 64 and 256), among those that spill no register.
_ATTEND = {"num_warps": 4, "num_stages": 2}
_COMPARE = {"ROWS": 16, "num_warps": 4, "num_stages": 1}
_WITHDRAW = {"num_stages": 1}
_REVOTE = {"ROWS": 32, "num_warps": 4, "num_stages": 1}
_CHOOSE = {"ROWS": 16, "num_warps": 4, "num_stages": 1}


@triton.jit
def _logits(query, key, FIRST: tl.constexpr, TOKENS: tl.constexpr, SCALE: tl.constexpr, COLUMNS: tl.constexpr):
    """Logits [rows, COLUMNS] of the columns from `FIRST` on, to base 2."""
    logits = tl.dot(query, key) * SCALE
    if FIRST + COLUMNS > TOKENS:
        columns = FIRST + tl.arange(0, COLUMNS)
        logits = tl.where((columns < TOKENS)[None, :], logits, float("-inf"))
    return logits


@triton.jit
def _key(
    keys, k_token, FIRST: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Keys of a head [LANES, COLUMNS] from `FIRST` on."""
    columns = FIRST + tl.arange(0, COLUMNS)
    lanes = tl.arange(0, LANES)
    there = (columns < TOKENS)[None, :] & (lanes < WIDTH)[:, None]
    return tl.load(keys + columns[None, :] * k_token + lanes[:, None], mask=there, other=0.0)


@triton.jit
def _value(
    values, v_token, FIRST: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Values of a head [COLUMNS, LANES] from `FIRST` on."""
    columns = FIRST + tl.arange(0, COLUMNS)
    lanes = tl.arange(0, LANES)
    there = (columns < TOKENS)[:, None] & (lanes < WIDTH)[None, :]
    return tl.load(values + columns[:, None] * v_token + lanes[None, :], mask=there, other=0.0)


@triton.jit
def _store_votes(votes, received, FIRST: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = FIRST + tl.arange(0, COLUMNS)
    tl.store(votes + columns, received, mask=columns < TOKENS)


@triton.jit
def _attend(
    queries, keys, values, start, mixed, votes, normalisers,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, SCALE: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One head of one image: its results, what each token receives of the start votes, and the rows' normalisers.

    Columns lie in up to three blocks of `A`, `B` and `C`: one power of two would hold up to twice as many as there are.
    """
    image = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    keys += image * k_batch + head * k_head
    values += image * v_batch + head * v_head
    base = (image * HEADS + head) * TOKENS
    lanes = tl.arange(0, LANES)
    key_a = _key(keys, k_token, 0, TOKENS, WIDTH, A, LANES)
    value_a = _value(values, v_token, 0, TOKENS, WIDTH, A, LANES)
    received_a = tl.zeros([A], tl.float32)
    if B > 0:
        key_b = _key(keys, k_token, A, TOKENS, WIDTH, B, LANES)
        value_b = _value(values, v_token, A, TOKENS, WIDTH, B, LANES)
        received_b = tl.zeros([B], tl.float32)
    if C > 0:
        key_c = _key(keys, k_token, A + B, TOKENS, WIDTH, C, LANES)
        value_c = _value(values, v_token, A + B, TOKENS, WIDTH, C, LANES)
        received_c = tl.zeros([C], tl.float32)
    for first in range(0, TOKENS, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < TOKENS)[:, None] & (lanes < WIDTH)[None, :]
        query = tl.load(
            queries + image * q_batch + head * q_head + rows[:, None] * q_token + lanes[None, :], mask=inside, other=0.0
        )
        logits_a = _logits(query, key_a, 0, TOKENS, SCALE, A)
        top = tl.max(logits_a, 1)
        if B > 0:
            logits_b = _logits(query, key_b, A, TOKENS, SCALE, B)
            top = tl.maximum(top, tl.max(logits_b, 1))
        if C > 0:
            logits_c = _logits(query, key_c, A + B, TOKENS, SCALE, C)
            top = tl.maximum(top, tl.max(logits_c, 1))
        weights_a = tl.exp2(logits_a - top[:, None])
        total = tl.sum(weights_a, 1)
        result = tl.dot(weights_a.to(value_a.dtype), value_a)
        if B > 0:
            weights_b = tl.exp2(logits_b - top[:, None])
            total += tl.sum(weights_b, 1)
            result = tl.dot(weights_b.to(value_a.dtype), value_b, result)
        if C > 0:
            weights_c = tl.exp2(logits_c - top[:, None])
            total += tl.sum(weights_c, 1)
            result = tl.dot(weights_c.to(value_a.dtype), value_c, result)
        tl.store(
            mixed + ((image * TOKENS + rows[:, None]) * HEADS + head) * WIDTH + lanes[None, :],
            (result / total[:, None]).to(value_a.dtype), mask=inside,
        )  # fmt: skip
        tl.store(normalisers + base + rows, top + tl.log2(total), mask=rows < TOKENS)
        vote = (tl.load(start + rows, mask=rows < TOKENS, other=0.0) / total)[:, None]
        received_a += tl.sum(weights_a * vote, 0)
        if B > 0:
            received_b += tl.sum(weights_b * vote, 0)
        if C > 0:
            received_c += tl.sum(weights_c * vote, 0)
    _store_votes(votes + base, received_a, 0, TOKENS, A)
    if B > 0:
        _store_votes(votes + base, received_b, A, TOKENS, B)
    if C > 0:
        _store_votes(votes + base, received_c, A + B, TOKENS, C)


@triton.jit
def _join_heads(
    votes, taking_part, spreads, image, LOW: tl.constexpr, HIGH: tl.constexpr,
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
    weighted = vote * tl.where((spread >= LOW) & (spread <= HIGH), 1.0, _OUT_OF_BOUNDS)[:, None]
    if MEAN:
        return tl.sum(weighted, 0)
    return tl.sqrt(tl.sum(weighted * weighted, 0))


@triton.jit
def _ordered(score):
    """Scores that can be ranked whatever they are: what is not a number comes first, as in torch's sorting."""
    return tl.where(score == score, score, float("inf"))


@triton.jit
def _ranks(score, scores, SPECIAL: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Ranks [COLUMNS] of `COUNT` scores that lie behind `SPECIAL` others and, without these, also at `scores`.

    They are a permutation whatever the scores are: what is addressed by them lies within its image. Each thread counts
    for its own scores: nothing is exchanged.
    """
    own = tl.arange(0, COLUMNS) - SPECIAL
    score = _ordered(score)
    rank = tl.zeros([COLUMNS], tl.int32)
    for first in range(0, COUNT, ROWS):
        others = first + tl.arange(0, ROWS)
        other = _ordered(tl.load(scores + others, mask=others < COUNT, other=float("-inf")))
        before = others[:, None] < own[None, :]
        ahead = (other[:, None] > score[None, :]) | ((other[:, None] == score[None, :]) & before)
        rank += tl.sum((ahead & (others < COUNT)[:, None]).to(tl.int32), 0)
    return rank


@triton.jit
def _compare(
    votes, keys, scores, spreads, order, likenesses, dropped, withdrawn, k_batch, k_head, k_token,
    LOW: tl.constexpr, HIGH: tl.constexpr,
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
        votes, tl.full([COLUMNS], 1.0, tl.float32), spreads, image, LOW, HIGH, HEADS, HEADS_UP, TOKENS, COLUMNS, MEAN
    )
    patch = (columns >= SPECIAL) & (columns < TOKENS)
    tl.store(scores + image * PATCHES + columns - SPECIAL, score, mask=patch)
    tl.store(dropped + image * TOKENS + columns, tl.zeros([COLUMNS], tl.float32), mask=columns < TOKENS)
    tl.debug_barrier()
    rank = _ranks(score, scores + image * PATCHES, SPECIAL, PATCHES, ROWS, COLUMNS)
    tl.store(order + image * PATCHES + rank, columns - SPECIAL, mask=patch)
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
    tl.debug_barrier()
    rank = _ranks(best, likenesses + image * LESS, 0, LESS, ROWS, HALF_UP)
    leaves = (half < LESS) & (rank < SIMILAR)
    tl.store(dropped + image * TOKENS + less, tl.full([HALF_UP], 1.0, tl.float32), mask=leaves)
    tl.store(withdrawn + image * SIMILAR + rank, less, mask=leaves)


@triton.jit
def _withdraw(
    queries, keys, start, start_of_survivors, normalisers, dropped, withdrawn, votes,
    q_batch, q_head, q_token, k_batch, k_head, k_token, SCALE: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, SPECIAL: tl.constexpr, WIDTH: tl.constexpr, SIMILAR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One head of one image: turns the first vote into one among those that are not dropped.

    Patches start alike in either, so only the dropped ones' votes and the difference of the special tokens' go.
    """
    image = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    columns = tl.arange(0, COLUMNS)
    lanes = tl.arange(0, LANES)
    slots = tl.arange(0, ROWS)
    leaves = (slots >= SPECIAL) & (slots < SPECIAL + SIMILAR)
    rows = tl.load(withdrawn + image * SIMILAR + slots - SPECIAL, mask=leaves, other=0)
    rows = tl.where(leaves, rows, slots)
    used = slots < SPECIAL + SIMILAR
    base = (image * HEADS + head) * TOKENS
    query = tl.load(
        queries + image * q_batch + head * q_head + rows[:, None] * q_token + lanes[None, :],
        mask=used[:, None] & (lanes < WIDTH)[None, :], other=0.0,
    )  # fmt: skip
    key = _key(keys + image * k_batch + head * k_head, k_token, 0, TOKENS, WIDTH, COLUMNS, LANES)
    normaliser = tl.load(normalisers + base + rows, mask=used, other=0.0)
    weights = tl.exp2(tl.dot(query, key) * SCALE - normaliser[:, None])
    # A row of very low logits would give columns beyond the last token an infinite weight.
    weights = tl.where((columns < TOKENS)[None, :] & used[:, None], weights, 0.0)
    ratio = tl.load(start_of_survivors + SPECIAL) / tl.load(start + SPECIAL)
    was = tl.load(start + rows, mask=used, other=0.0) * ratio
    remains = tl.where(leaves, 0.0, tl.load(start_of_survivors + rows, mask=used, other=0.0))
    stays = 1.0 - tl.load(dropped + image * TOKENS + columns, mask=columns < TOKENS, other=1.0)
    received = tl.load(votes + base + columns, mask=columns < TOKENS, other=0.0) * ratio
    received -= tl.sum(weights * (was - remains)[:, None], 0)
    # What only dropped ones had voted for may end below zero by rounding.
    received = tl.where(received < 0, 0.0, received) * stays
    received /= tl.maximum(tl.sum(received, 0) / (TOKENS - SIMILAR), 1e-30)
    tl.store(votes + base + columns, received, mask=columns < TOKENS)


@triton.jit
def _revote(
    queries, keys, start, normalisers, dropped, votes,
    q_batch, q_head, q_token, k_batch, k_head, k_token, SCALE: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, LEFT: tl.constexpr, ROUNDS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr, RENORMALISE: tl.constexpr,
):  # fmt: skip
    """One head of one image: `ROUNDS` votes among the `LEFT` tokens that are not dropped."""
    image = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    columns = tl.arange(0, COLUMNS)
    lanes = tl.arange(0, LANES)
    key = _key(keys + image * k_batch + head * k_head, k_token, 0, TOKENS, WIDTH, COLUMNS, LANES)
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
            weights = tl.exp2(tl.dot(query, key) * SCALE - normaliser[:, None])
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
    votes, dropped, scores, spreads, kept, LOW: tl.constexpr, HIGH: tl.constexpr,
    HEADS: tl.constexpr, HEADS_UP: tl.constexpr, TOKENS: tl.constexpr, SPECIAL: tl.constexpr, KEPT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """One image: ranks what is left and lists the best patches."""
    image = tl.program_id(0).to(tl.int64)
    PATCHES: tl.constexpr = TOKENS - SPECIAL
    columns = tl.arange(0, COLUMNS)
    gone = tl.load(dropped + image * TOKENS + columns, mask=columns < TOKENS, other=0.0)
    score = _join_heads(
        votes, 1.0 - gone, spreads, image, LOW, HIGH, HEADS, HEADS_UP, TOKENS, COLUMNS, MEAN
    ) - gone  # fmt: skip
    patch = (columns >= SPECIAL) & (columns < TOKENS)
    tl.store(scores + image * PATCHES + columns - SPECIAL, score, mask=patch)
    tl.debug_barrier()
    rank = _ranks(score, scores + image * PATCHES, SPECIAL, PATCHES, ROWS, COLUMNS)
    tl.store(kept + image * KEPT + rank, (columns - SPECIAL).to(tl.int64), mask=patch & (rank < KEPT))


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

    sizes = {"HEADS": heads, "TOKENS": tokens}
    lanes = {"WIDTH": width, "LANES": _power_of_two(width), "SCALE": scale * _LOG2_E}
    columns = {"COLUMNS": _power_of_two(tokens)}
    joined = {"HEADS_UP": _power_of_two(heads, least=1), "SPECIAL": special, "MEAN": mean, **sizes, **columns}
    q, k, v = (tensor.stride()[:3] for tensor in (queries, keys, values))
    per_head, per_image = (batch * heads,), (batch,)
    within_all, within_left = (
        {name: (count * bound) ** 0.5 for name, bound in (("LOW", low), ("HIGH", high))}
        for count in (tokens, tokens - similar)
    )

    mixed = empty(batch, tokens, heads, width, dtype=values.dtype)
    votes, normalisers = empty(batch, heads, tokens), empty(batch, heads, tokens)
    first = start if similar else start_of_survivors
    wrap_triton(_attend)[per_head](
        queries, keys, values, first, mixed, votes, normalisers, *q, *k, *v, **sizes, **lanes, **_column_blocks(tokens),
        ROWS=_rows(_capability(queries.device), tokens), **_ATTEND,
    )  # fmt: skip
    pre_score, pre_spread = empty(batch, patches), empty(batch, heads, 1)
    similarity = empty(batch, patches // 2)
    if similar:
        dropped, order = empty(batch, tokens), empty(batch, patches, dtype=torch.int32)
        withdrawn = empty(batch, similar, dtype=torch.int32)
        wrap_triton(_compare)[per_image](
            votes, keys, pre_score, pre_spread, order, similarity, dropped, withdrawn, *k, **within_all, **joined,
            WIDTH=width, LANES=lanes["LANES"], SIMILAR=similar, HALF_UP=_power_of_two(patches - patches // 2),
            COSINE=cosine, **_COMPARE,
        )  # fmt: skip
    else:
        dropped = torch.zeros(batch, tokens, device=queries.device)
    if similar and rounds == 1 and not renormalise:
        leaving = _power_of_two(special + similar)
        wrap_triton(_withdraw)[per_head](
            queries, keys, start, start_of_survivors, normalisers, dropped, withdrawn, votes, *q, *k,
            **sizes, **lanes, **columns, SPECIAL=special, SIMILAR=similar, ROWS=leaving,
            num_warps=4 if leaving <= 64 else 8, **_WITHDRAW,
        )  # fmt: skip
    elif similar or rounds > 1:
        wrap_triton(_revote)[per_head](
            queries, keys, start_of_survivors, normalisers, dropped, votes, *q, *k, **sizes, **lanes, **columns,
            LEFT=tokens - similar, ROUNDS=rounds, RENORMALISE=renormalise, **_REVOTE,
        )  # fmt: skip
    score, spread = empty(batch, patches), empty(batch, heads, 1)
    chosen = empty(batch, kept, dtype=torch.int64)
    wrap_triton(_choose)[per_image](
        votes, dropped, score, spread, chosen, **within_left, **joined, KEPT=kept, **_CHOOSE
    )
    return mixed.transpose(1, 2), chosen, pre_score, pre_spread, similarity, score, spread


def _power_of_two(number: int, least: int = 16) -> int:
    """The next one; a product's sides are 16 at least."""
    return max(least, int(triton.next_power_of_2(number)))


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def _rows(capability: tuple[int, int], tokens: int) -> int:
    """How many rows of attention fit the registers: products of 9.0 leave what they multiply in shared memory."""
    return 64 if capability == (9, 0) and tokens <= 208 else 32


def _column_blocks(tokens: int) -> dict[str, int]:
    """Up to three powers of two that hold all columns with little to spare, 0 for none."""
    sizes: list[int] = []
    left = tokens
    while left > 0:
        whole = _power_of_two(left)
        is_last = len(sizes) == 2 or whole <= max(left, 16)
        sizes.append(whole if is_last else whole // 2)
        left -= sizes[-1]
    if sum(sizes) >= _power_of_two(tokens):
        sizes = [_power_of_two(tokens)]
    return dict(zip("ABC", [*sizes, 0, 0], strict=False))
