"""Formats: a pruned module becomes an artifact, a folder with graph(s) and a manifest."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

from ztp_deploy.atomic import new_directory, sweep
from ztp_deploy.errors import BadRequest, ZtpError, suggestion
from ztp_deploy.manifest import (
    ArtifactManifest,
    ImageInput,
    check_replaceable,
    hash_files,
    hash_of,
    read_manifest,
    sources_sha256,
    verify_files,
    write_manifest,
)
from ztp_deploy.plan import Plan
from ztp_deploy.source import Source

if TYPE_CHECKING:
    from ztp_deploy.exporters.graph import InferenceGraph
    from ztp_deploy.pruning.prune import PrunedModel

FORMATS: dict[str, str] = {
    "onnx": "ztp_deploy.exporters.onnx",
    "torch_export": "ztp_deploy.exporters.torch_export",
    "torchscript": "ztp_deploy.exporters.torchscript",
}
SOURCES = ("plan.py", "source.py", "models", "methods", "pruning", "exporters")
"""What of this package decides a graph: with other code, an artifact that stands is exported again."""


class Exporter(Protocol):
    """The face of a module in `exporters/`."""

    SUMMARY: str
    PRECISIONS: tuple[str, ...]
    PACKAGES: tuple[str, ...]
    OPSET: int | None

    def write(self, graph: InferenceGraph, directory: Path, image_batch: int, precision: str) -> None:
        """Writes the graph file(s) into the folder, linted."""


@dataclass(frozen=True)
class Artifact:
    """An exported folder and its manifest."""

    directory: Path
    manifest: ArtifactManifest = field(repr=False)


def get(name: str) -> Exporter:
    """The exporter of that name. Raises BadRequest with the nearest names."""
    if not isinstance(name, str) or name not in FORMATS:
        raise BadRequest(f"There is no format {name!r}.", suggestion(name, FORMATS))
    return cast(Exporter, import_module(FORMATS[name]))


def export(
    pruned: PrunedModel,
    format: str,
    directory: Path | str,
    *,
    precision: str = "fp32",
    image_batch: int = 2,
    input: Literal["float32", "uint8"] = "float32",
) -> Artifact:
    """Writes `directory` with the graph (dynamic batch) and its manifest, or returns it where it stands already.

    `format`: "onnx", "torch_export" or "torchscript". `precision` other than fp32 leaves scores and logits in fp32. `input="uint8"` puts the normalisation into the graph.
    `image_batch` (at least 2) is the batch of the example that is traced. The graph's outputs are
    `logits`, then `kept_1`, `kept_2` … (int32, original patch positions).
    Raises BadRequest, WriteFailed, and GateFailed where the graph breaks the op vocabulary.
    """
    # Here alone: artifacts are opened, and engines served, without torch.
    from ztp_deploy.exporters.graph import InferenceGraph
    from ztp_deploy.pruning.prune import PrunedModel

    exporter = get(format)
    check_precision(format, precision)
    if input not in ("float32", "uint8"):
        raise BadRequest(f"input={input!r} is unknown.", "Use float32 (normalised) or uint8 (pixels).")
    if image_batch < 2:
        raise BadRequest(f"image_batch={image_batch} would fix the batch in the graph.", "Use at least 2.")
    if not isinstance(pruned, PrunedModel):
        raise BadRequest(
            f"Only pruned modules are exported; got a {type(pruned).__name__}.", "Call ztp.prune(model, plan) first."
        )
    if any(getattr(stage, "batch_dependent", False) for stage in pruned.stages.values()):
        raise BadRequest(
            f"What {pruned.plan.label} keeps of an image depends on the others in its batch: no engine could be proved.",
            "Leave that option out (batch_padding of ats).",
        )
    if not isinstance(directory, (str, Path)):
        raise BadRequest(f"directory={directory!r} is not a path.", "Give the folder that the artifact becomes.")
    final = Path(directory)
    check_replaceable(final, ArtifactManifest)
    sweep(final.parent)
    versions = {package: version(package) for package in ("ztp_deploy", "torch", "timm", *exporter.PACKAGES)}
    fingerprint = _fingerprint(format, precision, input, pruned.source, pruned.plan, versions)
    standing = _standing(final, fingerprint)
    if standing is not None:
        return standing
    graph = InferenceGraph(pruned, input)
    with new_directory(final) as scratch:
        exporter.write(graph, scratch, image_batch, precision)
        manifest = ArtifactManifest(
            source=pruned.source,
            plan=pruned.plan,
            format=format,
            precision=precision,
            input=ImageInput(dtype=input, size=pruned.plan.image_size),
            outputs=graph.output_names,
            audit=graph.audit_names,
            opset=exporter.OPSET,
            versions=versions,
            fingerprint=fingerprint,
            files=hash_files(scratch),
        )
        manifest = write_manifest(manifest, scratch)
    return Artifact(final, manifest)


def derives(format: str) -> bool:
    """Whether the format's lower precisions are derived from its fp32 artifact, without tracing anew."""
    return hasattr(get(format), "convert")


def convert(artifact: Artifact, precision: str, directory: Path | str) -> Artifact:
    """The fp32 artifact in another precision, in a folder of its own: the artifact that `export` would have made.

    Raises BadRequest for artifacts of another precision and formats that are written from the model only.
    """
    source = artifact.manifest
    check_precision(source.format, precision)
    if source.precision != "fp32" or not derives(source.format):
        raise BadRequest(
            f"A {source.precision} artifact in {source.format} cannot be converted.", "Give a float32 ONNX artifact."
        )
    final = Path(directory)
    check_replaceable(final, ArtifactManifest)
    sweep(final.parent)
    fingerprint = _fingerprint(
        source.format, precision, source.input.dtype, source.source, source.plan, source.versions
    )
    standing = _standing(final, fingerprint)
    if standing is not None:
        return standing
    verify_files(artifact.directory, source)
    with new_directory(final) as scratch:
        get(source.format).convert(artifact.directory, source.plan, scratch, precision)  # type: ignore[attr-defined]
        changes = {"precision": precision, "fingerprint": fingerprint, "files": hash_files(scratch)}
        manifest = write_manifest(source.model_copy(update=changes), scratch)
    return Artifact(final, manifest)


def _fingerprint(format: str, precision: str, input: str, source: Source, plan: Plan, versions: dict[str, str]) -> str:
    return hash_of(
        sources=sources_sha256(*SOURCES),
        format=format,
        precision=precision,
        input=input,
        source=source.model_dump(mode="json"),
        plan=plan.model_dump(mode="json"),
        versions=versions,
    )


def check_precision(format: str, precision: str) -> None:
    """Raises BadRequest where the format is not exported in that precision."""
    known = get(format).PRECISIONS
    if precision not in known:
        raise BadRequest(
            f"{format} is exported in {', '.join(known)}; precision={precision!r} was asked for.",
            f"Use precision={known[0]}.",
        )


def load_artifact(directory: Path | str) -> Artifact:
    """An artifact folder, its files verified. Raises BadRequest and DamagedFiles."""
    if not isinstance(directory, (str, Path)):
        raise BadRequest(
            f"An artifact or the path of its folder is needed; got {type(directory).__name__}.",
            "Make one with ztp.export(pruned, format, directory).",
        )
    folder = Path(directory)
    manifest = read_manifest(folder, ArtifactManifest)
    verify_files(folder, manifest)
    return Artifact(folder, manifest)


def _standing(directory: Path, fingerprint: str) -> Artifact | None:
    """The finished artifact of the same fingerprint, if it is there and whole."""
    try:
        artifact = load_artifact(directory)
    except ZtpError:
        return None
    return artifact if artifact.manifest.fingerprint == fingerprint else None
