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
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ztp_deploy.errors import BadRequest, first_fault

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
                raise ValueError(f"asked {kind} is not a number")
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
