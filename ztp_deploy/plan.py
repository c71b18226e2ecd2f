"""The plan: every number that decides a tensor shape, fixed before the model runs, with its FLOP count.

Nothing here knows a method by name: methods supply their own rule for counts (`Method.schedule`),
plans are what comes out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ztp_deploy.defaults import METHOD
from ztp_deploy.errors import BadRequest, first_fault

if TYPE_CHECKING:
    from torch import nn

Place = Literal["before_block", "attention_rows", "after_attention", "after_block", "read_out"]

FLOP_SHARE_TOLERANCE = 0.005
DEFAULT_STAGES = 3


@dataclass(frozen=True)
class Geometry:
    """What a plan needs to know of a backbone; MACs are multiply-accumulates for one image.

    `patch_tokens` excludes the `special_tokens` (class, distillation, registers), which come first.
    `class_token` is the position of the class token among them, None without one.
    `embed_macs` and `head_macs` count the parts before the first and after the last block, `head_macs_per_token` what
    the latter does for each patch token that reaches it. `rotary`: whether blocks ask for the positions of tokens,
    which one made anew does not have.
    """

    image_size: int
    patch_tokens: int
    special_tokens: int
    class_token: int | None
    depth: int
    embed_dim: int
    attention_dim: int
    num_heads: int
    mlp_macs_per_token: int
    num_classes: int
    embed_macs: int
    head_macs: int
    rotary: bool = False
    head_macs_per_token: int = 0


class Stage(BaseModel):
    """One place where tokens are removed; counts exclude special tokens.

    `block` is counted from 1; `static` holds the method's own fixed numbers (for Zero-TPrune:
    `similar`, the tokens S drops, and `rounds`, the voting rounds of I).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    block: int = Field(ge=1)
    place: Place
    tokens_in: int = Field(ge=1)
    tokens_out: int = Field(ge=1)
    static: dict[str, Annotated[int, Field(ge=0)]] = {}


class Flops(BaseModel):
    """Multiply-accumulates for one image: embedding, blocks, head; no norms, no token selection.

    `planned` counts as the papers do: tokens that leave after a block still pass its MLP. `executed` is what
    our graphs compute: they leave before the MLP, which acts token by token, with the same result.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dense: int = Field(ge=1)
    planned: int = Field(ge=1)
    executed: int = Field(ge=1)

    @property
    def share(self) -> float:
        """Planned over dense."""
        return self.planned / self.dense

    @property
    def speedup_limit(self) -> float:
        """The speed-up that the executed multiply-accumulates alone would allow."""
        return self.dense / self.executed


class Plan(BaseModel):
    """A frozen, serialisable pruning plan; without stages it is the dense model.

    `asked` keeps the request (`{"ratio": 0.7}`, `{"flops": 0.653}` or `{"keep": [137, 95, 66]}`, with
    `sites` and `options` where the caller chose them, `twin_of` where this is another plan's slice twin); `options` holds every option, defaults filled in.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["ztp.plan/1"] = Field(default="ztp.plan/1", alias="schema")
    model: str = Field(pattern=r"^[\w.\-]+$")
    method: str = Field(pattern=r"^\w+$")
    options: dict[str, Any] = {}
    asked: dict[str, Any] = {}
    image_size: int
    special_tokens: int
    patch_tokens: int
    stages: tuple[Stage, ...] = ()
    flops: Flops

    @model_validator(mode="after")
    def _counts_chain(self) -> Plan:
        tokens = self.patch_tokens
        last_block = 0
        if (self.method == "dense") != (not self.stages):
            raise ValueError("the dense plan, and no other, has no stages")
        for kind in ("ratio", "flops"):
            if kind in self.asked and not isinstance(self.asked[kind], (int, float)):
                raise ValueError(f"asked {kind} is no number")
        if self.stages and not {"ratio", "flops", "keep"} & self.asked.keys():
            raise ValueError("asked says neither ratio nor flops nor keep")
        for stage in self.stages:
            if stage.block <= last_block:
                raise ValueError(f"stages must come in block order, one per block; block {stage.block} does not")
            if stage.tokens_in != tokens:
                raise ValueError(
                    f"the stage at block {stage.block} expects {stage.tokens_in} tokens but {tokens} reach it"
                )
            if stage.tokens_out > stage.tokens_in:
                raise ValueError(
                    f"the stage at block {stage.block} grows from {stage.tokens_in} to {stage.tokens_out} tokens"
                )
            tokens, last_block = stage.tokens_out, stage.block
        return self

    @property
    def counts(self) -> list[int]:
        """Tokens each stage keeps."""
        return [stage.tokens_out for stage in self.stages]

    @property
    def label(self) -> str:
        """A short name for folders and tables, different for different plans of one model: `zero_tprune-0.7`, `dense`.

        A six-digit hash follows where more than the method and the ratio was chosen.
        """
        if not self.stages:
            return "dense"
        method = f"{self.method}_of_{self.asked['twin_of']}" if "twin_of" in self.asked else self.method
        if "ratio" in self.asked:
            name = f"{method}-{_shortest(self.asked['ratio'])}"
        elif "flops" in self.asked:
            name = f"{method}-flops{_shortest(self.asked['flops'])}"
        else:
            name = f"{method}-{'-'.join(map(str, self.counts))}"
        if "sites" in self.asked or "options" in self.asked:
            return f"{name}-{hashlib.sha256(self.to_json().encode()).hexdigest()[:6]}"
        return name

    def to_json(self) -> str:
        """The plan as indented JSON (schema `ztp.plan/1`)."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads what `to_json` wrote. Raises BadRequest that names the first field that is wrong."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            where, why = first_fault(error, "plan")
            raise BadRequest(
                f"This is not a valid plan: {where}: {why}.",
                "Make one with `ztp plan --model … --ratio … --json > plan.json`.",
            ) from error


def _shortest(number: float) -> str:
    """The shortest text that reads back as the number: 0.7, 1e-05."""
    return repr(float(number)).removesuffix(".0")


def default_sites(depth: int, stages: int | None = None) -> list[int]:
    """⌊depth·i/(stages+1)⌋ for i = 1 … stages (default 3), counted from 1, without repeats (3, 6, 9 of 12)."""
    stages = stages or DEFAULT_STAGES
    return sorted({depth * i // (stages + 1) for i in range(1, stages + 1)} - {0})


def following_sites(depth: int, stages: int | None = None) -> list[int]:
    """The blocks after `default_sites`, for methods that act before or inside a block (4, 7, 10 of 12)."""
    return [block + 1 for block in default_sites(depth, stages)]


def every_block(depth: int, stages: int | None = None) -> list[int]:
    """All blocks, for methods with a number per block; `following_sites` where another number of stages is asked for."""
    return list(range(1, depth + 1)) if stages in (None, depth) else following_sites(depth, stages)


def kept_chain(tokens: int, blocks: Sequence[int], counts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(block, tokens in, tokens out) of every stage that drops any, where `tokens` enter the first."""
    for block, after in zip(blocks, counts, strict=True):
        if after < tokens:
            yield block, tokens, after
        tokens = after


def share_of(ratio: float, count: int, rounding: Callable[[Fraction], int] = math.floor, power: int = 1) -> int:
    """`rounding(ratioᵖ · count)` on the decimal the user wrote, free of binary noise (0.29 · 100 is 29), at least 1."""
    return max(1, rounding(Fraction(repr(float(ratio))) ** power * count))


def floor_counts(tokens: int, stages: int, ratio: float) -> list[int]:
    """n ← ⌊ρn⌋ stage after stage (196 at 0.7: 137, 95, 66)."""
    counts = []
    for _ in range(stages):
        tokens = share_of(ratio, tokens)
        counts.append(tokens)
    return counts


def count_flops(geometry: Geometry, stages: Sequence[Stage]) -> Flops:
    """Multiply-accumulates of the dense and the planned model for one image.

    A block costs 4·N·C·A for query, key, value and output projections, 2·N²·A for attention and
    its MLP; stages inside a block change N at their place.
    """
    by_block = {stage.block: stage for stage in stages}

    def total(active: Mapping[int, Stage], early: bool = False) -> int:
        patches = geometry.patch_tokens
        macs = geometry.embed_macs + geometry.head_macs
        for number in range(1, geometry.depth + 1):
            stage = active.get(number)
            after = stage.tokens_out if stage else patches
            place = stage.place if stage else "after_block"
            keys = (after if place == "before_block" else patches) + geometry.special_tokens
            rows = (after if place in ("before_block", "attention_rows") else patches) + geometry.special_tokens
            whole = place == "read_out" or (place == "after_block" and not early)
            mlp = (patches if whole else after) + geometry.special_tokens
            projections = 2 * (rows + keys) * geometry.embed_dim * geometry.attention_dim
            macs += projections + 2 * rows * keys * geometry.attention_dim + mlp * geometry.mlp_macs_per_token
            patches = after
        return macs + patches * geometry.head_macs_per_token

    return Flops(dense=total({}), planned=total(by_block), executed=total(by_block, early=True))


def make_plan(
    model_or_name: nn.Module | str,
    method: str = METHOD,
    *,
    ratio: float | None = None,
    flops: float | None = None,
    keep: Sequence[int | float] | None = None,
    sites: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """Fixes the token count of every stage for one model and one method.

    Exactly one of: `ratio`, the share of tokens each stage keeps, in (0, 1]; `flops`, the share of
    the dense model's multiply-accumulates, in (0, 1]; `keep`, per stage a count (int) or a share of
    what enters it (float). `sites` are block numbers counted from 1 (default ⌊depth·i/4⌋, i = 1 … 3, the next
    block for methods that act before or inside one, all blocks for those with a number per block).
    `method="dense"` takes none of them. Raises BadRequest for anything that cannot be met.
    """
    from ztp_deploy import methods, models

    name, geometry = models.describe(model_or_name)
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
            f"A plan needs exactly one of ratio, flops and keep; {' and '.join(request) or 'none'} came.",
            "Give one, for example ratio=0.7.",
        )
    chosen = methods.parse_options(method, options or {})
    if reason := rule.refuses(geometry, chosen):
        raise BadRequest(f"{method} cannot prune {name}: {reason}", "`ztp list` shows which pairs work.")
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
        elif isinstance(value, Real) and not _is_whole(value):
            count = share_of(_unit_interval("keep", value), tokens)
        else:
            raise BadRequest(f"keep={list(keep)} holds {value!r}.", "Give counts of at least 1, or shares in (0, 1].")
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
