"""What an engine folder holds, read without opening the engine or importing what made it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ztp_deploy import backends, environment
from ztp_deploy.backends import PARITY_FILE, evidence_of_this_build, find_engine
from ztp_deploy.backends.base import Backend
from ztp_deploy.errors import MissingSoftware
from ztp_deploy.evidence.schema import SUMMARY_FILE
from ztp_deploy.evidence.selftest import has_selftest
from ztp_deploy.manifest import EngineManifest


class Speedup(NamedTuple):
    """How many times faster than dense an engine was at one batch size, and whether that was conclusive."""

    batch: int
    times: float
    verdict: str


@dataclass(frozen=True)
class Overview:
    """An engine folder whose files are those that its manifest lists.

    `unusable` says why this machine cannot open it, as far as that shows without opening. `parity`: `passed`, `failed`, `not checked`.
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
    manifest, folder = engine.manifest, engine.directory
    backend = backends.get(manifest.backend)
    missing, library, unusable = backend.missing(), None, None
    if missing:
        unusable = f"{missing} is not installed (pip install {missing})"
    else:
        try:
            library, unusable = backend.version(), _unusable(backend, manifest)
        except MissingSoftware as error:  # it is here and cannot be loaded
            unusable = error.problem
    passed = evidence_of_this_build(folder, PARITY_FILE).get("passed")
    summary = evidence_of_this_build(folder, SUMMARY_FILE)
    speedups = _speedups(summary)
    return Overview(
        directory=folder,
        manifest=manifest,
        bytes=sum(record.bytes for record in manifest.files.values()),
        library=library,
        unusable=unusable,
        parity="passed" if passed is True else "failed" if passed is False else "not checked",
        selftest=has_selftest(folder),
        speedups=speedups,
        measured_on=_machine(summary, manifest.device) if speedups else None,
    )


def _unusable(backend: Backend, manifest: EngineManifest) -> str | None:
    """What can be said without opening it: the device, and the instructions that it was compiled for."""
    reason = backend.unrunnable(manifest.device)
    if reason is None:
        try:
            environment.require_instructions(manifest.built.get("cpu_flags", ()))
        except MissingSoftware as error:
            return error.problem
    return reason


def _speedups(summary: dict[str, Any]) -> tuple[Speedup, ...]:
    """Those of a summary; none of one that is not as this package writes it."""
    try:
        gains = [(gain["batch"], gain["speedup"]) for gain in summary.get("gains", ())]
        return tuple(Speedup(int(batch), float(ratio["speedup"]), str(ratio["verdict"])) for batch, ratio in gains)
    except (KeyError, TypeError, ValueError):
        return ()


def _machine(summary: dict[str, Any], device: str) -> str | None:
    machine = summary.get("machine")
    found = summary.get("gpu") if device == "cuda" else machine.get("cpu") if isinstance(machine, dict) else None
    return found if isinstance(found, str) else None
