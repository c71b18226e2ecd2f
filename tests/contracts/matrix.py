"""Every method on every kind of backbone, at small sizes; and which of these pairs a run of the tests takes."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import tiny
from ztp_deploy import methods, models
from ztp_deploy.planning import make_plan
from ztp_deploy.source import ModelSize

PARTS = 8

BACKBONES: dict[str, ModelSize] = {
    "deit_t": tiny.SIZE,
    "deit_t_distilled": tiny.SIZE,
    "eva02_t_336": ModelSize(img_size=98, depth=4, embed_dim=48, num_heads=3, num_classes=10),
    "mae_vit_b": tiny.SIZE,
    "vit_base_patch16_siglip_224": tiny.SIZE,
    "swag_vit_b16": tiny.SIZE,
    "lvvit_t": tiny.SIZE,
    "t2t_vit_7": ModelSize(img_size=64, depth=4, embed_dim=48, num_heads=3, num_classes=10),
}
"""Model names with sizes that make them small; every family is among them (tested)."""

OPTIONS: dict[str, dict[str, Any]] = {"zero_tprune": {"rounds": 2}, **tiny.OPTIONS}
"""What a method needs to run without a checkpoint, or to export quickly."""


@dataclass(frozen=True)
class Pair:
    """One method on one backbone."""

    method: str
    backbone: str

    def __str__(self) -> str:
        return f"{self.method}-{self.backbone}"

    @property
    def refusal(self) -> str | None:
        """Why the method does not run there, None where it does."""
        _, geometry = models.describe(self.backbone, BACKBONES[self.backbone])
        options = methods.parse_options(self.method, OPTIONS.get(self.method, {}))
        return methods.get(self.method).refuses(geometry, options)

    def model(self) -> Any:
        """The backbone with seeded random weights."""
        return models.load_model(self.backbone, weights="random", overrides=BACKBONES[self.backbone])

    def plan(self, model: Any) -> Any:
        """At ratio 0.6."""
        return make_plan(model, self.method, ratio=0.6, options=OPTIONS.get(self.method))


ALL = [Pair(method, backbone) for backbone in BACKBONES for method in methods.METHODS]


def part() -> int | None:
    """Which eighth of the matrix is due: `ZTP_MATRIX` is a number, or `all` (None); by default the commit's."""
    wanted = os.environ.get("ZTP_MATRIX", "")
    if wanted == "all":
        return None
    return int(wanted) % PARTS if wanted else part_of(commit())


def part_of(digest: str) -> int:
    """The eighth of a commit's hash: always the same one, and any of them for the next; the first without a hash."""
    return int(digest[:8] or "0", 16) % PARTS


def commit(root: Path = Path(__file__).parents[2]) -> str:
    """The hash of what is checked out there, "" where git knows of none."""
    try:
        done = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], cwd=root, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def chosen(due: int | None) -> list[Pair]:
    """Every method once and every backbone once, and one eighth of the rest; everything for None."""
    if due is None:
        return ALL
    names, backbones = list(methods.METHODS), list(BACKBONES)
    rounds = max(len(names), len(backbones))
    # Method and backbone advance together, so that each comes up at least once.
    fixed = {(names[i % len(names)], backbones[i % len(backbones)]) for i in range(rounds)}
    rest = [pair for pair in ALL if (pair.method, pair.backbone) not in fixed]
    return [pair for pair in ALL if (pair.method, pair.backbone) in fixed] + rest[due::PARTS]
