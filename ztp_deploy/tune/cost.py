"""Budgets, and what stages cost: multiply-accumulates by count, or milliseconds by blocks measured in real engines."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch import nn

from ztp_deploy import models
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.latency import LatencyReport, bootstrap_median
from ztp_deploy.methods.slice import twin_of
from ztp_deploy.plan import Geometry, Plan, Stage, count_flops
from ztp_deploy.planning import make_plan
from ztp_deploy.workflow.progress import Clock
from ztp_deploy.workflow.requests import BuildRequest
from ztp_deploy.workflow.steps import bench, engine_for

GRID = (0.75, 0.5, 0.3, 0.15)
"""Shares of the patch tokens at which blocks are measured, beside the dense model."""
SELECTING = 0.7
"""The ratio at which the cost of selection is measured."""


class Budget(BaseModel):
    """What a plan may cost: a share of the dense multiply-accumulates, or milliseconds of one run of `batch` images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["flops", "latency"]
    limit: float
    batch: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`flops=0.65` or `latency=12ms@batch8`. Raises BadRequest for anything else."""
        if found := re.fullmatch(r"flops=(0?\.\d+)", text.strip()):
            share = float(found[1])
            if 0 < share < 1:
                return cls(kind="flops", limit=share)
        if found := re.fullmatch(r"latency=(\d+\.?\d*)ms@batch(\d+)", text.strip()):
            limit, batch = float(found[1]), int(found[2])
            if limit > 0 and batch >= 1:
                return cls(kind="latency", limit=limit, batch=batch)
        raise BadRequest(
            f"--budget {text!r} is not a budget.",
            "Write flops=0.65, a share below 1 of the dense model's multiply-accumulates, or latency=12ms@batch8, "
            "the time of one run with 8 images.",
        )

    def __str__(self) -> str:
        return f"flops={self.limit:g}" if self.kind == "flops" else f"latency={self.limit:g}ms@batch{self.batch}"

    def shown(self, cost: float) -> str:
        """A cost in this budget's unit."""
        return f"{cost * 100:.2f} % of dense MACs" if self.kind == "flops" else f"{cost:.3f} ms per run"


class Timing(BaseModel):
    """Milliseconds a run of one engine: the median with its bootstrap interval, and how much faster than dense it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    median: float
    low: float
    high: float
    over_dense: float = 1.0
    over_dense_low: float = 1.0
    over_dense_high: float = 1.0
    inconclusive: str | None = None


Timer = Callable[[Mapping[str, Plan], str], dict[str, Timing]]
"""Measures plans by role against each other, "dense" among them; the text says what for."""


class BlockTimes(BaseModel):
    """Milliseconds of a run by its parts, from real engines at one batch.

    `block` is the time of one block at each of `tokens` (patch tokens, rising); `ends` that of embedding and head,
    taken by their share of the multiply-accumulates; `selection` what one stage's selection costs on the average of a
    plan at ratio 0.7; `mlp` the MLP's share of a block.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: tuple[int, ...]
    block: tuple[float, ...]
    ends: float
    selection: float
    mlp: float
    dense: Timing

    def predict(self, geometry: Geometry, stages: Sequence[Stage]) -> float:
        """Milliseconds a run: blocks by their tokens, straight lines between those measured, and every selection.

        A block with a stage mixes the tokens it gets with those it hands on, by the MLP's share.
        """
        by_block = {stage.block: stage for stage in stages}
        patches, total = geometry.patch_tokens, self.ends + self.selection * len(stages)
        for number in range(1, geometry.depth + 1):
            after = by_block[number].tokens_out if number in by_block else patches
            total += (1 - self.mlp) * self._at(patches) + self.mlp * self._at(after)
            patches = after
        return total

    def _at(self, tokens: int) -> float:
        # Below the least measured a block counts as that: an engine's fixed costs do not go away.
        return float(np.interp(tokens, self.tokens, self.block))


def flop_share(geometry: Geometry) -> Callable[[Sequence[Stage]], float]:
    """Planned multiply-accumulates over those of the dense model."""
    return lambda stages: count_flops(geometry, stages).share


def measure_blocks(model: nn.Module, method: str, timer: Timer) -> BlockTimes:
    """Times dense, slice twins that cut after block 1, and a pruned engine with its twin, and takes them apart."""
    geometry = models.describe(model)[1]
    counts = sorted({max(1, int(share * geometry.patch_tokens)) for share in GRID})
    plans: dict[str, Plan] = {"dense": make_plan(model, "dense")}
    plans |= {str(count): make_plan(model, "slice", keep=[count], sites=[1]) for count in counts}
    pruned = make_plan(model, method, ratio=SELECTING)
    plans |= {"pruned": pruned, "twin": twin_of(pruned)}
    return take_apart(geometry, timer(plans, "blocks"), len(pruned.stages))


def take_apart(geometry: Geometry, times: Mapping[str, Timing], stages: int) -> BlockTimes:
    """Blocks, ends and selection from the times of "dense", token counts, "pruned" with so many stages, and "twin".

    Times are the dense one over paired speed-ups: a machine that drifts drifts for both. Of T(n) = ends + (1 − m)·b(all) + m·b(n) + (depth − 1)·b(n), where m is the MLP's share, b(n) is the unknown.
    """
    whole = geometry.patch_tokens + geometry.special_tokens
    mlp_macs = whole * geometry.mlp_macs_per_token
    attention_macs = 4 * whole * geometry.embed_dim * geometry.attention_dim + 2 * whole**2 * geometry.attention_dim
    mlp = mlp_macs / (mlp_macs + attention_macs)
    dense = times["dense"]
    blocks_share = geometry.depth * (mlp_macs + attention_macs) / count_flops(geometry, ()).dense
    full = dense.median * blocks_share / geometry.depth
    ends = dense.median * (1 - blocks_share)
    paired = {role: dense.median / timing.over_dense for role, timing in times.items()}
    measured = {geometry.patch_tokens: full}
    for role, milliseconds in paired.items():
        if role.isdecimal():
            measured[int(role)] = (milliseconds - ends - (1 - mlp) * full) / (geometry.depth - 1 + mlp)
    tokens = tuple(sorted(measured))
    # Noise must not make fewer tokens look slower: fitting a factor needs a cost that rises with tokens.
    block = np.maximum.accumulate([max(0.0, measured[count]) for count in tokens])
    selection = max(0.0, paired["pruned"] - paired["twin"]) / stages
    return BlockTimes(
        tokens=tokens, block=tuple(map(float, block)), ends=ends, selection=selection, mlp=mlp, dense=dense
    )


def engine_timer(
    model: nn.Module, build: BuildRequest, batch: int, seconds: float, clock: Clock, command: str, images: Path | str
) -> Timer:
    """Exports and builds every plan for the back end and measures the engines interleaved."""

    def measure(plans: Mapping[str, Plan], purpose: str) -> dict[str, Timing]:
        engines = {role: engine_for(model, plan, build, clock, images) for role, plan in plans.items()}
        return timings(bench(engines, [batch], seconds, clock, command), batch)

    return measure


def timings(report: LatencyReport, batch: int) -> dict[str, Timing]:
    """Every role's milliseconds per run at a batch, and its speed-up over "dense"."""
    found = {}
    for sample in report.samples:
        if sample.batch != batch:
            continue
        low, high = bootstrap_median([np.array(sitting) for sitting in sample.milliseconds])
        timing = Timing(median=sample.median, low=low, high=high)
        if sample.role != "dense":
            ratio = report.ratio(sample.role, "dense", batch)
            timing = timing.model_copy(
                update={
                    "over_dense": ratio.speedup,
                    "over_dense_low": ratio.low,
                    "over_dense_high": ratio.high,
                    "inconclusive": ratio.reason,
                }
            )
        found[sample.role] = timing
    return found
