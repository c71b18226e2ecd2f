"""The parity gate: eager pruned → exported → engine, edge by edge, on real images.

Every logit must lie within tolerance × that image's logit standard deviation, and kept sets may differ only by
near-ties. Where they differ, eager PyTorch is run once more with the candidate's tokens in place of its own: so
every stage and every logit of every image is compared on equal terms. Everything else fails loudly, naming the
edge and the kind of fault.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ztp_deploy import environment, exporters, methods
from ztp_deploy.atomic import write_text
from ztp_deploy.backends import PARITY_FILE, Engine, find_engine, open_engine
from ztp_deploy.backends.base import Runner
from ztp_deploy.errors import BadRequest, ZtpError
from ztp_deploy.evidence.accuracy import mean_kl
from ztp_deploy.evidence.exported import RUNNERS, open_exported
from ztp_deploy.evidence.images import ImageSet
from ztp_deploy.evidence.observe import Advance, no_progress, observe, observe_eager
from ztp_deploy.evidence.selection import Difference, Observation, differences, same_destinations
from ztp_deploy.evidence.tolerances import TOLERANCES, Tolerance
from ztp_deploy.evidence.verdict import Agreement, Edge, Fault, NearTie, ParityReport, StageAgreement
from ztp_deploy.exporters.graph import InferenceGraph
from ztp_deploy.manifest import manifest_sha256
from ztp_deploy.plan import Plan
from ztp_deploy.pruning.prune import PrunedModel, prune


def check_parity(
    engine: Engine | Path | str,
    model: nn.Module,
    images: ImageSet | NDArray[Any],
    *,
    progress: Advance | None = None,
) -> ParityReport:
    """Runs the gate and writes `evidence/parity.json` into the engine folder.

    `model` is the backbone the engine was made from, or its pruned module; `images` [M, 3, H, W] in the
    engine's input dtype. Returns the report, passed or not; `report.require()` raises GateFailed.
    Raises BadRequest where model and engine do not belong together.
    """
    found = find_engine(engine)
    manifest = found.manifest
    if manifest.precision not in TOLERANCES:
        raise BadRequest(
            f"There is no tolerance for precision {manifest.precision}.", "Known: " + ", ".join(TOLERANCES)
        )
    pictures = images if isinstance(images, ImageSet) else _named(images)
    pruned = model if isinstance(model, PrunedModel) else prune(model, manifest.plan)
    _check_belonging(found, pruned, pictures)
    notes: list[str] = []
    graph = InferenceGraph(pruned, manifest.input.dtype)
    sides = _observed_sides(found, graph, pictures, notes, progress or no_progress)
    with sides as observed:
        edges = [
            _compare(graph, pictures, observed[one], observed[other])
            for one, other in (("eager", "exported"), ("exported", "engine"), ("eager", "engine"))
            if one in observed and other in observed
        ]
        eager = observed["eager"].observation
    agreement = None
    if manifest.plan.stages and not manifest.random_weights and not methods.untrained(manifest.plan):
        agreement = _dense_agreement(graph, eager, pictures.pixels)
    report = ParityReport(
        engine=found.directory.name,
        manifest_sha256=manifest_sha256(found.directory),
        images=pictures.origin,
        images_sha256=pictures.sha256,
        precision=manifest.precision,
        tolerance=TOLERANCES[manifest.precision],
        passed=all(edge.holds for edge in edges),
        edges=edges,
        notes=notes,
        dense_to_pruned=agreement,
        environment=environment.snapshot(),
    )
    write_text(found.evidence / PARITY_FILE, report.to_json())
    return report


def compare_with_eager(pruned: PrunedModel, runner: Runner, images: ImageSet, precision: str) -> Edge:
    """The one edge from eager PyTorch in float32 to whatever runs the same plan; `images` are float32."""
    graph = InferenceGraph(pruned, "float32")
    eager = Side("eager", TOLERANCES["fp32"], observe_eager(graph, images.pixels))
    ran = observe(runner.run, images.pixels, graph.output_names, 8, 1)
    return _compare(graph, images, eager, Side("engine", TOLERANCES[precision], ran, runner))


def expected_steps(images: int, format: str) -> int:
    """How many image passes `check_parity` reports to its progress callback."""
    return images * (3 if format in RUNNERS else 2)


# --- what is asked -----------------------------------------------------------------------------


def _named(pixels: NDArray[Any]) -> ImageSet:
    return ImageSet(pixels, tuple(f"image {index}" for index in range(len(pixels))), f"{len(pixels)} given images")


def _check_belonging(engine: Engine, pruned: PrunedModel, pictures: ImageSet) -> None:
    """Raises BadRequest for images that the engine does not take and for a model it was not made from."""
    manifest, pixels = engine.manifest, pictures.pixels
    wanted = manifest.input
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.dtype(wanted.dtype)
        or pixels.shape[1:] != (3, wanted.size, wanted.size)
        or not len(pixels)
    ):
        raise BadRequest(
            f"Parity is checked on {wanted.dtype} images [M, 3, {wanted.size}, {wanted.size}], at least one; "
            f"got {getattr(pixels, 'dtype', type(pixels).__name__)} {list(getattr(pixels, 'shape', []))}.",
            "Use load_images, or session.preprocess.",
        )
    if pruned.source.weights.sha256 != manifest.source.weights.sha256 or pruned.plan != manifest.plan:
        raise BadRequest(
            f"This model is not the one {engine.directory} was built from.", "Give the same weights and the same plan."
        )
    if wanted.dtype == "uint8" and pruned.source.preprocessing != manifest.source.preprocessing:
        raise BadRequest(
            f"This model normalises pixels otherwise than {engine.directory}, which does so in its graph.",
            "Load the model with the preprocessing that the engine's manifest has.",
        )


# --- what the sides did ------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One end of an edge: its bounds, what it did, and what can be asked for its scores (eager's are there).

    `smallest` is the smallest batch that the runner takes.
    """

    name: str
    tolerance: Tolerance
    observation: Observation
    runner: Runner | None = None
    smallest: int = 1

    def audited(self, image: NDArray[Any], graph: InferenceGraph) -> Observation:
        """Its own run on one image [1, 3, H, W], with its scores."""
        assert self.runner is not None
        return observe(self.runner.audit, image, (*graph.output_names, *graph.audit_names), 1, self.smallest)


@contextmanager
def _observed_sides(
    engine: Engine, graph: InferenceGraph, pictures: ImageSet, notes: list[str], advance: Advance
) -> Iterator[dict[str, Side]]:
    """What every side did, by name; the engine is open as long as the caller compares.

    Scores are asked for later, image by image, where they are needed.
    """
    manifest, pixels = engine.manifest, pictures.pixels
    sides = {"eager": Side("eager", TOLERANCES["fp32"], observe_eager(graph, pixels, advance=advance))}

    def join(name: str, runner: Runner, tolerance: Tolerance, batch: int) -> None:
        ran = observe(runner.run, pixels, manifest.outputs, batch, manifest.batch.min, advance)
        sides[name] = Side(name, tolerance, ran, runner, manifest.batch.min)

    exported = _exported_runner(engine, notes)
    with open_engine(engine) as session:
        if exported is not None:
            join("exported", *exported, batch=8)
        join("engine", session.runner, TOLERANCES[manifest.precision], manifest.batch.opt)
        yield sides


def _exported_runner(engine: Engine, notes: list[str]) -> tuple[Runner, Tolerance] | None:
    """Runs the exported graph as it stands, where the format is not itself the engine's file; with its bounds."""
    manifest = engine.manifest
    if manifest.format not in RUNNERS:
        return None
    directory = (engine.directory / manifest.artifact).resolve()
    try:
        artifact = exporters.load_artifact(directory)
        if manifest_sha256(directory) != manifest.artifact_sha256:
            raise BadRequest("It is not the export this engine was built from.")
        return open_exported(artifact), TOLERANCES[artifact.manifest.precision]
    except ZtpError as error:
        notes.append(f"The exported graph could not be checked on its own: {error.problem}")
        return None


# --- comparing ---------------------------------------------------------------------------------


def _compare(graph: InferenceGraph, pictures: ImageSet, reference: Side, candidate: Side) -> Edge:
    """One edge; what differs is explained against eager PyTorch (`graph`) made to choose as the candidate did."""
    tolerance = max(reference.tolerance, candidate.tolerance, key=lambda bounds: bounds.logits)
    agree, stages = _agreement(graph.pruned.plan, reference.observation, candidate.observation)
    expected = reference.observation.logits.copy()
    faults: list[Fault] = []
    near_ties: list[NearTie] = []
    differing = np.flatnonzero(~agree)
    if len(differing):
        instead = [one[differing] for one in candidate.observation.forced(graph.pruned.plan.patch_tokens)]
        forced = observe_eager(graph, pictures.pixels[differing], forced=instead)
        expected[differing] = forced.logits
        faults, near_ties = _explain_differences(differing, forced, candidate, graph, tolerance, pictures)
    worst, top1, wrong = _compare_logits(
        expected, candidate.observation.logits, tolerance, pictures.names, {fault.image for fault in faults}
    )
    return Edge(
        reference=reference.name,
        candidate=candidate.name,
        tolerance=tolerance,
        images=len(pictures.names),
        stages=stages,
        near_ties=near_ties,
        compared_logits=len(pictures.names),
        top1_equal=top1,
        worst_logit=worst,
        faults=[*faults, *wrong],
    )


def _agreement(
    plan: Plan, reference: Observation, candidate: Observation
) -> tuple[NDArray[np.bool_], list[StageAgreement]]:
    """Whether the tokens of each image [M] fare alike at every stage, and how often they do at each."""
    agree = np.ones(len(reference.logits), dtype=bool)
    stages = []
    for index, stage in enumerate(plan.stages):
        same = same_destinations(reference, candidate, index, plan.patch_tokens).all(axis=1)
        agree &= same
        stages.append(
            StageAgreement(
                stage=index + 1,
                block=stage.block,
                tokens=stage.tokens_out,
                images_agreeing=int(same.sum()),
                token_agreement=_overlap(reference, candidate, index, plan.patch_tokens),
            )
        )
    return agree, stages


def _compare_logits(
    expected: NDArray[Any], found: NDArray[Any], tolerance: Tolerance, names: Sequence[str], excused: Set[str | None]
) -> tuple[float, int, list[Fault]]:
    """The worst Δlogit in σ, how often the best class is equal, and the faults of images that have none yet."""
    distances, top1, faults = [], 0, []
    for name, one, other in zip(names, expected, found, strict=True):
        apart, sigma = float(np.abs(one - other).max()), float(one.std())
        distance = apart and (apart / sigma if sigma else math.inf)  # as the C++ self-test: nothing apart is 0 of any σ
        equal = bool(one.argmax() == other.argmax())
        distances.append(distance)
        top1 += equal
        if name in excused:
            continue
        if not distance <= tolerance.logits:
            detail = f"on the same tokens logits differ by {distance:.2g} σ (at most {tolerance.logits:g}) on {name}"
        elif tolerance.top1 and not equal:
            detail = f"top-1 differs on {name}"
        else:
            continue
        faults.append(Fault(kind="weights", image=name, stage=None, detail=detail))
    return float(np.max(distances)), top1, faults


def _explain_differences(
    images: NDArray[Any],
    forced: Observation,
    candidate: Side,
    graph: InferenceGraph,
    tolerance: Tolerance,
    pictures: ImageSet,
) -> tuple[list[Fault], list[NearTie]]:
    """Faults and near-ties of the images whose kept sets differ, by eager's and the candidate's own scores.

    `forced` is eager PyTorch on these images with the candidate's tokens.
    """
    plan, geometry = graph.pruned.plan, graph.pruned.host.geometry
    faults: list[Fault] = []
    near_ties: list[NearTie] = []
    for row, image in enumerate(images):
        audited = candidate.audited(pictures.pixels[image : image + 1], graph)
        did, name = candidate.observation.at(image), pictures.names[image]
        for one in differences(forced.at(row), did, audited, plan, geometry, tolerance.gap):
            if one.cause != "near_tie":
                faults.append(Fault(kind=one.cause, image=name, stage=one.stage, detail=_sentence(one, name)))
                break
            near_ties.append(
                NearTie(image=name, stage=one.stage, decision=one.decision, gap=one.gap, tokens=one.tokens)
            )
    return [*faults, *_too_many(near_ties, tolerance, len(pictures.names))], near_ties


def _too_many(near_ties: Sequence[NearTie], tolerance: Tolerance, images: int) -> list[Fault]:
    tied = len({tie.image for tie in near_ties})
    if tied <= max(1, tolerance.near_ties * images):  # one of few images says nothing of the engine
        return []
    detail = f"{tied} of {images} images keep other tokens by near-ties, more than {tolerance.near_ties:.0%}"
    return [Fault(kind="near_ties", image=None, stage=None, detail=detail)]


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
    ours, theirs = (one.destinations(index, patch_tokens) for one in (reference, candidate))
    carried = ours >= 0
    return float(((ours == theirs) & carried).sum() / max(carried.sum(), 1))


def _dense_agreement(graph: InferenceGraph, eager: Observation, pixels: NDArray[Any]) -> Agreement:
    """The backbone as it is against its pruned module, in eager PyTorch."""
    logits = []
    for start in range(0, len(pixels), 8):
        with torch.inference_mode():
            chunk = torch.from_numpy(np.ascontiguousarray(pixels[start : start + 8]))
            logits.append(graph.pruned.model(graph.normalise(chunk)).numpy())
    dense = np.concatenate(logits)
    equal = (dense.argmax(axis=1) == eager.logits.argmax(axis=1)).mean()
    return Agreement(images=len(pixels), top1_equal=float(equal), mean_kl=mean_kl(dense, eager.logits))
