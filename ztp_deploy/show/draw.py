"""Pictures of what a run did with images, and the same as numbers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ztp_deploy import methods, models
from ztp_deploy.atomic import write_bytes, write_text
from ztp_deploy.backends import EVIDENCE, find_engine, load_engine
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.report.folder import PICTURES_FILE, PICTURES_FOLDER, PictureFile, Pictures
from ztp_deploy.manifest import hash_file, manifest_sha256
from ztp_deploy.plan import Geometry, Plan
from ztp_deploy.preprocessing import open_image, transform_for
from ztp_deploy.pruning.prune import prune
from ztp_deploy.show.painting import StagePicture, photograph, render_strip
from ztp_deploy.show.seen import Seen, seen_by_engine, seen_by_model
from ztp_deploy.show.stages import parted, stage_pictures
from ztp_deploy.source import Source
from ztp_deploy.workflow.progress import Clock
from ztp_deploy.workflow.requests import PlanRequest
from ztp_deploy.workflow.steps import load


@dataclass(frozen=True)
class Drawn:
    """One image's picture file and what its stages did."""

    image: Path
    picture: Path
    stages: list[StagePicture]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """All pictures of a run; `origin` says what ran, `random_weights` whether what is drawn means anything."""

    origin: str
    source: Source
    plan: Plan
    drawn: list[Drawn]

    @property
    def random_weights(self) -> bool:
        """Whether the choice of tokens means nothing."""
        return self.source.weights.kind == "random"

    def to_json(self) -> dict[str, Any]:
        """What was drawn as numbers; positions count patches in raster order from 0."""
        return {
            "schema": "ztp.show/1",
            "model": self.source.name,
            "plan": self.plan.label,
            "ran": self.origin,
            "random_weights": self.random_weights,
            "images": [
                {
                    "image": str(one.image),
                    "picture": str(one.picture),
                    "notes": list(one.notes),
                    "stages": [stage_numbers(stage) for stage in one.stages],
                }
                for one in self.drawn
            ],
        }


def stage_numbers(picture: StagePicture) -> dict[str, Any]:
    """A stage's counts and positions; `groups`, of methods that merge, are the patches of each merged token."""
    numbers: dict[str, Any] = {
        "stage": picture.stage,
        "block": picture.block,
        "tokens_in": picture.tokens_in,
        "tokens_out": len(picture.kept),
        "kept": _listed(picture.kept),
        "dropped": {reason: _listed(positions) for reason, positions in picture.dropped.items()},
    }
    return numbers | ({"groups": picture.groups} if picture.merges else {})


def _listed(positions: NDArray[Any]) -> dict[str, Any]:
    return {"count": len(positions), "positions": positions.tolist()}


def picture_paths(images: Sequence[Path], directory: Path, label: str) -> list[Path]:
    """Where each image's picture goes. Raises BadRequest where two would go to one file."""
    paths = [directory / f"{image.stem}--{label}.png" for image in images]
    first: dict[str, Path] = {}
    for image, path in zip(images, paths, strict=True):
        if other := first.get(path.name.casefold()):
            raise BadRequest(
                f"The pictures of {other} and {image} would both be {path}.", "Rename one, or draw them one by one."
            )
        first[path.name.casefold()] = image
    return paths


def show_engine(images: Sequence[Path], directory: Path, clock: Clock, engine: Path) -> Shown:
    """Draws what an engine does with images: one PNG each in `directory`.

    Raises BadRequest before anything heavy is loaded: images that cannot be read or whose pictures would overwrite
    each other, a plan that keeps every token.
    """
    plan = find_engine(engine).manifest.plan
    paths = _checked_paths(plan, images, directory)
    with load_engine(engine) as session, clock.step(_running(plan, images)):
        manifest, source = session.manifest, session.manifest.source
        pixels = session.preprocess(list(images))
        seen = seen_by_engine(session, pixels, _geometry(source))
    if source.weights.kind == "random":
        clock.warn("This engine has random weights: which tokens it keeps means nothing.")
    origin = f"{manifest.backend} {manifest.backend_version} {manifest.precision} on {manifest.device}"
    return Shown(origin, source, plan, _draw(seen, pixels, source, origin, images, paths, clock))


def show_model(images: Sequence[Path], directory: Path, clock: Clock, wanted: PlanRequest) -> Shown:
    """Draws what eager PyTorch does with images by a plan. Raises as `show_engine`."""
    wanted.backbone.check()
    wanted.check()
    plan = wanted.plan(wanted.model)
    paths = _checked_paths(plan, images, directory)
    model = load(wanted.backbone, clock)
    pruned = prune(model, wanted.plan(model))
    source, origin = pruned.source, "eager PyTorch"
    with clock.step(_running(plan, images)):
        transform = transform_for(source.preprocessing, "float32")
        pixels = np.stack([transform(open_image(image)) for image in images])
        seen = seen_by_model(pruned, pixels)
    return Shown(origin, source, plan, _draw(seen, pixels, source, origin, images, paths, clock))


def _checked_paths(plan: Plan, images: Sequence[Path], directory: Path) -> list[Path]:
    """Where each image's picture goes. Raises BadRequest for what cannot be drawn or written there."""
    if not plan.stages:
        raise BadRequest(
            f"{plan.model} keeps every token in this plan: there is nothing to show.",
            "Give a method and a ratio below 1, or the engine of such a plan.",
        )
    paths = picture_paths(images, directory, plan.label)
    if directory.exists() and not directory.is_dir():
        raise BadRequest(f"{directory} is not a folder: pictures cannot go there.", "Name another with --directory.")
    for image in images:
        open_image(image)
    return paths


def _draw(
    seen: Seen,
    pixels: NDArray[Any],
    source: Source,
    origin: str,
    images: Sequence[Path],
    paths: Sequence[Path],
    clock: Clock,
) -> list[Drawn]:
    """Paints and writes what was seen on every image, `pixels` [M, 3, H, W], and warns of what it does not mean."""
    warnings = [f"{reason}: which tokens are kept means nothing." for reason in _untrained(seen.plan)]
    for text in (*warnings, *seen.notes):
        clock.warn(text)
    if source.weights.kind == "random":
        warnings.insert(0, "Random weights: which tokens are kept means nothing.")
    drawn = []
    with clock.step(f"draw {_count(images)}", float(len(images))) as advance:
        for index, (image, path) in enumerate(zip(images, paths, strict=True)):
            stages = stage_pictures(seen, index)
            notes = (*warnings, *seen.notes, *_parting(seen, index))
            strip = render_strip(
                photograph(pixels[index], source.preprocessing),
                stages,
                title=f"{image.name} · {source.name} · {seen.plan.label}",
                subtitle=" ".join((f"Kept tokens as reported by {origin}.", *_pairs_only(seen, stages))),
                notes=notes,
            )
            write_picture(strip, path)
            drawn.append(Drawn(image, path, stages, notes))
            advance(1)
    return drawn


def picture_report(images: Sequence[Path], engine: Path, clock: Clock) -> Shown:
    """Draws what an engine does with images into its own evidence, for its HTML report; earlier pictures go.

    Raises as `show_engine`.
    """
    folder = engine / EVIDENCE / PICTURES_FOLDER
    shown = show_engine(images, folder, clock, engine)
    listed = [
        PictureFile(
            file=one.picture.name,
            sha256=hash_file(one.picture).sha256,
            caption=f"{one.image.name}: tokens kept by {shown.origin}.{''.join(f' {note}' for note in one.notes)}",
        )
        for one in shown.drawn
    ]
    record = Pictures(manifest_sha256=manifest_sha256(engine), pictures=listed)
    write_text(engine / EVIDENCE / PICTURES_FILE, record.to_json())
    for path in set(folder.glob("*.png")) - {one.picture for one in shown.drawn}:
        path.unlink()
    return shown


def write_picture(picture: Any, path: Path) -> None:
    """Writes a PIL image as PNG, whole or not at all. Raises WriteFailed."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    write_bytes(path, buffer.getvalue())


def _running(plan: Plan, images: Sequence[Path]) -> str:
    return f"run {plan.label} on {_count(images)}"


def _count(images: Sequence[Path]) -> str:
    return "1 image" if len(images) == 1 else f"{len(images)} images"


def _untrained(plan: Plan) -> list[str]:
    reason = methods.untrained(plan)
    return [reason.rstrip(".")] if reason else []


def _pairs_only(seen: Seen, stages: Sequence[StagePicture]) -> tuple[str, ...]:
    if seen.audited is None or seen.notes or any(picture.heat is not None for picture in stages):
        return ()
    return (f"{seen.plan.method} scores pairs, not single tokens: there is no heat map.",)


def _parting(seen: Seen, image: int) -> tuple[str, ...]:
    stage = parted(seen, image)
    if stage is None:
        return ()
    return (
        f"The engine's run with scores kept other tokens at stage {stage}: later stages are shown without reasons and "
        "heat maps.",
    )


def _geometry(source: Source) -> Geometry | None:
    """What the backbone is, where its name says it."""
    if source.weights.kind == "given" and source.architecture is None:
        return None
    return models.describe(source.name, source.size)[1]
