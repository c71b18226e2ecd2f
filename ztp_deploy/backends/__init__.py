"""Engines: `build` makes one from an artifact, `load_engine` opens one; the same face for every back end."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ztp_deploy import environment, exporters
from ztp_deploy.atomic import new_directory, sweep
from ztp_deploy.backends.base import Backend, BuildJob, Device, Session, check_images
from ztp_deploy.backends.settings import parse
from ztp_deploy.defaults import BATCH, ENGINES_ROOT
from ztp_deploy.errors import BadRequest, BuildFailed, DamagedFiles, MissingSoftware, ZtpError, suggestion
from ztp_deploy.exporters import Artifact, load_artifact
from ztp_deploy.manifest import (
    ArtifactManifest,
    BatchRange,
    EngineManifest,
    check_replaceable,
    hash_files,
    hash_of,
    manifest_sha256,
    read_manifest,
    sources_sha256,
    verify_files,
    write_manifest,
)

BACKENDS: dict[str, str] = {
    "aotinductor": "ztp_deploy.backends.aotinductor",
    "onnxruntime": "ztp_deploy.backends.onnxruntime.backend",
    "openvino": "ztp_deploy.backends.openvino.backend",
    "torchscript": "ztp_deploy.backends.torchscript",
    "tensorrt": "ztp_deploy.backends.tensorrt:TENSORRT",
    "tensorrt_rtx": "ztp_deploy.backends.tensorrt:TENSORRT_RTX",
}
EVIDENCE = "evidence"
PARITY_FILE = "parity.json"
_LARGEST_EVIDENCE = 2**28
SOURCES = (*exporters.SOURCES, "backends", "environment.py", "cpp/openvino_stage/stage.cpp")
"""What of this package decides an engine: builds change graphs, and compile methods' stages."""


class ParityWarning(UserWarning):
    """The engine that is opened failed its last parity check: its answers are not the model's."""


@dataclass(frozen=True)
class Engine:
    """A built engine's folder and its manifest."""

    directory: Path
    manifest: EngineManifest = field(repr=False)

    @property
    def evidence(self) -> Path:
        """The folder for what was proved and measured of this engine."""
        return self.directory / EVIDENCE


def get(name: str) -> Backend:
    """The back end of that name. Raises BadRequest with the nearest names."""
    if not isinstance(name, str) or name not in BACKENDS:
        raise BadRequest(f"There is no back end {name!r}.", suggestion(name, BACKENDS))
    module, _, attribute = BACKENDS[name].partition(":")
    found = import_module(module)
    return cast(Backend, getattr(found, attribute) if attribute else found)


def choose(name: str) -> str:
    """`auto` resolved: TensorRT where it and a GPU are here, else ONNX Runtime, which comes with what builds."""
    if name != "auto":
        return name
    return "tensorrt" if environment.gpus() and not get("tensorrt").missing() else "onnxruntime"


def usable(name: str) -> Backend:
    """The back end, its software present. Raises MissingSoftware with the pip command."""
    backend = get(name)
    missing = backend.missing()
    if missing:
        raise MissingSoftware(f"Back end {name} needs {missing}, which is not installed.", f"pip install {missing}")
    return backend


@dataclass(frozen=True)
class Target:
    """What decides an engine besides its artifact, every "auto" resolved; the software to build it is here.

    `graph_precision`: the precision of the graph that it is built from.
    """

    name: str
    backend: Backend
    device: Device
    precision: str
    graph_precision: str
    batch: BatchRange
    settings: dict[str, Any]

    @property
    def calibrated(self) -> bool:
        """Whether engines of this precision are fitted to images."""
        return self.precision in self.backend.CALIBRATED

    @property
    def unrunnable(self) -> str | None:
        """Why this machine can build the engine and not run it; None where it can."""
        return self.backend.unrunnable(self.device.name)


def resolve(
    backend: str,
    *,
    device: str = "auto",
    precision: str = "fp32",
    batch: tuple[int, int, int] | str | int = BATCH,
    settings: Mapping[str, Any] | None = None,
) -> Target:
    """The target that these words, those of `build`, mean on this machine. Raises BadRequest and MissingSoftware."""
    name = choose(backend)
    module = usable(name)
    check_precision(name, precision)
    span = BatchRange.parse(batch)
    if not isinstance(settings or {}, Mapping):
        raise BadRequest(f"settings={settings!r} are not settings.", "Give a dict, such as {'threads': 1}.")
    target = Target(
        name=name,
        backend=module,
        precision=precision,
        graph_precision=module.graph_precision(precision),
        device=module.resolve_device(device),
        batch=span,
        settings=parse(module.Settings, dict(settings or {}), name),
    )
    module.check_target(target.device.name, precision, target.settings)
    return target


def here(name: str) -> tuple[str, str]:
    """What this machine can do with a back end: `OK`, `builds only` or `missing`, and the particulars."""
    module = get(name)
    if missing := module.missing():
        return "missing", f"pip install {missing}"
    try:
        device = module.resolve_device("auto")
        place = f"{module.version()} on {device.slug}"
    except MissingSoftware as error:  # a library that is here, and cannot be loaded or lacks its device
        return "missing", error.problem
    return ("builds only", f"{place}: {reason}") if (reason := module.unrunnable(device.name)) else ("OK", place)


def engine_directory(
    root: Path, artifact: ArtifactManifest, target: Target, calibration: NDArray[Any] | None = None
) -> Path:
    """`root/<backend>-<version>-<device>/<model>--<method>-<ratio>--<precision>--b<min>-<opt>-<max>[--tag…]`.

    Tags: `uint8` input, `random` weights or the first digits of weights of your own, `l` and `p` with a hash of class
    names and of preprocessing of your own, `s` and a hash of settings that are not the back end's own choice, `c` and
    a hash of the images that a precision is fitted to: engines that differ never share a folder.
    `calibration`: those images, [M, 3, H, W].
    """
    machine = f"{target.name}-{target.backend.version()}-{target.device.slug}"
    parts = [artifact.source.name, artifact.plan.label, target.precision, f"b{target.batch}", *artifact.tags]
    if target.settings != parse(target.backend.Settings, {}, target.name):
        parts.append(f"s{hash_of(settings=target.settings)[:6]}")
    if images := _fitted_to(target, calibration):
        parts.append(f"c{images[:6]}")
    return root / machine / "--".join(parts)


def _fitted_to(target: Target, calibration: NDArray[Any] | None) -> str | None:
    """The sha256 of the images that the target's precision is fitted to; None where it is fitted to none."""
    if not isinstance(calibration, np.ndarray) or not target.calibrated:  # what is not an array is refused by the build
        return None
    return hashlib.sha256(np.ascontiguousarray(calibration).tobytes()).hexdigest()


class NameTags(NamedTuple):
    """What an engine folder's name says beyond model, plan and precision; None for what is as usual.

    `batch`: its one batch size (`b8`), None for a range. `settings`, `calibration`: their tags.
    """

    batch: str | None
    settings: str | None
    calibration: str | None


def name_tags(folder: str) -> NameTags:
    """The tags of an engine folder's name, or of a path that ends in it."""
    batch = re.search(r"--(b(\d+))-\2-\2(?=--|$)", folder)
    settings, calibration = (re.search(rf"--({letter}[0-9a-f]{{6}})(?=--|$)", folder) for letter in "sc")
    return NameTags(*(found and found[1] for found in (batch, settings, calibration)))


def build(
    artifact: Artifact | Path | str,
    backend: str,
    *,
    device: str = "auto",
    precision: str = "fp32",
    batch: tuple[int, int, int] | str | int = BATCH,
    directory: Path | str | None = None,
    settings: Mapping[str, Any] | None = None,
    calibration: NDArray[Any] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Engine:
    """Builds the engine folder for an artifact, or returns it where it stands already.

    `artifact`: what `export` returned, or the path of its folder, whose files are verified first.
    `device`: "auto" (a GPU where back end and machine have one), "cpu" or "cuda". `batch` is
    (smallest, optimal, largest). `directory` defaults to the path under `engines/` that names
    everything the engine depends on. `settings` are the back end's own. `calibration`: images
    [M, 3, H, W] for precisions that are fitted to some (int8, fp8). `progress` is called with shares
    of the work done. Where this machine cannot run the engine (no GPU), `manifest.unproved` says so.
    Raises BadRequest, MissingSoftware, DamagedFiles, WriteFailed, BuildFailed, and GateFailed where what came out is not
    what was asked for.
    """
    target = resolve(backend, device=device, precision=precision, batch=batch, settings=settings)
    if not isinstance(artifact, Artifact):
        artifact = load_artifact(artifact)
    if directory is None:
        directory = engine_directory(ENGINES_ROOT, artifact.manifest, target, calibration)
    return build_target(artifact, target, Path(directory), calibration=calibration, progress=progress)


def build_target(
    artifact: Artifact,
    target: Target,
    directory: Path,
    *,
    calibration: NDArray[Any] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Engine:
    """What `build` does once its words are resolved. Raises what it raises."""
    _check_fits(artifact.manifest, target, calibration)
    check_replaceable(directory, EngineManifest)
    sweep(directory.parent)
    wanted = _wanted(artifact, target, directory, calibration)
    standing = _standing(directory, wanted)
    if standing is not None:
        return standing
    verify_files(artifact.directory, artifact.manifest)
    with new_directory(directory) as scratch:
        advance = progress or (lambda share: None)
        job = BuildJob(
            artifact, scratch, target.device, target.precision, target.batch, target.settings, calibration, advance
        )
        built = wanted.built | target.backend.build(job)
        if calibration is not None and target.calibrated:
            built["calibration_images"] = len(calibration)
        provider = built.pop("provider", wanted.provider)
        manifest = wanted.model_copy(update={"provider": provider, "built": built, "files": hash_files(scratch)})
        # Opening it once proves that the device takes it before anything is called built.
        if manifest.unproved is None:
            try:
                target.backend.open_runner(scratch, manifest).close()
            except DamagedFiles as error:  # what was built a moment ago is no damage
                raise BuildFailed(
                    error.problem, "Nothing was kept. Choose other settings, or another back end."
                ) from error
        manifest = write_manifest(manifest, scratch)
    return Engine(directory, manifest)


def _check_fits(source: ArtifactManifest, target: Target, calibration: NDArray[Any] | None) -> None:
    """Raises BadRequest where the target is not built from such an artifact, or needs images to be fitted to."""
    name, wanted = target.name, target.backend.FORMAT
    if source.format != wanted:
        raise BadRequest(
            f"Back end {name} is built from {wanted}; the artifact is {source.format}.",
            f"Export it with format={wanted!r}.",
        )
    graph_precision = target.graph_precision
    if graph_precision != source.precision:
        raise BadRequest(
            f"A {target.precision} engine of {name} is built from a {graph_precision} graph; the artifact holds {source.precision}.",
            f"Precision is written into the graph: export with precision={graph_precision!r}.",
        )
    if not target.calibrated:
        return
    if calibration is None or (isinstance(calibration, np.ndarray) and not calibration.size):
        raise BadRequest(
            f"A {target.precision} engine is calibrated on images and none were given.",
            "Give calibration=images [M, 3, H, W].",
        )
    if not isinstance(calibration, np.ndarray):
        raise BadRequest(
            f"calibration={type(calibration).__name__} is not an array of images.", "Give a NumPy array [M, 3, H, W]."
        )
    check_images(calibration, source.input)


def _wanted(artifact: Artifact, target: Target, directory: Path, calibration: NDArray[Any] | None) -> EngineManifest:
    """The manifest of an engine in `directory` as it is known before the build, which adds files and what it says of itself."""
    source, backend = artifact.manifest, target.backend
    fingerprint = hash_of(
        artifact=source.fingerprint,
        sources=sources_sha256(*SOURCES),
        backend=target.name,
        version=backend.version(),
        instructions=backend.instructions(target.settings),
        device=target.device.slug,
        precision=target.precision,
        batch=target.batch.model_dump(),
        settings=target.settings,
        calibration=_fitted_to(target, calibration),
    )
    tools = backend.tools(target.precision, target.settings)
    return EngineManifest(
        source=source.source,
        plan=source.plan,
        precision=target.precision,
        input=source.input,
        outputs=source.outputs,
        audit=source.audit,
        versions=source.versions,
        fingerprint=fingerprint,
        files={},
        backend=target.name,
        backend_version=backend.version(),
        device=target.device.name,
        provider=target.device.provider,
        batch=target.batch,
        settings=target.settings,
        built={"tools": tools} if tools else {},
        unproved=target.unrunnable,
        format=source.format,
        # Links resolved as whoever follows it will: `engines/` may be one.
        artifact=os.path.relpath(artifact.directory.resolve(), directory.parent.resolve() / directory.name),
        artifact_sha256=manifest_sha256(artifact.directory),
    )


def check_precision(backend: str, precision: str) -> None:
    """Raises BadRequest where the back end has no engines of that precision."""
    known = get(backend).PRECISIONS
    if precision not in known:
        raise BadRequest(
            f"{backend} builds {', '.join(known)}; precision={precision!r} was asked for.",
            f"Use one of {', '.join(known)}.",
        )


def find_engine(engine: Engine | Path | str) -> Engine:
    """An engine or its folder with every file verified, not opened. Raises BadRequest and DamagedFiles."""
    if not isinstance(engine, (Engine, str, Path)):
        raise BadRequest(
            f"An engine or the path of its folder is needed; got {type(engine).__name__}.",
            "Make one with ztp.build(artifact, backend).",
        )
    folder = engine.directory if isinstance(engine, Engine) else Path(engine)
    manifest = read_manifest(folder, EngineManifest)
    verify_files(folder, manifest)
    return Engine(folder, manifest)


def require_runnable(engine: Engine) -> Backend:
    """The engine's back end. Raises MissingSoftware where its library or its device is not here."""
    manifest = engine.manifest
    module = usable(manifest.backend)
    reason = module.unrunnable(manifest.device)
    if reason:
        raise MissingSoftware(
            f"{engine.directory} runs on {manifest.device}, but {reason}.",
            "Open it on a machine that has one, or build for this one (`ztp doctor`).",
        )
    return module


def load_engine(directory: Engine | Path | str) -> Session:
    """Opens an engine, what `build` returned or a folder, after verifying its manifest and every file's sha256.

    Warns of one that failed its last parity check (ParityWarning), and of one built with another release of its library.
    TorchScript, AOTInductor and TensorRT engines and OpenVINO's with compiled stages are code: load only what you built.
    Raises BadRequest (no engine folder), DamagedFiles (edited, truncated, missing) and MissingSoftware (library or device not here).
    """
    session = open_engine(directory)
    manifest, folder = session.manifest, shlex.quote(str(session.directory))
    version = get(manifest.backend).version()
    if version != manifest.backend_version:
        warnings.warn(
            f"{session.directory} was built and checked with {manifest.backend} {manifest.backend_version}; "
            f"this is {version}. Run `ztp check --engine {folder}`.",
            stacklevel=2,
        )
    failed = _failed_check(session.directory)
    if failed is not None:
        warnings.warn(
            f"{session.directory} ({manifest.precision}) failed its last parity check{failed}: do not rely on its answers. "
            f"Run `ztp check --engine {folder}`, and build it again.",
            ParityWarning,
            stacklevel=2,
        )
    return session


def open_engine(directory: Engine | Path | str) -> Session:
    """`load_engine` without its warnings, for who is about to judge the engine. Raises what it raises."""
    engine = find_engine(directory)
    runner = require_runnable(engine).open_runner(engine.directory, engine.manifest)
    return Session(engine.directory, engine.manifest, runner)


def evidence_of_this_build(directory: Path, name: str) -> dict[str, Any]:
    """What an evidence file says of the engine as it stands; nothing where it is of another build or cannot be read."""
    path = directory / EVIDENCE / name
    try:
        # A pipe would be waited for, and what is larger than any evidence is none.
        if not path.is_file() or path.stat().st_size > _LARGEST_EVIDENCE:
            return {}
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    ours = isinstance(found, dict) and found.get("manifest_sha256") == manifest_sha256(directory)
    return found if ours else {}


def _failed_check(directory: Path) -> str | None:
    """Where the parity check of this very manifest failed, as " between … and …"; None unless it did."""
    report = evidence_of_this_build(directory, PARITY_FILE)
    try:
        if report["passed"]:
            return None
        edges = [(edge["reference"], edge["candidate"]) for edge in report["edges"] if edge["faults"]]
    except (KeyError, TypeError):
        return None
    return " between {} and {}".format(*edges[0]) if edges else ""


def _standing(directory: Path, wanted: EngineManifest) -> Engine | None:
    """The finished engine of the same fingerprint, if it is there and whole, and no tool here is another than its own.

    One that is not here leaves it standing: nothing could be built in its place.
    """
    try:
        engine = find_engine(directory)
    except ZtpError:
        return None
    found, tools = engine.manifest, wanted.built.get("tools", {})
    same = (found.fingerprint, found.artifact_sha256) == (wanted.fingerprint, wanted.artifact_sha256)
    return engine if same and tools.items() <= found.built.get("tools", {}).items() else None
