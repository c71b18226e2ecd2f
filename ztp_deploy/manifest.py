"""Manifests: what a folder holds, hashed."""

from __future__ import annotations

import hashlib
import json
import operator
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ztp_deploy.errors import BadRequest, DamagedFiles, first_fault, write_failed
from ztp_deploy.plan import Plan
from ztp_deploy.source import Source

MANIFEST = "manifest.json"
_CHUNK = 1 << 20


class FileRecord(BaseModel):
    """Size and sha256 of one file a build wrote."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str


class ImageInput(BaseModel):
    """The image input: uint8 pixels, or float32 already normalised; [B, 3, size, size]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "images"
    dtype: Literal["float32", "uint8"]
    size: int


def folder_tags(source: Source, dtype: str) -> list[str]:
    """`uint8` for pixel input, `random` for random weights, and for what is the user's own a letter and six digits.

    `w`: weights; `l`: labels, the class names; `p`: preprocessing.
    """
    weights = {"random": ["random"], "pretrained": []}.get(source.weights.kind, [f"w{source.weights.sha256[:6]}"])
    said = source.model_dump(mode="json")
    own = [f"{name[0]}{hash_of(**{name: said[name]})[:6]}" for name in source.own]
    return (["uint8"] if dtype == "uint8" else []) + weights + own


class _Manifest(BaseModel):
    """What both kinds hold; the capitals are how refusals speak of a kind, `INSTEAD` where `folder` is of the other."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    NOUN: ClassVar[str]
    TITLE: ClassVar[str]
    COMMAND: ClassVar[str]
    INSTEAD: ClassVar[str]

    source: Source
    plan: Plan
    precision: str
    input: ImageInput
    outputs: tuple[str, ...]
    audit: tuple[str, ...]
    versions: dict[str, str]
    fingerprint: str
    files: dict[str, FileRecord]
    seal: str = ""

    @property
    def tags(self) -> list[str]:
        """What folder names add to model, plan and precision."""
        return folder_tags(self.source, self.input.dtype)

    @property
    def random_weights(self) -> bool:
        """Whether predictions mean nothing."""
        return self.source.weights.kind == "random"


class ArtifactManifest(_Manifest):
    """What an export wrote. `audit` names the score tensors of the stages; `fingerprint` hashes all that decided it."""

    NOUN = "artifact"
    TITLE = "exported artifact"
    COMMAND = "ztp export …"
    INSTEAD = "Give the artifact's folder; `ztp export …` makes one."

    schema_: Literal["ztp.artifact/2"] = Field(default="ztp.artifact/2", alias="schema")
    format: str
    opset: int | None = None


class BatchRange(BaseModel):
    """Smallest, optimal and largest batch of an engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: int = Field(ge=1)
    opt: int = Field(ge=1)
    max: int = Field(ge=1)

    @classmethod
    def parse(cls, value: str | int | Sequence[int]) -> BatchRange:
        """`"1:8:64"`, one number, or a triple; raises BadRequest unless 1 ≤ min ≤ opt ≤ max."""
        try:
            listed = value.split(":") if isinstance(value, str) else [value] if hasattr(value, "__index__") else value
            parts = [int(part) if isinstance(part, str) else operator.index(part) for part in listed]
        except (TypeError, ValueError):
            parts = []
        if len(parts) == 1:
            parts = parts * 3
        if isinstance(value, bool) or len(parts) != 3 or not 1 <= parts[0] <= parts[1] <= parts[2]:
            raise BadRequest(
                f"batch={value!r} is not a range.", "Give min:opt:max with 1 ≤ min ≤ opt ≤ max, such as 1:8:64."
            )
        return cls(min=parts[0], opt=parts[1], max=parts[2])

    def __str__(self) -> str:
        return f"{self.min}-{self.opt}-{self.max}"


class EngineManifest(_Manifest):
    """What a build wrote, for one back end, device, precision and batch range.

    `built` holds what the back end has to say of the build, `unproved` why the engine was not opened on the
    machine that built it (None: it was).
    """

    NOUN = TITLE = "engine"
    COMMAND = "ztp engine …"
    INSTEAD = "Build one from it: `ztp build --artifact {folder}`."

    schema_: Literal["ztp.engine/2"] = Field(default="ztp.engine/2", alias="schema")
    backend: str
    backend_version: str
    device: str
    provider: str
    batch: BatchRange
    settings: dict[str, Any] = {}
    built: dict[str, Any] = {}
    unproved: str | None = None
    format: str
    artifact: str
    artifact_sha256: str


M = TypeVar("M", ArtifactManifest, EngineManifest)


def hash_file(path: Path) -> FileRecord:
    """Size and sha256 of a file."""
    sha = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            sha.update(chunk)
    return FileRecord(bytes=path.stat().st_size, sha256=sha.hexdigest())


def hash_files(directory: Path) -> dict[str, FileRecord]:
    """All files directly in a folder, the manifest excepted."""
    return {
        path.name: hash_file(path) for path in sorted(directory.iterdir()) if path.is_file() and path.name != MANIFEST
    }


def hash_of(**ingredients: object) -> str:
    """One hash over everything that decides a result, as JSON, for finding a finished one again.

    Raises TypeError for what JSON does not hold: its text may leave out what differs.
    """
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


@cache
def sources_sha256(*rooms: str) -> str:
    """One hash over this package's own sources in `rooms` (files and folders of it): other code makes other files."""
    package = Path(__file__).parent
    files = [
        path for room in rooms for path in ([package / room] if Path(room).suffix else (package / room).rglob("*.py"))
    ]
    sha = hashlib.sha256()
    for path in sorted(files):
        sha.update(f"{path.relative_to(package).as_posix()} {hash_file(path).sha256}\n".encode())
    return sha.hexdigest()


def manifest_sha256(directory: Path) -> str:
    """The hash evidence files quote: that of the folder's manifest."""
    return hash_file(directory / MANIFEST).sha256


def write_manifest(manifest: M, directory: Path) -> M:
    """Seals the manifest, writes `manifest.json` into a folder that is still being made, and returns it sealed."""
    data, seal = sealed(manifest.model_dump(mode="json", by_alias=True))
    (directory / MANIFEST).write_bytes(data)
    return manifest.model_copy(update={"seal": seal})


def sealed(fields: dict[str, Any]) -> tuple[bytes, str]:
    """A manifest's file and its seal, the sha256 of the file with an empty seal: shows an edit; it is not a signature."""
    text = json.dumps(fields | {"seal": ""}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    seal = hashlib.sha256(text.encode()).hexdigest()
    # By its indentation it is the manifest's own, whatever settings are called.
    return text.replace('\n  "seal": ""', f'\n  "seal": "{seal}"').encode(), seal


def _seal_fits(data: bytes, seal: str) -> bool:
    stated = f'"seal": "{seal}"'.encode()
    return data.count(stated) == 1 and hashlib.sha256(data.replace(stated, b'"seal": ""')).hexdigest() == seal


def read_manifest(directory: Path, kind: type[M]) -> M:
    """Reads a folder's manifest. Raises BadRequest (not such a folder) and DamagedFiles (unreadable, edited)."""
    path = directory / MANIFEST
    if not path.is_file():
        why = f"it has no {MANIFEST}" if directory.exists() else "it does not exist"
        raise BadRequest(f"{directory} is not an {kind.NOUN} folder: {why}.", f"Make one with `{kind.COMMAND}`.")
    data = path.read_bytes()
    try:
        manifest = kind.model_validate_json(data)
    except ValidationError as error:
        found = _kind_of(path)
        if found not in (None, kind):
            raise BadRequest(
                f"{directory} is an {found.TITLE}, no {kind.TITLE}.",
                kind.INSTEAD.format(folder=shlex.quote(str(directory))),
            ) from error
        where, why = first_fault(error, "the file")
        schema = next((fault["input"] for fault in error.errors() if fault["loc"] == ("schema",)), None)
        if found is kind and isinstance(schema, str):
            ours = kind.model_fields["schema_"].default
            raise DamagedFiles(
                f"{path} was made by another version of ztp_deploy: its schema is {schema}, not {ours}.",
                f"Make it again: `{kind.COMMAND}`.",
            ) from error
        raise DamagedFiles(
            f"{path} is not a valid {kind.NOUN} manifest: {where}: {why}.", f"Run `{kind.COMMAND}` again."
        ) from error
    if not _seal_fits(data, manifest.seal):
        raise DamagedFiles(
            f"{path} was edited after it was written: its seal does not match.",
            f"Run `{kind.COMMAND}` again with what you want to change.",
        )
    return manifest


def _kind_of(path: Path) -> type[_Manifest] | None:
    """The kind of manifest that a file says it is, be it damaged or of another version; None for any other file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return next((kind for kind in (ArtifactManifest, EngineManifest) if f'"schema": "ztp.{kind.NOUN}/' in text), None)


def verify_files(directory: Path, manifest: _Manifest) -> None:
    """Checks every recorded file's size and hash. Raises DamagedFiles that names the first that differs."""
    for name, record in manifest.files.items():
        path = directory / name
        if Path(name).name != name:
            raise DamagedFiles(
                f"{directory / MANIFEST} names {name!r}, outside its folder.", "Load only what you built."
            )
        if not path.is_file():
            raise DamagedFiles(f"{path} is missing.", "Build it again.")
        size = path.stat().st_size
        if size != record.bytes:
            raise DamagedFiles(f"{path} has {size} bytes, the manifest says {record.bytes}.", "Build it again.")
        if hash_file(path).sha256 != record.sha256:
            raise DamagedFiles(
                f"{path} is not what was built: its sha256 differs from the manifest's.",
                "Build it again, and load only what you built.",
            )


def listed(directory: Path, manifest: ArtifactManifest | EngineManifest, name: str) -> Path:
    """The path of a file of the folder. Raises DamagedFiles unless the manifest lists it: any other was not verified."""
    if name not in manifest.files:
        kind = f"{manifest.backend} engines" if isinstance(manifest, EngineManifest) else f"{manifest.format} artifacts"
        raise DamagedFiles(f"{directory / MANIFEST} does not list {name}, which {kind} consist of.", "Build it again.")
    return directory / name


def check_replaceable(directory: Path, kind: type[_Manifest]) -> None:
    """Refuses to write where anything stands but an empty folder or an earlier folder of the same kind."""
    try:
        if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
            return
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise write_failed(str(directory), error) from error
    if _kind_of(directory / MANIFEST) is not kind:
        raise BadRequest(
            f"{directory} is in the way: it is not an {kind.NOUN} folder, and nothing of yours is overwritten.",
            "Choose another folder, or move it away.",
        )
