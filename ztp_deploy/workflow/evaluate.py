"""`ztp eval`: an engine or a pruned model against the dense one on labelled pictures, one step after the other."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ztp_deploy import environment, methods, models
from ztp_deploy.atomic import check_writable, write_text
from ztp_deploy.backends import Engine, find_engine, load_engine, require_runnable, torch_device
from ztp_deploy.backends.base import Device, Session
from ztp_deploy.backends.batches import filled
from ztp_deploy.defaults import EAGER_BATCH, MAX_DECODERS
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.accuracy import ACCURACY_FILE, AccuracyReport, Speed, accuracy, class_rows, compare
from ztp_deploy.evidence.labelled import Labelled, check_readable, read_labelled
from ztp_deploy.evidence.parity import proof_of
from ztp_deploy.evidence.predictions import Predictor, partial_file, predict
from ztp_deploy.evidence.report.html import write_report
from ztp_deploy.evidence.schema import stored
from ztp_deploy.manifest import manifest_sha256
from ztp_deploy.plan import Plan
from ztp_deploy.preprocessing import transform_for
from ztp_deploy.pruning.prune import prune
from ztp_deploy.source import Source
from ztp_deploy.workflow.progress import Clock, Monitor
from ztp_deploy.workflow.requests import PlanRequest
from ztp_deploy.workflow.steps import load_trained, reload


@dataclass(frozen=True)
class EvalRequest:
    """What was asked of an evaluation.

    `data` is a folder with a sub-folder per class or a CSV file; `dense` False leaves the reference out; `batch` is the
    number of images per run (None: an engine's optimal, `EAGER_BATCH` in eager PyTorch); `workers` is the number of threads that
    decode (None: a core each, at most `MAX_DECODERS`); `device` is where eager PyTorch runs; `weights` is where the
    checkpoint of an engine's weights lies now, if it was moved.
    """

    data: Path | str
    dense: bool = True
    batch: int | None = None
    workers: int | None = None
    device: str = "auto"
    weights: str | None = None
    command: str = "ztp_deploy.workflow.evaluate"

    def check(self) -> None:
        """Raises BadRequest for numbers that are none, and for data that is not there."""
        for name, value in (("batch", self.batch), ("workers", self.workers)):
            if value is not None and value < 1:
                raise BadRequest(f"--{name} {value} was asked for.", "Give at least 1.")
        if not Path(self.data).exists():
            raise BadRequest(f"There is no --data {str(self.data)!r}.", "Check the path.")

    @property
    def threads(self) -> int:
        """How many threads decode."""
        return self.workers or min(MAX_DECODERS, environment.usable_cores())


@dataclass(frozen=True)
class _Subject:
    """What is evaluated, as reports name it."""

    source: Source
    plan: Plan
    runs: str
    precision: str
    manifest_sha256: str | None


@dataclass(frozen=True)
class _Reference:
    """What it is held against."""

    name: str
    manifest_sha256: str | None
    logits: NDArray[np.float32]


def evaluate_engine(
    directory: Path | str, request: EvalRequest, monitor: Monitor, *, dense_engine: Path | str | None = None
) -> AccuracyReport:
    """An engine on labelled pictures, against the dense model; writes `evidence/accuracy.json` and renders the report again.

    The reference is `dense_engine` where one is given, else the dense model that the manifest names, in eager
    PyTorch. Raises BadRequest for random weights, data that does not fit and an engine that is not a dense one of the
    same weights; MissingSoftware; GateFailed for logits that are not finite.
    """
    request.check()
    engine = find_engine(directory)
    manifest = engine.manifest
    refuse_meaningless(manifest.source, manifest.plan)
    require_runnable(engine)
    check_writable(engine.evidence)
    other = None if dense_engine is None else _dense_engine(dense_engine, engine)
    if other is None and request.dense and manifest.source.weights.kind == "given" and not request.weights:
        raise BadRequest(
            f"The weights of {manifest.source.name} were handed over in Python: there is no dense model to load.",
            "Give an engine of it with --dense-engine, or leave the comparison out with --no-dense.",
        )
    clock = Clock(monitor)
    subject = _Subject(
        manifest.source,
        manifest.plan,
        f"{manifest.backend} {manifest.backend_version}",
        manifest.precision,
        manifest_sha256(engine.directory),
    )
    for one in (engine, other):
        if one is not None:
            _batch_size(one, request.batch)
    reference = None
    with load_engine(engine.directory) as session:
        classes = _classes(session)
        runs = _Runs(request, _read(request, classes, manifest.source, clock), classes, engine.evidence, clock)
        if request.dense:
            with _dense_predictor(manifest.source, other, request, clock) as dense:
                sha256 = None if other is None else manifest_sha256(other.directory)
                reference = _Reference(dense.runs, sha256, runs.logits(dense))
        logits = runs.logits(_engine_predictor(session, engine, "pruned", request.batch))
    report = _report(subject, runs, logits, reference, _notes(engine, other, request.dense))
    path = engine.evidence / ACCURACY_FILE
    earlier = stored(path, AccuracyReport)
    if (
        report.comparison is None
        and earlier
        and earlier.comparison
        and earlier.manifest_sha256 == report.manifest_sha256
    ):
        clock.warn(
            f"{path} stays as it is: it compares with the dense model, on {earlier.images} images of {earlier.data}. "
            "A run without --no-dense replaces it."
        )
    else:
        write_text(path, report.to_json())
        write_report(engine.directory)
    runs.forget()
    return report


def evaluate_model(
    wanted: PlanRequest, request: EvalRequest, monitor: Monitor, *, record: Path | None = None
) -> AccuracyReport:
    """A pruned model against the dense one on labelled pictures, both in eager PyTorch.

    With `record` the report is written into that folder, and so is an unfinished run. Raises as `evaluate_engine`.
    """
    request.check()
    if wanted.weights == "random":
        raise _random(wanted.model)
    wanted.backbone.check()
    wanted.check()
    device = torch_device.resolve(request.device, "Eager PyTorch")
    clock = Clock(monitor)
    model = load_trained(wanted.backbone, clock)
    plan = wanted.plan(model)
    source = models.source_of(model)
    refuse_meaningless(source, plan)
    classes = models.host_of(model).geometry.num_classes
    runs = _Runs(request, _read(request, classes, source, clock), classes, record, clock)
    reference = None
    if request.dense and plan.stages:
        dense = _eager_predictor(model, source, None, "dense", request, device)
        reference = _Reference(dense.runs, None, runs.logits(dense))
    predictor = _eager_predictor(prune(model, plan), source, plan, "pruned", request, device)
    logits = runs.logits(predictor)
    report = _report(_Subject(source, plan, predictor.runs, "fp32", None), runs, logits, reference, [])
    if record is not None:
        name = f"{source.name}--{plan.label}--accuracy-{runs.data.sha256[:6]}.json"
        write_text(record / name, report.to_json())
    runs.forget()
    return report


def refuse_meaningless(source: Source, plan: Plan) -> None:
    """Raises BadRequest where predictions mean nothing: random weights, or a method without its own."""
    if source.weights.kind == "random":
        raise _random(source.name)
    if reason := methods.untrained(plan):
        raise BadRequest(
            f"An accuracy of {plan.label} would mean nothing: {reason}", "Give a checkpoint that has them."
        )


def _random(name: str) -> BadRequest:
    return BadRequest(
        f"The weights of {name} are random: its accuracy is that of chance and means nothing.",
        "Give trained ones: --weights path, and build the engine with them.",
    )


def _dense_engine(directory: Path | str, engine: Engine) -> Engine:
    """The reference engine. Raises BadRequest unless it is dense, of the same weights and the same preprocessing."""
    other = find_engine(directory)
    if other.manifest.plan.stages:
        raise BadRequest(
            f"{other.directory} prunes ({other.manifest.plan.label}); the reference must be dense.",
            "Build one with --method dense.",
        )
    if other.manifest.source.weights.sha256 != engine.manifest.source.weights.sha256:
        raise BadRequest(
            f"{other.directory} and {engine.directory} have different weights.", "Build both from the same checkpoint."
        )
    if other.manifest.source.preprocessing != engine.manifest.source.preprocessing:
        raise BadRequest(
            f"{other.directory} and {engine.directory} prepare pictures differently.",
            "Build both with the same preprocessing.",
        )
    require_runnable(other)
    return other


def _classes(session: Session) -> int:
    """How many logits the engine gives an image; its manifest does not say."""
    wanted, span = session.manifest.input, session.manifest.batch
    blank = np.zeros((span.min, 3, wanted.size, wanted.size), wanted.dtype)
    return int(session.run(blank).shape[1])


def _read(request: EvalRequest, classes: int, source: Source, clock: Clock) -> Labelled:
    with clock.step(f"read the labels of {Path(request.data).name}"):
        data = read_labelled(request.data, classes, source.labels)
    if "sorted order" in data.mapping:
        clock.warn(data.mapping)
    count = len(data.files)
    with clock.step(f"check that {count} images can be read", float(count)) as advance:
        check_readable(data, request.threads, advance)
    return data


class _Runs:
    """The runs of one evaluation: `data` through model after model, and how fast; unfinished ones lie in `folder`."""

    def __init__(self, request: EvalRequest, data: Labelled, classes: int, folder: Path | None, clock: Clock) -> None:
        self.request, self.data = request, data
        self.speeds: list[Speed] = []
        self._classes, self._folder, self._clock = classes, folder, clock
        self._kept: list[Path] = []

    def logits(self, predictor: Predictor) -> NDArray[np.float32]:
        """Those of all images, [n, classes]."""
        count = len(self.data.files)
        with self._clock.step(f"run {predictor.role} on {count} images ({predictor.runs})", float(count)) as advance:
            found, speed = predict(
                predictor,
                self.data,
                self._classes,
                workers=self.request.threads,
                folder=self._folder,
                advance=advance,
            )
        self.speeds.append(speed)
        if self._folder:
            self._kept.append(partial_file(self._folder, predictor, self.data))
        return found

    def forget(self) -> None:
        """Removes what an interrupted evaluation would have gone on from: the report is written."""
        for path in self._kept:
            path.unlink(missing_ok=True)


def _notes(engine: Engine, dense_engine: Engine | None, compared: bool) -> list[str]:
    """What a reader of an engine's accuracy must know besides."""
    precision, notes = engine.manifest.precision, []
    if proof_of(engine) is None:
        folder = shlex.quote(str(engine.directory))
        notes.append(f"The parity gate has not passed this engine: ztp check --engine {folder}.")
    if precision != "fp32" and compared and (dense_engine is None or dense_engine.manifest.precision == "fp32"):
        notes.append(f"The dense model ran in fp32: the difference holds what {precision} costs besides.")
    return notes


def _batch_size(engine: Engine, batch: int | None) -> int:
    """What was asked for, or the engine's optimum. Raises BadRequest outside its range."""
    span = engine.manifest.batch
    size = span.opt if batch is None else batch
    if not span.min <= size <= span.max:
        raise BadRequest(
            f"--batch {size} is outside the range {span.min} to {span.max} of {engine.directory}.",
            f"Choose one within, or leave it out for {span.opt}.",
        )
    return size


def _engine_predictor(
    session: Session, engine: Engine, role: Literal["dense", "pruned"], batch: int | None
) -> Predictor:
    manifest = session.manifest

    def forward(pictures: NDArray[Any]) -> NDArray[Any]:
        return session.run(filled(pictures, manifest.batch.min))[: len(pictures)]

    return Predictor(
        role=role,
        runs=f"{manifest.backend} {manifest.backend_version} {manifest.precision}",
        identity={"manifest": manifest_sha256(session.directory)},
        transform=transform_for(manifest.source.preprocessing, manifest.input.dtype),
        batch=_batch_size(engine, batch),
        forward=forward,
    )


def _eager_predictor(
    model: nn.Module,
    source: Source,
    plan: Plan | None,
    role: Literal["dense", "pruned"],
    request: EvalRequest,
    device: Device,
) -> Predictor:
    torch_device.prepare(device.provider)
    model = model.to(device.provider).eval()

    def forward(pictures: NDArray[Any]) -> NDArray[Any]:
        with torch.inference_mode():
            logits: torch.Tensor = model(torch.from_numpy(pictures).to(device.provider))
        return logits.float().cpu().numpy()

    return Predictor(
        role=role,
        runs=f"eager PyTorch {torch.__version__.partition('+')[0]} fp32 on {device.name}",
        identity={
            "weights": source.weights.sha256,
            "plan": plan.to_json() if plan else "dense",
            "preprocessing": source.preprocessing.model_dump_json(),
            "torch": torch.__version__,
            "device": device.slug,
        },
        transform=transform_for(source.preprocessing, "float32"),
        batch=request.batch or EAGER_BATCH,
        forward=forward,
    )


@contextmanager
def _dense_predictor(source: Source, engine: Engine | None, request: EvalRequest, clock: Clock) -> Iterator[Predictor]:
    if engine is not None:
        with load_engine(engine.directory) as session:
            yield _engine_predictor(session, engine, "dense", request.batch)
        return
    device = torch_device.resolve(request.device, "Eager PyTorch")
    model = reload(source, request.weights, clock)
    yield _eager_predictor(model, source, None, "dense", request, device)


def _report(
    subject: _Subject, runs: _Runs, logits: NDArray[np.float32], reference: _Reference | None, notes: list[str]
) -> AccuracyReport:
    data = runs.data
    before = None if reference is None else reference.logits
    return AccuracyReport(
        command=runs.request.command,
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        model=subject.source.name,
        plan=subject.plan.label,
        runs=subject.runs,
        precision=subject.precision,
        manifest_sha256=subject.manifest_sha256,
        weights=subject.source.weights.shown,
        weights_sha256=subject.source.weights.sha256,
        reference=None if reference is None else reference.name,
        reference_manifest_sha256=None if reference is None else reference.manifest_sha256,
        data=data.origin,
        data_sha256=data.sha256,
        images=len(data.files),
        classes=logits.shape[1],
        mapping=data.mapping,
        accuracy=accuracy(logits, data.labels),
        comparison=None if before is None else compare(before, logits, data.labels),
        per_class=class_rows(logits, data.labels, before, subject.source.labels),
        speed=tuple(runs.speeds),
        notes=tuple(notes),
        environment=environment.snapshot(),
    )
