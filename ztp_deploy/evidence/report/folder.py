"""What an engine folder says of its engine: every evidence file that can be read and is of this build."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from ztp_deploy.backends import EVIDENCE, PARITY_FILE
from ztp_deploy.evidence.accuracy import ACCURACY_FILE, AccuracyReport
from ztp_deploy.evidence.latency import LATENCY_FILE, LatencyReport
from ztp_deploy.evidence.load import LOAD_FILE, RATE_FILE, LoadReport
from ztp_deploy.evidence.report.summary import Summary, summarise
from ztp_deploy.evidence.schema import SUMMARY_FILE, EvidenceFile
from ztp_deploy.evidence.verdict import ParityReport
from ztp_deploy.manifest import EngineManifest, hash_file, manifest_sha256, read_manifest

PICTURES_FILE = "pictures.json"
PICTURES_FOLDER = "pictures"


class PictureFile(BaseModel):
    """One picture that `ztp report --pictures` had drawn, and the words beneath it."""

    file: str
    sha256: str
    caption: str


class Pictures(EvidenceFile):
    """The pictures that a page shows (`evidence/pictures.json`)."""

    schema_: Literal["ztp.pictures/1"] = Field(default="ztp.pictures/1", alias="schema")
    manifest_sha256: str
    pictures: list[PictureFile]


@dataclass(frozen=True)
class Picture:
    """A PNG file's bytes and the words beneath it."""

    png: bytes
    caption: str

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Evidence:
    """What an engine folder says of its engine as it stands.

    `made` says whether a finished run wrote its command and times (else those of `summary` mean nothing);
    `left_out` holds a sentence for each file that was not taken, and why.
    """

    manifest: EngineManifest
    manifest_sha256: str
    summary: Summary
    made: bool
    parity: ParityReport | None
    latency: LatencyReport | None
    accuracy: AccuracyReport | None
    loads: tuple[LoadReport, ...] = ()
    pictures: tuple[Picture, ...] = ()
    left_out: tuple[str, ...] = ()


E = TypeVar("E", bound=EvidenceFile)


def read_evidence(directory: Path) -> Evidence:
    """Reads an engine folder; evidence of another build and files that cannot be read are left out, and it says so.

    Raises BadRequest where the folder holds no engine, DamagedFiles where its manifest was edited.
    """
    manifest = read_manifest(directory, EngineManifest)
    sha = manifest_sha256(directory)
    folder = directory / EVIDENCE
    left_out: list[str] = []

    def take(name: str, kind: type[E]) -> E | None:
        return _take(folder / name, kind, sha, left_out)

    parity, latency = take(PARITY_FILE, ParityReport), take(LATENCY_FILE, LatencyReport)
    accuracy, stored = take(ACCURACY_FILE, AccuracyReport), take(SUMMARY_FILE, Summary)
    loads = tuple(filter(None, (take(name, LoadReport) for name in (LOAD_FILE, RATE_FILE))))
    listed = take(PICTURES_FILE, Pictures)
    machine = latency or parity or accuracy or next(iter(loads), None)
    # Where it was made, as it was typed: the page is to be mailed, and whoever renders it may sit elsewhere.
    summary = summarise(
        manifest,
        Path(stored.engine) if stored else directory,
        parity,
        latency,
        command=stored.command if stored else latency.command if latency else "",
        steps=stored.steps if stored else [],
        peak_gib=stored.peak_gib if stored else 0.0,
        machine=machine.environment if machine else stored.machine if stored else {},
        manifest_sha256=sha,
    )
    # The GPU of the machine that measured, not of the one that renders.
    gpu = latency.gpu if latency else stored.gpu if stored else ""
    return Evidence(
        manifest=manifest,
        manifest_sha256=sha,
        summary=summary.model_copy(update={"gpu": gpu}),
        made=stored is not None,
        parity=parity,
        latency=latency,
        accuracy=accuracy,
        loads=loads,
        pictures=_pictures(folder, listed, left_out),
        left_out=tuple(left_out),
    )


def _take(path: Path, kind: type[E], sha: str, left_out: list[str]) -> E | None:
    """An evidence file where it is there, readable and of this manifest; else a sentence unless it is not there."""
    if not path.is_file():
        return None
    try:
        found = kind.model_validate_json(path.read_bytes())
    except (ValidationError, OSError):
        left_out.append(f"{path.name} cannot be read and is left out: make it again.")
        return None
    quoted = _quoted(found, sha)
    if quoted != sha:
        of = f"quotes manifest {quoted[:12]}…" if quoted else "names no manifest"
        left_out.append(
            f"{path.name} {of}, this engine's is {sha[:12]}…: it is of another build and left out. Make it again."
        )
        return None
    return found


def _quoted(found: EvidenceFile, sha: str) -> str | None:
    """The manifest that a file is about; of the several that engines under load have, the one of `sha` if it is there."""
    if isinstance(found, LoadReport):
        every = [level.manifest_sha256 for level in found.levels]
        return sha if sha in every else next(iter(every), None)
    if isinstance(found, LatencyReport):
        return next((sample.manifest_sha256 for sample in found.samples if sample.role == "pruned"), None)
    quoted: str | None = getattr(found, "manifest_sha256", None)
    return quoted


def _pictures(folder: Path, listed: Pictures | None, left_out: list[str]) -> tuple[Picture, ...]:
    found = []
    for one in listed.pictures if listed else ():
        path = folder / PICTURES_FOLDER / one.file
        if Path(one.file).name != one.file or not path.is_file() or hash_file(path).sha256 != one.sha256:
            left_out.append(
                f"The picture {one.file} is missing or was changed, and left out: ztp report draws it again."
            )
            continue
        found.append(Picture(path.read_bytes(), one.caption))
    return tuple(found)
