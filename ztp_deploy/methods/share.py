"""What a ratio means to methods with a number per block: the FLOP share that Zero-TPrune has at it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from ztp_deploy.methods import zero_tprune
from ztp_deploy.plan import Geometry, Stage, count_flops, floor_counts

STEPS = 10_000
"""How finely the share that each stage keeps is searched."""


def zero_tprune_share(geometry: Geometry, ratio: float) -> float:
    """Share of the dense multiply-accumulates that Zero-TPrune keeps at a ratio with its default sites."""
    blocks = zero_tprune.default_sites(geometry.depth)
    options = zero_tprune.Options()
    counts = zero_tprune.counts(geometry, blocks, ratio, options)
    return count_flops(geometry, zero_tprune.schedule(geometry, blocks, counts, options)).share


def counts_at_share(
    geometry: Geometry,
    share: float,
    most: int,
    counts_for: Callable[[int], list[int]],
    stages_for: Callable[[list[int]], Sequence[Stage]],
) -> list[int]:
    """The counts whose stages have the FLOP share nearest to `share`, ties to more tokens.

    `counts_for` maps 0 (everything stays) … `most` to tokens kept per block and falls as its argument rises: a total
    given to `spread` and `counts_after`, say. `stages_for` is the method's schedule for such counts.
    """

    def share_at(number: int) -> float:
        return count_flops(geometry, stages_for(counts_for(number))).share

    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if share_at(middle) >= share:
            low = middle
        else:
            high = middle
    return counts_for(min((low, high), key=lambda number: abs(share_at(number) - share)))


def one_share_counts(
    geometry: Geometry, stages: int, ratio: float, stages_for: Callable[[list[int]], Sequence[Stage]]
) -> list[int]:
    """Every stage keeps the same share of what reaches it: the one whose FLOP share is Zero-TPrune's at `ratio`."""

    def counts_for(number: int) -> list[int]:
        return floor_counts(geometry.patch_tokens, stages, (STEPS - number) / STEPS)

    return counts_at_share(geometry, zero_tprune_share(geometry, ratio), STEPS - 1, counts_for, stages_for)


def spread(total: int, blocks: int) -> list[int]:
    """A total as `blocks` numbers that differ by at most 1, larger first (10 in 4: 3, 3, 2, 2)."""
    each, rest = divmod(total, blocks)
    return [each + 1] * rest + [each] * (blocks - rest)


def falling(top: Fraction, blocks: int) -> list[int]:
    """`blocks` numbers that fall linearly from `top` to 0, rounded down (16 in 12: 16, 14, 13, 11 … 1, 0)."""
    steps = max(1, blocks - 1)
    return [int(top * (steps - index) / steps) for index in range(blocks)]


def counts_after(tokens: int, removed: Sequence[int], most: Callable[[int], int]) -> list[int]:
    """Tokens left after each block that removes so many of those that reach it, n of them at most `most(n)`."""
    counts = []
    for number in removed:
        tokens -= min(number, most(tokens))
        counts.append(tokens)
    return counts
