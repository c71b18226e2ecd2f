"""What pruning costs the reference classifier: the paper's ladder, accuracy against FLOPs, and tuned plans.

Everything runs in eager PyTorch on the same canvases, so that whatever differs between two rows is the method.
Intervals resample source digits, since canvases of one scan are not independent pictures. The command runs each row in
a process of one thread, as many at once as there are cores: two threads share a small model's work badly.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ztp_deploy import environment, models
from ztp_deploy.atomic import write_bytes, write_text
from ztp_deploy.entrypoint import run_and_exit
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.accuracy import Comparison, Proportion, compare, hits, image_kl, paired_bootstrap, wilson
from ztp_deploy.evidence.report.accuracy import change_text, points_text
from ztp_deploy.evidence.report.markdown import markdown_table
from ztp_deploy.evidence.schema import EvidenceFile
from ztp_deploy.plan import Plan
from ztp_deploy.planning import make_plan
from ztp_deploy.pruning.prune import prune
from ztp_deploy.reference import canvases
from ztp_deploy.reference.model import MEAN, STD
from ztp_deploy.tune.report import TUNE_FILE, TuneReport

MODEL = "vit_digits"
SHARES = (0.85, 0.75, 0.65, 0.55, 0.45)
BATCH = 16


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a study: a method with options under a name of its own, or a plan that is there already.

    `stages`: in the first so many of the places where the method has stages, all of them if None.
    """

    name: str
    method: str
    options: dict[str, Any]
    plan: Plan | None = None
    stages: int | None = None

    def plan_at(self, model: nn.Module, share: float) -> Plan:
        """The plan of this row at a FLOP share."""
        if self.plan:
            return self.plan
        plan = make_plan(model, self.method, flops=share, options=self.options)
        if self.stages is None:
            return plan
        sites = [stage.block for stage in plan.stages[: self.stages]]
        return make_plan(model, self.method, flops=share, options=self.options, sites=sites)


def _zero_tprune(name: str, **options: Any) -> Entry:
    return Entry(name, "zero_tprune", options)


_PUBLISHED: dict[str, Any] = {"rounds": "published", "renormalise": True}
_ALONE = _PUBLISHED | {"heads": "mean", "variance_bounds": None, "similar": 0.0}

LADDER = (
    Entry("random", "random", {}),
    _zero_tprune("WPR", **_ALONE),
    _zero_tprune("+ EIR", **_ALONE | {"heads": "rms"}),
    _zero_tprune("+ VHF", **_PUBLISHED, similar=0.0),
    _zero_tprune("+ S-stage", **_PUBLISHED),
    _zero_tprune("votes not renormalised", rounds="published"),
    _zero_tprune("one round"),
)
"""The paper's ablation (Table 3) up to the S-stage: each row adds one part of the method to the row before.

Then what the defaults here differ in.
"""

CURVES = (
    _zero_tprune("Zero-TPrune"),
    _zero_tprune("as published", **_PUBLISHED),
    _zero_tprune("Zero-TPrune-uni", **_PUBLISHED, start="uniform"),
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
    _zero_tprune("rounds 2", rounds=2),
    _zero_tprune("rounds 4", rounds=4),
    _zero_tprune("rounds 8", rounds=8),
    _zero_tprune("rounds 30", rounds=30),
    _zero_tprune("rounds published", rounds="published"),
    _zero_tprune("uniform start", start="uniform"),
    _zero_tprune("heads: mean", heads="mean"),
    _zero_tprune("no head filter", variance_bounds=None),
    _zero_tprune("head filter on deviations", variance_bounds=(0.0001, 0.49)),
    _zero_tprune("S features: heads normalised", feature_heads="normalised"),
    _zero_tprune("S features: heads averaged", feature_heads="averaged"),
    _zero_tprune("votes renormalised", renormalise=True),
    _zero_tprune("as published", **_PUBLISHED),
    _zero_tprune("no S-stage", similar=0.0),
)
"""Where the paper leaves a choice: what the defaults are held against.

Bounds "on deviations" are the paper's 0.01 and 0.7 read as bounds of the standard deviation.
"""

STAGES = (
    _zero_tprune("in three stages"),
    Entry("in two stages", "zero_tprune", {}, stages=2),
    Entry("in one stage", "zero_tprune", {}, stages=1),
)
"""Fewer stages, which each drop more: what a GPU runs fastest (docs/gpu.md)."""

STUDIES: dict[str, tuple[Entry, ...]] = {
    "dense": (),
    "ladder": LADDER,
    "curves": CURVES,
    "choices": CHOICES,
    "stages": STAGES,
}
TUNED = "tuned"
DRAWN = "curves"
"""The study of which a picture is drawn."""
STEPWISE = "ladder"
"""The study whose rows are held against the row before; those of others against the first of their group."""

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
    """One entry at one FLOP share, held against the dense model and against another entry at that share.

    `ahead` is the share of right answers less the other's, with its interval; `closer` the other's KL less this one's,
    in nats per image: positive is better in both. The first entry is held against itself.
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
        """Against the other entry: decided where the interval excludes 0."""
        return "better" if self.ahead[1] > 0 else "worse" if self.ahead[2] < 0 else "undecided"


class Study(EvidenceFile):
    """A study on `images` canvases of one part, drawn from `digits` scans; `against` says what rows are held against."""

    schema_: Literal["ztp.study/1"] = Field(default="ztp.study/1", alias="schema")
    study: str
    against: Literal["first", "before"] = "first"
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
    """Canvases [M, SIDE, SIDE, 3], their labels and the scans they show."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    digits: NDArray[np.int64]


Over: TypeAlias = Callable[..., Iterable[Any]]
"""`map`, or that of a pool of processes."""


def sheet(part: canvases.Part, count: int, first: int = 0, over: Over = map) -> Sheet:
    """`count` canvases of a part, from number `first` on; `over` maps a function over numbers."""
    drawn = list(over(_canvas, repeat(part, count), range(first, first + count)))
    pixels, labels, digits = zip(*drawn, strict=True)
    return Sheet(np.stack(pixels), np.array(labels), np.array(digits))


def _canvas(part: canvases.Part, index: int) -> tuple[NDArray[np.uint8], int, int]:
    canvas = canvases.draw(part, index)
    return canvas.pixels, canvas.label, canvas.digit


def logits_of(model: nn.Module, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The model's logits [M, classes] in fp32 for canvases [M, SIDE, SIDE, 3]."""

    def images(at: int) -> Tensor:
        scaled = pixels[at : at + BATCH].astype(np.float32).transpose(0, 3, 1, 2) / 255
        return torch.from_numpy(((scaled - MEAN) / STD).astype(np.float32))

    with torch.inference_mode():
        found: NDArray[np.float32] = torch.cat([model(images(at)) for at in range(0, len(pixels), BATCH)]).numpy()
    return found


def _logits(model: nn.Module, plan: Plan | None, pixels: Path) -> NDArray[np.float32]:
    """Those of the pruned or, without a plan, the dense model, for canvases in a file."""
    return logits_of(model if plan is None else prune(model, plan), np.load(pixels, mmap_mode="r"))


Asked: TypeAlias = tuple[int, float, Entry, Plan]
"""A group's number and FLOP share, a row to be, and its plan there."""


def run_study(
    name: str,
    part: canvases.Part,
    count: int,
    *,
    groups: Sequence[Group],
    model: nn.Module | None = None,
    first: int = 0,
    workers: int = 1,
    command: str = "",
    advance: Callable[[str], None] = lambda _: None,
) -> Study:
    """Every entry of every group on the same `count` canvases, in `workers` processes of one thread (1: in this one).

    Raises BadRequest for less than one of either and for a `first` below 0.
    """
    _check_counts(count, first, workers)
    model = models.load_model(MODEL, weights="pretrained") if model is None else model
    asked = [
        (group, share, entry, entry.plan_at(model, share))
        for group, (share, entries) in enumerate(groups)
        for entry in entries
    ]
    with ExitStack() as stack:
        over = _processes(stack, workers)
        data = sheet(part, count, first, partial(over, chunksize=64) if workers > 1 else over)
        found = _run_all(stack, over, model, [plan for *_, plan in asked], data.pixels)
        dense = next(found)
        rows = list(_rows(asked, dense, found, data, name == STEPWISE, advance))
    source = models.source_of(model)
    return Study(
        study=name,
        against="before" if name == STEPWISE else "first",
        model=source.name,
        weights_sha256=source.weights.sha256,
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


def _check_counts(count: int, first: int, workers: int) -> None:
    if workers < 1:
        raise BadRequest(f"--workers {workers} was asked for.", "Give at least 1.")
    if count < 1 or first < 0:
        raise BadRequest(
            f"--canvases {count} and --first {first} were asked for.", "Give at least 1 canvas, from number 0 on."
        )


def _processes(stack: ExitStack, workers: int) -> Over:
    """What maps in so many processes of one thread each, in this one for 1."""
    if workers == 1:
        return map
    spawn = multiprocessing.get_context("spawn")
    return stack.enter_context(ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,))).map


def _run_all(
    stack: ExitStack, over: Over, model: nn.Module, plans: Sequence[Plan], pixels: NDArray[np.uint8]
) -> Iterator[NDArray[np.float32]]:
    """The dense model's logits, then those of every plan. Processes read the canvases from a file."""
    file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "pixels.npy"
    np.save(file, pixels)
    wanted = [None, *plans]
    return iter(over(_logits, repeat(model, len(wanted)), wanted, repeat(file, len(wanted))))


def _rows(
    asked: Sequence[Asked],
    dense: NDArray[np.float32],
    found: Iterable[NDArray[np.float32]],
    data: Sheet,
    stepwise: bool,
    advance: Callable[[str], None],
) -> Iterator[Row]:
    """A row for what was asked, each with its logits: against the row before where `stepwise`, else the group's first."""
    others: dict[int, Outcome] = {}
    for one, logits in zip(asked, found, strict=True):
        outcome = Outcome(hits(logits, data.labels).astype(float), image_kl(dense, logits))
        other = others.setdefault(one[0], outcome)
        if stepwise:
            others[one[0]] = outcome
        row = _row(one, compare(dense, logits, data.labels, clusters=data.digits), outcome, other, data.digits)
        advance(f"{row.asked_share:.2f} {row.name}: {row.comparison.pruned.top1.share:.4f}")
        yield row


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a row did to every canvas [M]: 1 where it was read right, else 0, and the KL from the dense model."""

    right: NDArray[np.float64]
    kl: NDArray[np.float64]


def _row(asked: Asked, comparison: Comparison, own: Outcome, other: Outcome, digits: NDArray[np.int64]) -> Row:
    _, share, entry, plan = asked
    return Row(
        name=entry.name,
        method=entry.method,
        options=entry.options,
        asked_share=share,
        planned_share=plan.flops.share,
        planned_gmacs=plan.flops.planned / 1e9,
        tokens=[plan.patch_tokens, *plan.counts],
        stages=[{"block": stage.block, **stage.static} for stage in plan.stages],
        comparison=comparison,
        ahead=paired_bootstrap(own.right - other.right, digits),
        closer=paired_bootstrap(other.kl - own.kl, digits),
    )


HEAD = (
    *("MACs", "row", "top-1", "against dense (95 %)", "against the {} (95 %)"),
    *("agreement", "KL (nats)", "KL below that of the {} (95 %)"),
)
AGAINST = {"first": "first row", "before": "row before"}


def render_study(study: Study) -> str:
    """The study's table as Markdown: a line an entry and FLOP share."""
    head = [name.format(AGAINST[study.against]) for name in HEAD]
    first = study.rows[0].name if study.rows else ""
    cells = [
        (
            f"{row.planned_share:.1%}",
            row.name,
            f"{row.comparison.pruned.top1.share:.2%}",
            change_text(row.comparison.top1),
            "" if row.name == first else f"{points_text(*row.ahead)} {row.verdict}",
            f"{row.comparison.agreement.share:.2%}",
            f"{row.comparison.mean_kl:.4f}",
            "" if row.name == first else "{:+.4f} ({:+.4f} to {:+.4f})".format(*row.closer),
        )
        for row in study.rows
    ]
    lines = markdown_table(head, cells, right=(0, 2, 5, 6)) if cells else []
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
    axes.set_xlabel(f"GMACs per image (dense: {study.dense_gmacs:.3f})")
    axes.set_ylabel(f"top-1, percentage points against dense ({study.dense_top1.share:.1%})")
    axes.set_title(f"{study.model}, {study.images} {study.part} canvases; bars: 95 % intervals over scans", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return stream.getvalue()


def record_study(study: Study, folder: Path) -> Path:
    """Writes JSON and, of curves, a picture, named after model, study and part."""
    path = folder / f"{stem(study.model, study.study, study.part)}.json"
    write_text(path, study.to_json())
    if study.study == DRAWN:
        write_bytes(path.with_suffix(".png"), picture(study))
    return path


def stem(model: str, study: str, part: canvases.Part) -> str:
    """The name of a study's files and of its place on a page."""
    return f"{model}--{study}--{part}"


def fill(page: str, study: Study) -> str:
    """A Markdown page with the study's table in its `place`. Raises BadRequest for a page without one."""
    before, after = place(page, stem(study.model, study.study, study.part))
    return f"{before}{render_study(study).strip()}\n{after}"


def place(page: str, name: str) -> tuple[str, str]:
    """What stands before and after a study's table on a page that says `<!-- name --> … <!-- / -->`.

    Raises BadRequest for a page without that place.
    """
    begin, end = f"<!-- {name} -->\n", "<!-- / -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise BadRequest(f"The page has no place for {name}.", f"Put {begin.strip()} and {end} on lines there.")
    return f"{before}{begin}", f"{end}{after}"


def read_study(path: Path) -> Study:
    """A recorded study."""
    return Study.model_validate(json.loads(path.read_text(encoding="utf-8")))


# --- the command -------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    found = argparse.ArgumentParser(description="Measure what pruning costs the reference classifier.")
    found.add_argument("study", choices=(*STUDIES, TUNED))
    found.add_argument(
        "--part", choices=("train", "test"), default="train", help="Canvases; choices are made on train."
    )
    found.add_argument("--canvases", type=int, default=2388, help="How many.")
    found.add_argument("--first", type=int, default=0, help="Number of the first; the training saw those up to 39,999.")
    found.add_argument("--shares", type=float, nargs="+", default=SHARES, help="FLOP shares; tuned plans have theirs.")
    found.add_argument("--searches", type=Path, nargs="+", default=(), help="Folders of `ztp tune`, for tuned.")
    found.add_argument("--weights", default="pretrained", help="pretrained, or a path that the training wrote.")
    found.add_argument("--workers", type=int, default=environment.usable_cores(), help="Processes of one thread each.")
    found.add_argument("--out", type=Path, default=Path("studies"), help="Folder for the JSON.")
    found.add_argument("--page", type=Path, help="A Markdown page whose table of this study is to be renewed.")
    return found


def check(given: argparse.Namespace) -> None:
    """Raises BadRequest, before anything is measured, for what could not be measured or written in the end."""
    if (given.study == TUNED) != bool(given.searches):
        raise BadRequest("--searches belongs to the study tuned, and that to it.", "Give both or neither.")
    _check_counts(given.canvases, given.first, given.workers)
    if given.out.exists() and not given.out.is_dir():
        raise BadRequest(f"--out {given.out} is not a folder.", "Give one, or a name that is free.")
    if given.page and not given.page.is_file():
        raise BadRequest(f"There is no page {given.page}.", "Give a Markdown file, or leave out --page.")
    if given.page:
        place(given.page.read_text(encoding="utf-8"), stem(MODEL, given.study, given.part))


def told(given: argparse.Namespace) -> str:
    """The command that measures the same again, without where it wrote and without the paths of this machine."""
    words = ["python", "-m", "ztp_deploy.reference.study", given.study, "--part", given.part]
    words += ["--canvases", str(given.canvases), *(["--first", str(given.first)] if given.first else [])]
    if given.weights != "pretrained":
        words += ["--weights", _without_place(Path(given.weights))]
    if given.study == TUNED:
        words += ["--searches", *map(_without_place, given.searches)]
    elif STUDIES[given.study]:
        words += ["--shares", *map(str, given.shares)]
    return shlex.join(words)


def _without_place(path: Path) -> str:
    return path.name if path.is_absolute() else str(path)


def measure(given: argparse.Namespace) -> None:
    """Runs the study that was asked for, prints and writes it. Raises BadRequest."""
    check(given)
    groups = tuned_groups(given.searches) or [(share, STUDIES[given.study]) for share in given.shares]
    study = run_study(
        given.study,
        given.part,
        given.canvases,
        groups=groups,
        model=models.load_model(MODEL, weights=given.weights),
        first=given.first,
        workers=given.workers,
        command=told(given),
        advance=lambda line: print(line, flush=True),
    )
    print(render_study(study), record_study(study, given.out), sep="\n")
    if given.page:
        write_text(given.page, fill(given.page.read_text(encoding="utf-8"), study))


def main() -> None:
    given = parser().parse_args()
    run_and_exit(lambda: measure(given))


if __name__ == "__main__":
    main()
