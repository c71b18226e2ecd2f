"""The parity gate: eager pruned → exported → engine, edge by edge, on real images.

Every logit must lie within tolerance × that image's logit standard deviation, and kept sets may differ only by
near-ties. Where they differ, eager PyTorch is run once more with the candidate's tokens in place of its own: so
every stage and every logit of every image is compared on equal terms. Everything else fails loudly, naming the
edge and the kind of fault.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from ztp_deploy import environment, methods
from ztp_deploy.backends import Engine, find_engine, load_engine
from ztp_deploy.backends.base import Runner
from ztp_deploy.errors import BadRequest, GateFailed, ZtpError
from ztp_deploy.evidence.images import ImageSet
from ztp_deploy.evidence.schema import EvidenceFile
from ztp_deploy.evidence.selection import Difference, Observation, differences, same_fates
from ztp_deploy.exporters import load_artifact
from ztp_deploy.exporters.graph import InferenceGraph
from ztp_deploy.manifest import ArtifactManifest, manifest_sha256, write_text
from ztp_deploy.plan import Geometry, Plan
from ztp_deploy.pruning.prune import PrunedModel, prune

PARITY_FILE = "parity.json"
_RUNNABLE = ("onnx", "torch_export")
"""Formats whose graph can be run as it stands, before an engine changes it."""

Progress = Callable[[int], None]


class Tolerance(BaseModel):
    """Bounds of the gate for one precision.

    `logits`: largest difference in units of the image's logit σ. `gap`: largest relative distance from the cut
    at which a token may be chosen otherwise. `near_ties`: largest share of images with such tokens. `top1`:
    whether the best class must be the same (with rounding this coarse two classes may be as good as equal).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    logits: float
    gap: float
    near_ties: float
    top1: bool


TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance(logits=1e-4, gap=1e-5, near_ties=0.05, top1=True),
    "fp16": Tolerance(logits=0.02, gap=0.005, near_ties=1.0, top1=False),
    "bf16": Tolerance(logits=0.15, gap=0.05, near_ties=1.0, top1=False),
    "int8": Tolerance(logits=1.0, gap=0.25, near_ties=1.0, top1=False),
    "fp8": Tolerance(logits=1.0, gap=0.4, near_ties=1.0, top1=False),
}
"""Rounding to 11, 8, about 7 and (fp8, E4M3) 4 bits; the bounds leave room for it to add up over a model's depth.

fp8 rounds a number by up to 1/16 of itself, int8 by up to 1/254 of its tensor's largest: for numbers spread as
weights and tokens are, fp8 is two to three times as coarse. DeiT-S with random weights shows just that over 64
photographs: 0.44 against 0.17 σ in the logits, 0.17 against 0.05 in the gap. int8's bounds have room for outliers
besides, which cost int8 digits and fp8 none; so fp8 gets by with the same for logits, where 1.4 σ is what the wrong
sign of a whole layer costs a small model, and needs a wider gap.
"""


class Fault(BaseModel):
    """One reason why an edge does not hold."""

    kind: Literal["selection", "weights", "near_ties"]
    image: str | None
    stage: int | None
    detail: str


class StageAgreement(BaseModel):
    """How often two runs keep the same tokens at one stage."""

    stage: int
    block: int
    tokens: int
    images_agreeing: int
    token_agreement: float


class NearTie(BaseModel):
    """A tolerated difference: the image's logits are held against eager PyTorch on the same tokens."""

    image: str
    stage: int
    decision: str
    gap: float
    tokens: list[int]


class Edge(BaseModel):
    """Reference against candidate over all images; Δlogit in units of each image's logit σ."""

    reference: str
    candidate: str
    tolerance: Tolerance
    images: int
    stages: list[StageAgreement]
    near_ties: list[NearTie]
    compared_logits: int
    top1_equal: int
    worst_logit: float
    faults: list[Fault]

    @property
    def holds(self) -> bool:
        """Whether the edge passes the gate."""
        return not self.faults


class Agreement(BaseModel):
    """What pruning itself changes, dense against pruned in eager PyTorch: reported, never gated."""

    images: int
    top1_equal: float
    mean_kl: float


class ParityReport(EvidenceFile):
    """The gate's finding for one engine (`evidence/parity.json`)."""

    schema_: Literal["ztp.parity/1"] = Field(default="ztp.parity/1", alias="schema")
    engine: str
    manifest_sha256: str
    images: str
    images_sha256: str
    precision: str
    tolerance: Tolerance
    passed: bool
    edges: list[Edge]
    notes: list[str]
    dense_to_pruned: Agreement | None
    environment: dict[str, Any]

    def require(self) -> ParityReport:
        """Itself where the gate is passed; raises GateFailed with edge, kind and first fault otherwise."""
        for edge in self.edges:
            if edge.faults:
                fault = edge.faults[0]
                raise GateFailed(
                    f"Parity fails between {edge.reference} and {edge.candidate}: {fault.kind} fault, {fault.detail}"
                    f"{f' ({len(edge.faults)} faults in all)' if len(edge.faults) > 1 else ''}.",
                    "Do not ship this engine; build it again, and see evidence/parity.json.",
                )
        return self


def check_parity(
    engine: Engine | Path | str,
    model: nn.Module,
    images: ImageSet | NDArray[Any],
    *,
    progress: Progress | None = None,
) -> ParityReport:
    """Runs the gate and writes `evidence/parity.json` into the engine folder.

    `model` is the backbone the engine was made from, or its pruned module; `images` [M, 3, H, W] in the
    engine's input dtype. Returns the report, passed or not; `report.require()` raises GateFailed.
    Raises BadRequest where model and engine do not belong together.
    """
    found = find_engine(engine.directory if isinstance(engine, Engine) else engine)
    manifest = found.manifest
    if manifest.precision not in TOLERANCES:
        raise BadRequest(
            f"There is no tolerance for precision {manifest.precision}.", "Known: " + ", ".join(TOLERANCES)
        )
    pictures = images if isinstance(images, ImageSet) else _named(images)
    pruned = model if isinstance(model, PrunedModel) else prune(model, manifest.plan)
    wanted = manifest.input
    if (
        not isinstance(pictures.pixels, np.ndarray)
        or pictures.pixels.dtype != np.dtype(wanted.dtype)
        or pictures.pixels.shape[1:] != (3, wanted.size, wanted.size)
        or not len(pictures.pixels)
    ):
        raise BadRequest(
            f"Parity is checked on {wanted.dtype} images [M, 3, {wanted.size}, {wanted.size}], at least one; "
            f"{getattr(pictures.pixels, 'dtype', type(pictures.pixels).__name__)} "
            f"{list(getattr(pictures.pixels, 'shape', []))} came.",
            "Use load_images, or session.preprocess.",
        )
    if pruned.source.weights.sha256 != manifest.source.weights.sha256 or pruned.plan != manifest.plan:
        raise BadRequest(
            f"This model is not the one {found.directory} was built from.", "Give the same weights and the same plan."
        )
    advance = progress or (lambda count: None)
    tolerance = TOLERANCES[manifest.precision]
    geometry = pruned.host.geometry
    notes: list[str] = []

    graph = InferenceGraph(pruned, manifest.input.dtype)
    eager = _observe_eager(graph, pictures.pixels, advance)
    observations: dict[str, Observation] = {"eager": eager}
    tolerances = {"eager": TOLERANCES["fp32"], "engine": tolerance}
    runners: dict[str, Runner] = {}
    exported = _exported_runner(found, notes)
    with load_engine(found.directory) as session:
        if exported is not None:
            runners["exported"], tolerances["exported"] = exported
        runners["engine"] = session._runner
        for name, runner in runners.items():
            batch = manifest.batch.opt if name == "engine" else 8
            observations[name] = _observe(runner, pictures.pixels, manifest.outputs, batch, manifest.batch.min, advance)
        pairs = [("eager", "exported"), ("exported", "engine"), ("eager", "engine")]
        edges = [
            _compare(
                one,
                other,
                observations,
                runners[other],
                manifest.batch.min,
                graph,
                geometry,
                max(tolerances[one], tolerances[other], key=lambda bounds: bounds.logits),
                pictures,
            )
            for one, other in pairs
            if one in observations and other in observations
        ]
    agreement = None
    if manifest.plan.stages and not manifest.random_weights and not methods.untrained(manifest.plan):
        agreement = _dense_agreement(pruned, eager, manifest.input.dtype, pictures.pixels)
    report = ParityReport(
        engine=found.directory.name,
        manifest_sha256=manifest_sha256(found.directory),
        images=pictures.origin,
        images_sha256=pictures.sha256,
        precision=manifest.precision,
        tolerance=tolerance,
        passed=all(edge.holds for edge in edges),
        edges=edges,
        notes=notes,
        dense_to_pruned=agreement,
        environment=environment.snapshot(),
    )
    write_text(found.evidence / PARITY_FILE, report.to_json())
    return report


def compare_with_eager(
    pruned: PrunedModel, runner: Runner, images: ImageSet, precision: str, name: str = "engine", batch: int = 8
) -> Edge:
    """The one edge from eager PyTorch in float32 to whatever runs the same plan; `images` are float32."""
    graph = InferenceGraph(pruned, "float32")
    nothing: Progress = lambda count: None  # noqa: E731
    observations = {
        "eager": _observe_eager(graph, images.pixels, nothing),
        name: _observe(runner, images.pixels, graph.output_names, batch, 1, nothing),
    }
    geometry = pruned.host.geometry
    return _compare("eager", name, observations, runner, 1, graph, geometry, TOLERANCES[precision], images)


def expected_steps(images: int, format: str) -> int:
    """How many image passes `check_parity` reports to its progress callback."""
    return images * (3 if format in _RUNNABLE else 2)


def _named(pixels: NDArray[Any]) -> ImageSet:
    return ImageSet(pixels, tuple(f"image {index}" for index in range(len(pixels))), f"{len(pixels)} given images")


def _exported_runner(engine: Engine, notes: list[str]) -> tuple[Runner, Tolerance] | None:
    """Runs the exported graph as it stands, where the format is not itself the engine's file; with its bounds."""
    manifest = engine.manifest
    if manifest.format not in _RUNNABLE:
        return None
    directory = (engine.directory / manifest.artifact).resolve()
    try:
        artifact = load_artifact(directory)
        if manifest_sha256(directory) != manifest.artifact_sha256:
            raise BadRequest("It is not the export this engine was built from.")
        return _open_exported(directory, artifact.manifest), TOLERANCES[artifact.manifest.precision]
    except ZtpError as error:
        notes.append(f"The exported graph could not be checked on its own: {error.problem}")
        return None


def _open_exported(directory: Path, manifest: ArtifactManifest) -> Runner:
    if manifest.format == "torch_export":
        from ztp_deploy.exporters.torch_export import ProgramRunner

        return ProgramRunner(directory, manifest)
    from ztp_deploy.backends import onnxruntime

    if manifest.precision == "bf16":
        raise BadRequest("ONNX Runtime has no bf16 kernels for the CPU.")
    return onnxruntime.open_unoptimised(directory, manifest)


def _observe_eager(
    graph: InferenceGraph, pixels: NDArray[Any], advance: Progress, forced: list[NDArray[Any]] | None = None
) -> Observation:
    """Eager PyTorch, made to choose as `Observation.forced` says where it is given."""
    parts: list[tuple[NDArray[Any], ...]] = []
    for start in range(0, len(pixels), 8):
        chunk = slice(start, start + 8)
        instead = None if forced is None else [torch.from_numpy(one[chunk].copy()) for one in forced]
        with torch.inference_mode():
            values = graph.audited(torch.from_numpy(np.ascontiguousarray(pixels[chunk])), instead)
        parts.append(tuple(value.numpy() for value in values))
        advance(len(pixels[chunk]))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return _observation(dict(zip((*graph.output_names, *graph.audit_names), columns, strict=True)))


def _observation(values: dict[str, NDArray[Any]]) -> Observation:
    """Named outputs of a run as an observation."""
    kept = [value for name, value in values.items() if re.fullmatch(r"kept_\d+", name)]
    merged = [value for name, value in values.items() if re.fullmatch(r"merged_\d+", name)]
    return Observation(values["logits"], kept, merged, values)


def _observe(
    runner: Runner, pixels: NDArray[Any], outputs: tuple[str, ...], batch: int, smallest: int, advance: Progress
) -> Observation:
    """Logits and kept tokens of the shipped graph; scores are asked for later, image by image, where needed."""
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in outputs}
    for start in range(0, len(pixels), batch):
        chunk = pixels[start : start + batch]
        padded = chunk
        if len(chunk) < smallest:
            padded = np.concatenate([chunk, np.repeat(chunk[-1:], smallest - len(chunk), axis=0)])
        result = runner.run(padded)
        for name in outputs:
            columns[name].append(result[name][: len(chunk)])
        advance(len(chunk))
    return _observation({name: np.concatenate(values) for name, values in columns.items()})


def _compare(
    reference_name: str,
    candidate_name: str,
    observations: dict[str, Observation],
    runner: Runner,
    smallest: int,
    graph: InferenceGraph,
    geometry: Geometry,
    tolerance: Tolerance,
    pictures: ImageSet,
) -> Edge:
    plan = graph.pruned.plan
    reference, candidate = observations[reference_name], observations[candidate_name]
    count = len(pictures.names)
    agree = np.ones(count, dtype=bool)
    stages = []
    for index, stage in enumerate(plan.stages):
        same = same_fates(reference, candidate, index, plan.patch_tokens)
        agree &= same.all(axis=1)
        stages.append(
            StageAgreement(
                stage=index + 1,
                block=stage.block,
                tokens=stage.tokens_out,
                images_agreeing=int(same.all(axis=1).sum()),
                token_agreement=_overlap(reference, candidate, index, plan.patch_tokens),
            )
        )
    differing = np.flatnonzero(~agree)
    expected = reference.logits.copy()
    faults: list[Fault] = []
    near_ties: list[NearTie] = []
    if len(differing):
        instead = [one[differing] for one in candidate.forced(plan.patch_tokens)]
        forced = _observe_eager(graph, pictures.pixels[differing], lambda count: None, instead)
        expected[differing] = forced.logits
        faults, near_ties = _explain_differences(
            differing, forced, candidate, runner, smallest, plan, geometry, tolerance, pictures
        )
    excused = {fault.image for fault in faults}
    worst, top1 = 0.0, 0
    for image, name in enumerate(pictures.names):
        one, other = expected[image], candidate.logits[image]
        distance = float(np.abs(one - other).max() / one.std())
        equal = bool(one.argmax() == other.argmax())
        worst, top1 = (worst if distance <= worst else distance), top1 + equal  # not max(), which loses a NaN
        if name in excused:
            continue
        if not distance <= tolerance.logits:
            detail = f"on the same tokens logits differ by {distance:.2g} σ (at most {tolerance.logits:g}) on {name}"
        elif tolerance.top1 and not equal:
            detail = f"top-1 differs on {name}"
        else:
            continue
        faults.append(Fault(kind="weights", image=name, stage=None, detail=detail))
    return Edge(
        reference=reference_name,
        candidate=candidate_name,
        tolerance=tolerance,
        images=count,
        stages=stages,
        near_ties=near_ties,
        compared_logits=count,
        top1_equal=top1,
        worst_logit=worst,
        faults=faults,
    )


def _audited(runner: Runner, image: NDArray[Any], smallest: int) -> Observation:
    """The candidate's own run on one image with its scores; repeated to the smallest batch it takes."""
    values = {name: value[:1] for name, value in runner.audit(np.repeat(image, smallest, axis=0)).items()}
    return _observation(values)


def _explain_differences(
    images: NDArray[Any],
    forced: Observation,
    candidate: Observation,
    runner: Runner,
    smallest: int,
    plan: Plan,
    geometry: Geometry,
    tolerance: Tolerance,
    pictures: ImageSet,
) -> tuple[list[Fault], list[NearTie]]:
    """Faults and near-ties of the images whose kept sets differ, by eager's and the candidate's own scores.

    `forced` is eager PyTorch on these images with the candidate's tokens.
    """
    faults: list[Fault] = []
    near_ties: list[NearTie] = []
    for row, image in enumerate(images):
        audited = _audited(runner, pictures.pixels[image : image + 1], smallest)
        name = pictures.names[image]
        for difference in differences(forced.at(row), candidate.at(image), audited, plan, geometry, tolerance.gap):
            if difference.cause != "near_tie":
                faults.append(
                    Fault(kind=difference.cause, image=name, stage=difference.stage, detail=_sentence(difference, name))
                )
                break
            near_ties.append(
                NearTie(
                    image=name,
                    stage=difference.stage,
                    decision=difference.decision,
                    gap=difference.gap,
                    tokens=difference.tokens,
                )
            )
    tied = len({tie.image for tie in near_ties})
    if tied > tolerance.near_ties * len(pictures.names):
        faults.append(
            Fault(
                kind="near_ties",
                image=None,
                stage=None,
                detail=f"{tied} of {len(pictures.names)} images keep other tokens by near-ties, "
                f"more than {tolerance.near_ties:.0%}",
            )
        )
    return faults, near_ties


def _sentence(difference: Difference, image: str) -> str:
    if difference.cause == "selection":
        return (
            f"stage {difference.stage} keeps other tokens than its own scores call for on {image} "
            f"({len(difference.tokens)} tokens, gap {difference.gap:.2g})"
        )
    return (
        f"stage {difference.stage} keeps what its scores call for, but the scores are wrong on {image} "
        f"({difference.decision} flips at a gap of {difference.gap:.2g})"
    )


def _overlap(reference: Observation, candidate: Observation, index: int, patch_tokens: int) -> float:
    """Share of the tokens that the reference keeps, merged ones included, which the candidate treats alike."""
    ours, theirs = (one.fates(index, patch_tokens) for one in (reference, candidate))
    carried = ours >= 0
    return float(((ours == theirs) & carried).sum() / max(carried.sum(), 1))


def _dense_agreement(
    pruned: PrunedModel, eager: Observation, dtype: Literal["float32", "uint8"], pixels: NDArray[Any]
) -> Agreement:
    graph = InferenceGraph(pruned, dtype)
    logits = []
    for start in range(0, len(pixels), 8):
        with torch.inference_mode():
            chunk = torch.from_numpy(np.ascontiguousarray(pixels[start : start + 8]))
            logits.append(pruned.model(graph.normalise(chunk)))
    dense = torch.cat(logits).double().log_softmax(-1)
    thin = torch.from_numpy(eager.logits).double().log_softmax(-1)
    kl = (dense.exp() * (dense - thin)).sum(-1).mean().item()
    equal = (dense.argmax(-1) == thin.argmax(-1)).double().mean().item()
    return Agreement(images=len(pixels), top1_equal=equal, mean_kl=kl)
