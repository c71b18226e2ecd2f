"""`ztp show`: which patches each stage dropped and why, as pictures and as numbers.

What an engine kept is what the engine reports. Its scores are those of its own audit run; an eager model's are never
put in their place.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ztp_deploy import methods, models
from ztp_deploy.backends import EVIDENCE, find_engine, load_engine
from ztp_deploy.backends.base import Session
from ztp_deploy.backends.batches import filled_batches
from ztp_deploy.errors import BadRequest, GateFailed, ZtpError
from ztp_deploy.evidence.observe import observe, observe_eager
from ztp_deploy.evidence.report.folder import PICTURES_FILE, PICTURES_FOLDER, PictureFile, Pictures
from ztp_deploy.evidence.selection import Observation, replayed
from ztp_deploy.exporters.graph import InferenceGraph, merges
from ztp_deploy.manifest import hash_file, manifest_sha256
from ztp_deploy.methods.base import Replay
from ztp_deploy.models.base import Source
from ztp_deploy.models.preprocessing import open_image, transform_for
from ztp_deploy.painting import CONTRARY, SIMILARITY, UNKNOWN, UNSCORED, StagePicture, photograph, render_strip
from ztp_deploy.plan import Geometry, Plan
from ztp_deploy.pruning.prune import PrunedModel, prune
from ztp_deploy.pruning.trace import assign
from ztp_deploy.scratch import write_bytes, write_text
from ztp_deploy.workflow import Clock, PlanRequest, load

_RANKS_ONLY = "split"
"""The decision that drops nobody: it says whom similarity may drop."""
_HEAT_NAMES = {"score": "importance"}


@dataclass(frozen=True)
class Seen:
    """What a run over M images did, and the scores behind it.

    Per stage `kept` [M, k] and `assignment` [M, P] as `Session` reports them. `audited` is the same engine's or model's
    run with its scores, None where it has none; `notes` say so, and why.
    """

    plan: Plan
    kept: list[NDArray[Any]]
    assignment: list[NDArray[Any]]
    audited: Observation | None
    geometry: Geometry | None
    notes: tuple[str, ...] = ()


# --- runs --------------------------------------------------------------------------------------


def seen_by_model(pruned: PrunedModel, pixels: NDArray[Any]) -> Seen:
    """What eager PyTorch does with images [M, 3, H, W], float32 normalised, one by one."""
    seen = observe_eager(InferenceGraph(pruned, "float32"), pixels, batch=1)
    plan = pruned.plan
    kept = [np.sort(positions, axis=1) for positions in seen.kept]
    carried: list[NDArray[Any]] = [*assign(seen.kept, seen.merged, plan.patch_tokens)]
    return Seen(plan, kept, carried, seen, pruned.host.geometry, _unscored(plan))


def seen_by_engine(session: Session, pixels: NDArray[Any], geometry: Geometry | None = None) -> Seen:
    """What an open engine does with images [M, 3, H, W], as `session.preprocess` makes them.

    With the model's `geometry` its audit scores are asked for as well. Raises GateFailed where the engine reports
    tokens that cannot be.
    """
    manifest = session.manifest
    plan, span = manifest.plan, manifest.batch
    kept: list[list[NDArray[Any]]] = []
    carried: list[list[NDArray[Any]]] = []
    for chunk, count in filled_batches(pixels, span.max, span.min):
        session.run(chunk)
        reported = [positions[:count] for positions in session.kept()]
        _check_reported(reported, plan, session.directory)
        kept.append(reported)
        carried.append([slots[:count] for slots in _assignment(session)])
    audited, notes = None, _unscored(plan)
    if not notes and geometry is None:
        notes = (
            "Why a token was dropped is not shown: the backbone was handed over in Python, and is not known here.",
        )
    if not notes:
        try:
            audited = observe(session.audit, pixels, (*manifest.outputs, *manifest.audit), span.max, span.min)
        except ZtpError as error:
            notes = (f"Scores are not shown: the engine does not give them. {error.problem}",)
    return Seen(plan, _columns(kept), _columns(carried), audited, geometry, notes)


def _unscored(plan: Plan) -> tuple[str, ...]:
    method = methods.get(plan.method)
    scored = any(method.score_names(stage) for stage in plan.stages)
    return () if scored else (f"{plan.method} scores nothing: there is no heat map.",)


def _check_reported(kept: list[NDArray[Any]], plan: Plan, directory: Path) -> None:
    highest = plan.patch_tokens + len(plan.stages) - 1
    for number, positions in enumerate(kept, start=1):
        wrong = positions[(positions < -1) | (positions > highest)]
        twice = (np.diff(positions, axis=1) == 0) & (positions[:, 1:] >= 0)
        if wrong.size or twice.any():
            what = f"position {wrong[0]}" if wrong.size else f"position {positions[:, 1:][twice][0]} twice"
            raise GateFailed(
                f"The engine says that stage {number} kept {what}, of {plan.patch_tokens} patches.",
                f"It is broken: `ztp check --engine {directory}` shows where.",
            )


def _assignment(session: Session) -> list[NDArray[Any]]:
    try:
        return [*session.assignment()]
    except IndexError as error:
        raise GateFailed(
            "The engine says that tokens merged into others that are not there.",
            f"It is broken: `ztp check --engine {session.directory}` shows where.",
        ) from error


def _columns(parts: Sequence[Sequence[NDArray[Any]]]) -> list[NDArray[Any]]:
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


# --- what the stages did -----------------------------------------------------------------------


def stage_pictures(seen: Seen, image: int = 0) -> list[StagePicture]:
    """What every stage did with one of the images."""
    plan, found = seen.plan, []
    patches = plan.patch_tokens
    token_before = np.arange(patches)
    tokens_in = patches
    same = seen.audited is not None
    for index, stage in enumerate(plan.stages):
        carried, kept = seen.assignment[index][image], seen.kept[index][image]
        why = _Scores(seen, index, image) if same else None
        gone = np.flatnonzero((token_before >= 0) & (carried < 0))
        found.append(
            StagePicture(
                stage=index + 1,
                block=stage.block,
                tokens_in=tokens_in,
                kept=kept[kept >= 0],
                carried=carried,
                dropped=_by_reason(gone, token_before, why, plan),
                earlier=np.flatnonzero((token_before < 0) & (carried < 0)),
                heat=why.heat(token_before) if why else None,
                heat_name=why.name if why else None,
                merges=merges(plan),
            )
        )
        token_before = np.where(carried < 0, -1, kept[carried])
        tokens_in = int((kept >= 0).sum())
        # The audit run may part from the other at a near-tie; its later scores are of other tokens.
        same = same and _same_tokens(seen, index, image)
    return found


def _same_tokens(seen: Seen, index: int, image: int) -> bool:
    assert seen.audited is not None
    one = seen.audited.at(image)
    theirs = assign(one.kept[: index + 1], one.merged[: index + 1], seen.plan.patch_tokens)[index][0]
    alike = np.array_equal(np.sort(one.kept[index][0]), seen.kept[index][image])
    return alike and np.array_equal(theirs, seen.assignment[index][image])


def parted(seen: Seen, image: int = 0) -> int | None:
    """The first stage, from 1, after which the run with scores had kept other tokens than the run that is drawn."""
    if seen.audited is None:
        return None
    return next((index + 1 for index in range(len(seen.kept) - 1) if not _same_tokens(seen, index, image)), None)


class _Scores:
    """The scores of one stage for one image, by the position a token goes by."""

    def __init__(self, seen: Seen, index: int, image: int) -> None:
        assert seen.audited is not None
        assert seen.geometry is not None
        observation = seen.audited.at(image)
        plan, stage = seen.plan, seen.plan.stages[index]
        entering = observation.entering(index, plan.patch_tokens)[0].tolist()
        self._slots = {position: slot for slot, position in enumerate(entering) if position >= 0}
        self._replay = replayed(observation, plan, index, seen.geometry)
        self.name, self._values = None, None
        widths = {stage.tokens_in: 0, stage.tokens_in + plan.special_tokens: plan.special_tokens}
        for name in methods.get(plan.method).score_names(stage):
            values = observation.scores[f"{name}_{index + 1}"]
            if values.ndim == 2 and values.shape[1] in widths:
                self.name = _HEAT_NAMES.get(name, name.replace("_", " "))
                self._values = values[0, widths[values.shape[1]] :].astype(np.float64)

    def heat(self, tokens: NDArray[Any]) -> NDArray[Any] | None:
        """The score of each of the tokens [P]; NaN for those that are out or dropped before they were ranked."""
        if self._values is None:
            return None
        heat = np.full(len(tokens), np.nan)
        for patch, token in enumerate(tokens.tolist()):
            slot = self._slots.get(token)
            if slot is not None and _against(self._replay, slot) != SIMILARITY:
                heat[patch] = self._values[slot]
        return heat

    def reason(self, token: int) -> str:
        """Why the token is dropped, by its own scores: the first decision that goes against it."""
        slot = self._slots.get(token)
        if slot is None:
            return UNKNOWN
        if not self._replay.decisions:
            return UNSCORED
        goes = self._replay.goes
        stays = slot in self._replay.kept[0].tolist() if goes is None else int(goes[0, slot]) >= 0
        return CONTRARY if stays else (_against(self._replay, slot) or CONTRARY)


def _against(replay: Replay, slot: int) -> str | None:
    for decision in replay.decisions:
        of_tokens = decision.name != _RANKS_ONLY and decision.per_token and decision.margin.ndim == 2
        if of_tokens and float(decision.margin[0, slot]) <= 0:
            return decision.name
    return None


def _by_reason(gone: NDArray[Any], tokens: NDArray[Any], why: _Scores | None, plan: Plan) -> dict[str, NDArray[Any]]:
    """Patches that went, by the reason, similarity first."""
    unexplained = UNSCORED if _unscored(plan) else UNKNOWN
    reasons = [why.reason(int(tokens[patch])) if why else unexplained for patch in gone]
    order = sorted(set(reasons), key=lambda reason: (reason != SIMILARITY, reason in (CONTRARY, UNKNOWN), reason))
    return {name: gone[[reason == name for reason in reasons]] for name in order}


# --- the command -------------------------------------------------------------------------------


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


def show(
    images: Sequence[Path],
    directory: Path,
    clock: Clock,
    *,
    engine: Path | None = None,
    wanted: PlanRequest | None = None,
) -> Shown:
    """Draws what an engine, or eager PyTorch by a plan, does with images: one PNG each in `directory`.

    Raises BadRequest before anything heavy is loaded: images that cannot be read or whose pictures would overwrite
    each other, a plan that keeps every token.
    """
    if (engine is None) == (wanted is None):
        raise BadRequest("Either an engine or a plan can be shown.", "Give one of the two.")
    if wanted is not None:
        models.check_request(wanted.model, wanted.weights)
        wanted.check()
        plan = wanted.plan(wanted.model)
    else:
        assert engine is not None
        plan = find_engine(engine).manifest.plan
    if not plan.stages:
        raise BadRequest(
            f"{plan.model} keeps every token in this plan: there is nothing to show.",
            "Give a method and a ratio below 1, or the engine of such a plan.",
        )
    paths = picture_paths(images, directory, plan.label)
    if directory.exists() and not directory.is_dir():
        raise BadRequest(f"{directory} is no folder: pictures cannot go there.", "Name another with --directory.")
    for image in images:
        open_image(image)
    if wanted is not None:
        model = load(wanted.model, wanted.weights, clock)
        pruned = prune(model, wanted.plan(model))
        source, origin = pruned.source, "eager PyTorch"
        with clock.step(f"run {plan.label} on {_count(images)}"):
            transform = transform_for(source.preprocessing, "float32")
            pixels = np.stack([transform(open_image(image)) for image in images])
            seen = seen_by_model(pruned, pixels)
    else:
        assert engine is not None
        with load_engine(engine) as session, clock.step(f"run {plan.label} on {_count(images)}"):
            manifest, source = session.manifest, session.manifest.source
            origin = f"{manifest.backend} {manifest.backend_version} {manifest.precision} on {manifest.device}"
            pixels = session.preprocess(list(images))
            seen = seen_by_engine(session, pixels, _geometry(source))
        if source.weights.kind == "random":
            clock.monitor.warn("This engine has random weights: which tokens it keeps means nothing.")
    warnings = [f"{reason}: which tokens are kept means nothing." for reason in _untrained(plan)]
    for text in (*warnings, *seen.notes):
        clock.monitor.warn(text)
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
                title=f"{image.name} · {source.name} · {plan.label}",
                subtitle=" ".join((f"Kept tokens as reported by {origin}.", *_pairs_only(seen, stages))),
                notes=notes,
            )
            write_picture(strip, path)
            drawn.append(Drawn(image, path, stages, notes))
            advance(1)
    return Shown(origin, source, plan, drawn)


def picture_report(images: Sequence[Path], engine: Path, clock: Clock) -> Shown:
    """Draws what an engine does with images into its own evidence, for its HTML report; earlier pictures go.

    Raises as `show`.
    """
    folder = engine / EVIDENCE / PICTURES_FOLDER
    shown = show(images, folder, clock, engine=engine)
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
