"""What pruning costs the reference classifier: the paper's ladder, accuracy against FLOPs, and tuned plans.

Everything runs in eager PyTorch on the same canvases, so that whatever differs between two rows is the method.
Intervals resample source digits, since canvases of one scan are no independent pictures.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from ztp_deploy import environment, models
from ztp_deploy.errors import BadRequest, ZtpError
from ztp_deploy.evidence.accuracy import Comparison, Proportion, compare, hits, image_kl, paired_bootstrap, wilson
from ztp_deploy.evidence.schema import EvidenceFile
from ztp_deploy.manifest import write_bytes, write_text
from ztp_deploy.plan import Plan, make_plan
from ztp_deploy.pruning.prune import prune
from ztp_deploy.reference import canvases
from ztp_deploy.reference.model import MEAN, STD
from ztp_deploy.tune.report import TUNE_FILE, TuneReport

MODEL = "vit_digits"
SHARES = (0.85, 0.75, 0.65, 0.55, 0.45)
BATCH = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a study: a method with options under a name of its own, or a plan that is there already."""

    name: str
    method: str
    options: dict[str, Any]
    plan: Plan | None = None

    def plan_at(self, model: nn.Module, share: float) -> Plan:
        """The plan of this row at a FLOP share."""
        return self.plan or make_plan(model, self.method, flops=share, options=self.options)


def _zero_tprune(name: str, **options: Any) -> Entry:
    return Entry(name, "zero_tprune", options)


_ALONE: dict[str, Any] = {"heads": "mean", "variance_bounds": None, "similar": 0.0}

LADDER = (
    Entry("random", "random", {}),
    _zero_tprune("WPR", **_ALONE),
    _zero_tprune("+ EIR", **_ALONE | {"heads": "rms"}),
    _zero_tprune("+ VHF", similar=0.0),
    _zero_tprune("+ S-stage", similar=0.5),
)
"""The paper's ablation (Table 3): each row adds one part of the method to the row before."""

CURVES = (
    _zero_tprune("Zero-TPrune"),
    _zero_tprune("Zero-TPrune-uni", start="uniform"),
    Entry("ToMe", "tome", {}),
    Entry("ATS", "ats", {}),
    Entry("EViT", "evit", {}),
    Entry("random", "random", {}),
)
"""Methods that need no training, at every FLOP share."""

CHOICES = (
    _zero_tprune("Zero-TPrune"),
    _zero_tprune("S:I 1:3", similar=0.25),
    _zero_tprune("S:I 3:1", similar=0.75),
    _zero_tprune("S features: queries", features="queries"),
    _zero_tprune("S features: values", features="values"),
    _zero_tprune("S features: inputs", features="inputs"),
    _zero_tprune("rounds 1", rounds=1),
    _zero_tprune("rounds 3", rounds=3),
    _zero_tprune("rounds 8", rounds=8),
    _zero_tprune("rounds 30", rounds=30),
    _zero_tprune("uniform start", start="uniform"),
    _zero_tprune("heads: mean", heads="mean"),
    _zero_tprune("no head filter", variance_bounds=None),
    _zero_tprune("head filter on deviations", variance_bounds=(0.0001, 0.49)),
    _zero_tprune("S features: heads normalised", feature_heads="normalised"),
    _zero_tprune("S features: heads averaged", feature_heads="averaged"),
    _zero_tprune("votes not renormalised", renormalise=False),
)
"""Where the paper leaves a choice: what the defaults are held against.

Bounds "on deviations" are the paper's 0.01 and 0.7 read as bounds of the standard deviation.
"""

STUDIES: dict[str, tuple[Entry, ...]] = {"dense": (), "ladder": LADDER, "curves": CURVES, "choices": CHOICES}
TUNED = "tuned"

Group: TypeAlias = tuple[float, Sequence[Entry]]
"""A FLOP share and what is held against each other there."""


def tuned_groups(folders: Sequence[Path]) -> list[Group]:
    """The uniform plan and the winner of each search by `ztp tune`, from the folders it wrote.

    Raises BadRequest for a folder without the record of a search that found a plan under a FLOP budget.
    """
    groups: list[Group] = []
    for folder in folders:
        path = folder / TUNE_FILE
        if not path.is_file():
            raise BadRequest(f"{folder} holds no {TUNE_FILE}.", "Give folders that `ztp tune` wrote.")
        report = TuneReport.model_validate_json(path.read_text(encoding="utf-8"))
        if report.budget.kind != "flops" or report.uniform is None or report.winner is None:
            raise BadRequest(f"{path} names no winner under a FLOP budget.", "Give searches with --budget flops=….")
        plans = {"uniform": report.uniform.plan, TUNED: report.winner.plan}
        entries = [Entry(name, plan.method, plan.options, plan) for name, plan in plans.items()]
        groups.append((report.budget.limit, entries))
    return groups


class Row(BaseModel):
    """One entry at one FLOP share, held against the dense model and against the study's first entry.

    `ahead` is the share of right answers less that of the first entry at the same share, with its interval; `closer`
    the same of the first entry's KL less this one's, in nats an image: positive is better in both.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    method: str
    options: dict[str, Any]
    asked_share: float
    planned_share: float
    planned_gmacs: float
    tokens: list[int]
    stages: list[dict[str, Any]]
    comparison: Comparison
    ahead: tuple[float, float, float]
    closer: tuple[float, float, float]

    @property
    def verdict(self) -> Literal["better", "worse", "undecided"]:
        """Against the first entry: decided where the interval excludes 0."""
        return "better" if self.ahead[1] > 0 else "worse" if self.ahead[2] < 0 else "undecided"


class Study(EvidenceFile):
    """A study on `images` canvases of one part, drawn from `digits` scans."""

    schema_: Literal["ztp.study/1"] = Field(default="ztp.study/1", alias="schema")
    study: str
    model: str
    weights_sha256: str
    part: canvases.Part
    images: int
    first: int
    digits: int
    dense_top1: Proportion
    dense_gmacs: float
    rows: list[Row]
    command: str
    environment: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sheet:
    """Canvases as the model takes them [M, 3, SIDE, SIDE], their labels and the scans they show."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    digits: NDArray[np.int64]


def sheet(part: canvases.Part, count: int, first: int = 0) -> Sheet:
    """`count` canvases of a part, from number `first` on."""
    drawn = [canvases.draw(part, index) for index in range(first, first + count)]
    pixels = np.stack([canvas.pixels for canvas in drawn]).astype(np.float32).transpose(0, 3, 1, 2) / 255
    labels = np.array([canvas.label for canvas in drawn])
    images = ((pixels - MEAN) / STD).astype(np.float32)
    return Sheet(images, labels, np.array([canvas.digit for canvas in drawn]))


def logits_of(model: nn.Module, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The model's logits [M, classes] in fp32."""
    with torch.inference_mode():
        parts = [model(torch.from_numpy(images[at : at + BATCH])) for at in range(0, len(images), BATCH)]
    found: NDArray[np.float32] = torch.cat(parts).numpy()
    return found


def run_study(
    name: str,
    part: canvases.Part,
    count: int,
    *,
    groups: Sequence[Group],
    model: nn.Module | None = None,
    first: int = 0,
    command: str = "",
    advance: Callable[[str], None] = lambda _: None,
) -> Study:
    """Every entry of every group on the same `count` canvases, each held against the first of its group."""
    model = models.load_model(MODEL, weights="pretrained") if model is None else model
    data = sheet(part, count, first)
    dense = logits_of(model, data.images)
    rows = [row for share, entries in groups for row in _rows(model, entries, share, data, dense, advance)]
    return Study(
        study=name,
        model=models.source_of(model).name,
        weights_sha256=models.source_of(model).weights.sha256,
        part=part,
        images=count,
        first=first,
        digits=len(np.unique(data.digits)),
        dense_top1=wilson(int(hits(dense, data.labels).sum()), count),
        dense_gmacs=make_plan(model, "dense").flops.dense / 1e9,
        rows=rows,
        command=command,
        environment=environment.snapshot(),
    )


def _rows(
    model: nn.Module,
    entries: Sequence[Entry],
    share: float,
    data: Sheet,
    dense: NDArray[np.float32],
    advance: Callable[[str], None],
) -> Iterator[Row]:
    first: tuple[NDArray[np.bool_], NDArray[np.float64]] | None = None
    for entry in entries:
        plan = entry.plan_at(model, share)
        logits = logits_of(prune(model, plan), data.images)
        right, kl = hits(logits, data.labels), image_kl(dense, logits)
        first = (right, kl) if first is None else first
        comparison = compare(dense, logits, data.labels, clusters=data.digits)
        advance(f"{share:.2f} {entry.name}: {comparison.pruned.top1.share:.4f}")
        yield Row(
            name=entry.name,
            method=entry.method,
            options=entry.options,
            asked_share=share,
            planned_share=plan.flops.share,
            planned_gmacs=plan.flops.planned / 1e9,
            tokens=[plan.patch_tokens, *plan.counts],
            stages=[{"block": stage.block, **stage.static} for stage in plan.stages],
            comparison=comparison,
            ahead=paired_bootstrap(right.astype(float) - first[0], data.digits),
            closer=paired_bootstrap(first[1] - kl, data.digits),
        )


HEAD = (
    *("MACs", "row", "top-1", "against dense (95 %)", "against the first row (95 %)"),
    *("agreement", "KL (nats)", "KL below the first row's (95 %)"),
)


def render_study(study: Study) -> str:
    """The study's table as Markdown: a line an entry and FLOP share."""
    lines = [f"| {' | '.join(HEAD)} |", "|---:|---|---:|---|---|---:|---:|---|"] if study.rows else []
    first = study.rows[0].name if study.rows else ""
    for row in study.rows:
        change = row.comparison.top1
        cells = (
            f"{row.planned_share:.1%}",
            row.name,
            f"{row.comparison.pruned.top1.share:.2%}",
            _points(change.difference, change.low, change.high),
            "" if row.name == first else f"{_points(*row.ahead)} {row.verdict}",
            f"{row.comparison.agreement.share:.2%}",
            f"{row.comparison.mean_kl:.4f}",
            "" if row.name == first else "{:+.4f} ({:+.4f} to {:+.4f})".format(*row.closer),
        )
        lines.append(f"| {' | '.join(cells)} |")
    dense = study.dense_top1
    lines += [
        "",
        f"- {study.model}, {study.images} {study.part} canvases of {study.digits} scans, dense {dense.share:.2%} top-1 "
        f"(Wilson 95 %: {dense.low:.2%} to {dense.high:.2%}), {study.dense_gmacs:.3f} GMACs.",
    ]
    if study.rows:
        lines.append(
            "- Differences are in percentage points; brackets hold paired 95 % bootstrap intervals that resample scans. "
            "“better” and “worse”: the interval excludes 0."
        )
    lines.append(f"- `{study.command}`, eager PyTorch fp32 on {study.environment['cpu']}.")
    return "\n".join(lines).lstrip() + "\n"


def _points(middle: float, low: float, high: float) -> str:
    return f"{middle * 100:+.2f} ({low * 100:+.2f} to {high * 100:+.2f})"


def picture(study: Study) -> bytes:
    """A PNG: what each entry loses in top-1 against the dense model, over its multiply-accumulates."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in dict.fromkeys(row.name for row in study.rows):
        rows = sorted((row for row in study.rows if row.name == name), key=lambda row: row.planned_gmacs)
        changes = [row.comparison.top1 for row in rows]
        middle = np.array([change.difference for change in changes]) * 100
        reach = [
            middle - [change.low * 100 for change in changes],
            [change.high * 100 for change in changes] - middle,
        ]
        axes.errorbar(
            [row.planned_gmacs for row in rows], middle, reach, marker="o", markersize=4, capsize=2, label=name
        )
    axes.axhline(0, color="0.4", linewidth=0.8)
    # Losses of tenths of a point and of tens of points both matter: evenly spaced up to one point, logarithmic beyond.
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"GMACs an image (dense: {study.dense_gmacs:.3f})")
    axes.set_ylabel(f"top-1, percentage points against dense ({study.dense_top1.share:.1%})")
    axes.set_title(f"{study.model}, {study.images} {study.part} canvases; bars: 95 % intervals over scans", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return stream.getvalue()


def record_study(study: Study, folder: Path) -> Path:
    """Writes JSON, Markdown and, of more than one FLOP share, a picture, named after model, study and part."""
    stem = f"{study.model}--{study.study}--{study.part}"
    write_text(folder / f"{stem}.json", study.to_json())
    write_text(folder / f"{stem}.md", render_study(study))
    if len({row.asked_share for row in study.rows}) > 1:
        write_bytes(folder / f"{stem}.png", picture(study))
    return folder / f"{stem}.json"


def read_study(path: Path) -> Study:
    """A recorded study."""
    return Study.model_validate(json.loads(path.read_text(encoding="utf-8")))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what pruning costs the reference classifier.")
    parser.add_argument("study", choices=(*STUDIES, TUNED))
    parser.add_argument(
        "--part", choices=("train", "test"), default="train", help="Canvases; choices are made on train."
    )
    parser.add_argument("--canvases", type=int, default=2388, help="How many.")
    parser.add_argument(
        "--first", type=int, default=0, help="Number of the first; the training saw those up to 39,999."
    )
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="FLOP shares; tuned plans have theirs.")
    parser.add_argument("--searches", type=Path, nargs="+", default=(), help="Folders of `ztp tune`, for tuned.")
    parser.add_argument("--weights", default="pretrained", help="pretrained, or a path that the training wrote.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for JSON and Markdown.")
    given = parser.parse_args()
    told = ["python", "-m", "ztp_deploy.reference.study", given.study, "--part", given.part]
    told += ["--canvases", str(given.canvases), *(["--first", str(given.first)] if given.first else [])]
    if given.study == TUNED:
        told += ["--searches", *(folder.name for folder in given.searches)]
    elif STUDIES[given.study]:
        told += ["--shares", *map(str, given.shares)]
    try:
        if (given.study == TUNED) != bool(given.searches):
            raise BadRequest("--searches belongs to the study tuned, and that to it.", "Give both or neither.")
        study = run_study(
            given.study,
            given.part,
            given.canvases,
            groups=tuned_groups(given.searches)
            if given.searches
            else [(share, STUDIES[given.study]) for share in given.shares],
            model=models.load_model(MODEL, weights=given.weights),
            first=given.first,
            command=shlex.join(told),  # without the paths of this machine
            advance=lambda line: print(line, flush=True),
        )
        print(record_study(study, given.out))
    except ZtpError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
