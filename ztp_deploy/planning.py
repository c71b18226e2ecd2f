"""Making a plan: what is asked for (a ratio, a FLOP share, counts), for one model and one method, as fixed counts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from torch import nn

from ztp_deploy import methods, models
from ztp_deploy.defaults import METHOD
from ztp_deploy.errors import BadRequest
from ztp_deploy.plan import DEFAULT_STAGES, FLOP_SHARE_TOLERANCE, Geometry, Plan, Stage, count_flops, share_of
from ztp_deploy.source import ModelSize


def make_plan(
    model_or_name: nn.Module | str,
    method: str = METHOD,
    *,
    ratio: float | None = None,
    flops: float | None = None,
    keep: Sequence[int | float] | None = None,
    sites: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
    overrides: ModelSize | None = None,
) -> Plan:
    """Fixes the token count of every stage for one model and one method.

    Exactly one of: `ratio`, the share of tokens each stage keeps, in (0, 1]; `flops`, the share of
    the dense model's multiply-accumulates, in (0, 1]; `keep`, per stage a count (int) or a share of
    what enters it (float). `sites` are block numbers counted from 1 (default ⌊depth·i/4⌋, i = 1 … 3, the next
    block for methods that act before or inside one, all blocks for those with a number per block).
    `method="dense"` takes none of them. `overrides` are the sizes of a model that is only named. Raises BadRequest for anything that cannot be met.
    """
    if overrides is not None and not isinstance(model_or_name, str):
        raise BadRequest("A module has its own sizes, and overrides were given.", "Leave them out.")
    name, geometry = models.describe(model_or_name, overrides)
    request: dict[str, Any] = {
        kind: value for kind, value in (("ratio", ratio), ("flops", flops), ("keep", keep)) if value is not None
    }
    if method == "dense":
        idle = [*request] if request != {"ratio": 1.0} else []
        idle += [name for name, value in (("sites", sites), ("options", options)) if value]
        if idle:
            raise BadRequest(f"The dense model prunes nothing, but {idle[0]} was given.", "Leave it out.")
        return _assemble(name, geometry, method, {}, {}, [])
    rule = methods.get(method)
    if len(request) != 1:
        raise BadRequest(
            f"A plan needs exactly one of ratio, flops and keep; got {' and '.join(request) or 'none'}.",
            "Give one, for example ratio=0.7.",
        )
    chosen = methods.parse_options(method, options or {})
    if reason := rule.refuses(geometry, chosen):
        raise BadRequest(f"{method} cannot prune {name}: {reason}", "`ztp list` shows which pairs work.")
    keep = None if keep is None else _listed("keep", keep, "[137, 95, 66]")
    sites = None if sites is None else _listed("sites", sites, "[3, 6, 9]")
    blocks = _checked_sites(sites, geometry.depth, rule.default_sites, None if keep is None else len(keep))

    def stages_for(counts: list[int]) -> list[Stage]:
        return rule.schedule(geometry, blocks, counts, chosen)

    def stages_at(share: float) -> list[Stage]:
        return stages_for(rule.counts(geometry, blocks, share, chosen))

    if keep is not None:
        stages = stages_for(_kept_counts(keep, geometry.patch_tokens, len(blocks)))
        request = {"keep": [int(value) if _is_whole(value) else float(value) for value in keep]}
    elif ratio is not None:
        stages = stages_at(_unit_interval("ratio", ratio))
        request = {"ratio": float(ratio)}
    else:
        assert flops is not None
        stages = _nearest_share(geometry, stages_at, _unit_interval("flops", flops))
        request = {"flops": float(flops)}
    asked = request | ({"sites": blocks} if sites is not None else {}) | ({"options": dict(options)} if options else {})
    return _assemble(name, geometry, method, chosen.model_dump(mode="json"), asked, stages)


def _assemble(
    name: str, geometry: Geometry, method: str, options: dict[str, Any], asked: dict[str, Any], stages: list[Stage]
) -> Plan:
    return Plan(
        model=name,
        method=method if stages else "dense",
        options=options if stages else {},
        asked=asked if stages else {},
        image_size=geometry.image_size,
        special_tokens=geometry.special_tokens,
        patch_tokens=geometry.patch_tokens,
        stages=tuple(stages),
        flops=count_flops(geometry, stages),
    )


def _listed(name: str, values: object, example: str) -> list[Any]:
    if isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping)):
        with contextlib.suppress(TypeError):  # an array of no dimensions
            return list(values)
    raise BadRequest(f"{name}={values!r} is not a list.", f"Give one number for each stage, such as {name}={example}.")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _unit_interval(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
        raise BadRequest(f"{name}={value!r} is outside (0, 1].", "Give a share such as 0.7; 1 keeps everything.")
    return float(value)


def _checked_sites(
    sites: Sequence[int] | None, depth: int, default: Callable[[int, int | None], list[int]], stages: int | None
) -> list[int]:
    if sites is None:
        blocks = default(depth, stages)
        if not blocks or (stages is not None and len(blocks) < stages and stages != DEFAULT_STAGES) or stages == 0:
            raise BadRequest(
                f"{stages} stages have no default sites in {depth} blocks.", "Give sites, one block for each stage."
            )
        return blocks
    blocks = [int(block) if _is_whole(block) else block for block in sites]
    if any(not _is_whole(block) or not 1 <= block <= depth for block in blocks) or not blocks:
        raise BadRequest(f"sites={blocks} names blocks that are not there.", f"This model has blocks 1 to {depth}.")
    if sorted(set(blocks)) != blocks:
        raise BadRequest(f"sites={blocks} must rise, one stage per block.", "Sort them and drop repeats.")
    return blocks


def _kept_counts(keep: Sequence[int | float], tokens: int, sites: int) -> list[int]:
    if len(keep) != sites:
        raise BadRequest(f"keep has {len(keep)} entries for {sites} sites.", "Give one entry per site.")
    counts: list[int] = []
    given: Sequence[Any] = keep
    for value in given:
        if _is_whole(value) and value >= 1:
            count = int(value)
        elif isinstance(value, Real) and not isinstance(value, Integral) and 0 < float(value) <= 1:
            count = share_of(float(value), tokens)
        else:
            raise BadRequest(
                f"keep={list(keep)} holds {value!r}.",
                "Counts are whole numbers of at least 1, such as 137; shares lie in (0, 1], such as 0.7.",
            )
        if count > tokens and not counts:
            raise BadRequest(
                f"keep={list(keep)} asks for {count}, and the model has {tokens} patches.", f"Keep at most {tokens}."
            )
        if count > tokens:
            raise BadRequest(
                f"keep={list(keep)} grows: a stage that {tokens} tokens reach cannot keep {count}.",
                "Give counts that fall or stay from stage to stage.",
            )
        counts.append(count)
        tokens = count
    return counts


def _nearest_share(geometry: Geometry, stages_at: Callable[[float], list[Stage]], wanted: float) -> list[Stage]:
    """The stages whose FLOP share is nearest to `wanted` among all one-ratio schedules, ties to more tokens.

    Counts fall with the ratio, so bisecting down to neighbouring floats leaves the two schedules on
    either side of `wanted`.
    """
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        if count_flops(geometry, stages_at(middle)).share <= wanted:
            low = middle
        else:
            high = middle
    candidates = [stages_at(high), stages_at(max(low, math.ulp(0.0)))]
    best = min(candidates, key=lambda stages: abs(count_flops(geometry, stages).share - wanted))
    share = count_flops(geometry, best).share
    if abs(share / wanted - 1) > FLOP_SHARE_TOLERANCE:
        raise BadRequest(
            f"A FLOP share of {wanted:g} cannot be reached: the nearest is {share:.4f} ({share / wanted - 1:+.1%}).",
            f"Ask for flops={share:.4f}, move the sites, or give keep=[…].",
        )
    return best
