"""Formats: a pruned module becomes an artifact, a folder with graph(s) and a manifest."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Protocol, cast

from ztp_deploy.errors import BadRequest, nearest
from ztp_deploy.exporters.graph import InferenceGraph
from ztp_deploy.manifest import (
    ArtifactManifest,
    ImageInput,
    check_replaceable,
    hash_files,
    new_directory,
    read_manifest,
    recipe_hash,
    sweep,
    verify_files,
    write_manifest,
)
from ztp_deploy.pruning.prune import PrunedModel

FORMATS: dict[str, str] = {
    "onnx": "ztp_deploy.exporters.onnx",
    "torchscript": "ztp_deploy.exporters.torchscript",
}
EXPORTER_VERSION = 1


class Exporter(Protocol):
    """The face of a module in `exporters/`."""

    SUMMARY: str
    PRECISIONS: tuple[str, ...]
    PACKAGES: tuple[str, ...]
    OPSET: int | None

    def write(self, graph: InferenceGraph, directory: Path, image_batch: int) -> None:
        """Writes the graph file(s) into the folder, linted."""


@dataclass(frozen=True)
class Artifact:
    """An exported folder and its manifest."""

    directory: Path
    manifest: ArtifactManifest


def get(name: str) -> Exporter:
    """The exporter of that name. Raises BadRequest with the nearest names."""
    if name not in FORMATS:
        raise BadRequest(f"There is no format {name!r}.", f"Did you mean: {nearest(name, FORMATS)}?")
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

    `format`: "onnx" or "torchscript". `input="uint8"` puts the normalisation into the graph.
    `image_batch` (at least 2) is the batch of the example that is traced. The graph's outputs are
    `logits`, then `kept_1`, `kept_2` … (int32, original patch positions).
    Raises BadRequest, WriteFailed, and GateFailed where the graph breaks the op vocabulary.
    """
    exporter = get(format)
    check_precision(format, precision)
    if input not in ("float32", "uint8"):
        raise BadRequest(f"input={input!r} is unknown.", "Use float32 (normalised) or uint8 (pixels).")
    if image_batch < 2:
        raise BadRequest(f"image_batch={image_batch} would fix the batch in the graph.", "Use at least 2.")
    if not isinstance(pruned, PrunedModel):
        raise BadRequest(
            f"Only pruned modules are exported; a {type(pruned).__name__} came.", "Call ztp.prune(model, plan) first."
        )
    final = Path(directory)
    check_replaceable(final, ArtifactManifest)
    sweep(final.parent)
    versions = {package: version(package) for package in ("ztp_deploy", "torch", "timm", *exporter.PACKAGES)}
    recipe = recipe_hash(
        exporter=EXPORTER_VERSION,
        format=format,
        precision=precision,
        input=input,
        source=pruned.source.model_dump(mode="json"),
        plan=pruned.plan.model_dump(mode="json"),
        versions=versions,
    )
    standing = _standing(final, recipe)
    if standing is not None:
        return standing
    graph = InferenceGraph(pruned, input)
    with new_directory(final) as scratch:
        exporter.write(graph, scratch, image_batch)
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
            recipe=recipe,
            files=hash_files(scratch),
        )
        manifest = write_manifest(manifest, scratch)
    return Artifact(final, manifest)


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
    folder = Path(directory)
    manifest = read_manifest(folder, ArtifactManifest)
    verify_files(folder, manifest)
    return Artifact(folder, manifest)


def _standing(directory: Path, recipe: str) -> Artifact | None:
    """The finished artifact of the same recipe, if it is there and whole."""
    from ztp_deploy.errors import ZtpError

    try:
        artifact = load_artifact(directory)
    except ZtpError:
        return None
    return artifact if artifact.manifest.recipe == recipe else None
