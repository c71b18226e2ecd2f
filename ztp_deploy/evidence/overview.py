"""What an engine folder holds, read without opening the engine or importing what made it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ztp_deploy import backends
from ztp_deploy.backends import EVIDENCE, PARITY_FILE, find_engine
from ztp_deploy.backends.base import Device
from ztp_deploy.evidence.schema import SUMMARY_FILE
from ztp_deploy.evidence.selftest import SELFTEST_FILE
from ztp_deploy.manifest import EngineManifest, manifest_sha256


class Speedup(NamedTuple):
    """How many times faster than dense an engine was at one batch size, and whether that was conclusive."""

    batch: int
    times: float
    verdict: str


@dataclass(frozen=True)
class Overview:
    """An engine folder whose files are those that its manifest lists.

    `unusable` says why this machine cannot open it, None where it can. `parity`: `passed`, `failed`, `not checked`.
    `speedups` are those of `report.json`, where that is of this build, and `measured_on` its processor or GPU.
    """

    directory: Path
    manifest: EngineManifest
    bytes: int
    library: str | None
    unusable: str | None
    parity: str
    selftest: bool
    speedups: tuple[Speedup, ...]
    measured_on: str | None


def overview(directory: Path | str) -> Overview:
    """Reads an engine folder and verifies its files. Raises BadRequest and DamagedFiles as `load_engine` does."""
    engine = find_engine(directory)
    manifest, sha = engine.manifest, manifest_sha256(engine.directory)
    backend = backends.get(manifest.backend)
    missing = backend.missing()
    unusable = (
        f"pip install {missing}" if missing else backend.unrunnable(Device(manifest.device, "", manifest.provider))
    )
    parity, summary = (_evidence(engine.evidence / name, sha) for name in (PARITY_FILE, SUMMARY_FILE))
    gains = summary.get("gains") or []
    return Overview(
        directory=engine.directory,
        manifest=manifest,
        bytes=sum(record.bytes for record in manifest.files.values()),
        library=None if missing else backend.version(),
        unusable=unusable,
        parity={True: "passed", False: "failed"}.get(parity.get("passed"), "not checked"),  # type: ignore[arg-type]
        selftest=(engine.directory / EVIDENCE / SELFTEST_FILE).is_file(),
        speedups=tuple(
            Speedup(gain["batch"], gain["speedup"]["speedup"], gain["speedup"]["verdict"]) for gain in gains
        ),
        measured_on=summary.get("machine", {}).get("cpu") if gains else None,
    )


def _evidence(path: Path, sha: str) -> dict[str, Any]:
    """A file of evidence of this very manifest; nothing of another's, or of one that cannot be read."""
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        return found if found["manifest_sha256"] == sha else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
