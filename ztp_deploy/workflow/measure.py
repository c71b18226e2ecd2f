"""Latency and load of engines that stand: what a machine that only serves can do, too."""

from __future__ import annotations

import gc
import shlex
from collections.abc import Iterable, Sequence

from ztp_deploy import extras
from ztp_deploy.atomic import write_text
from ztp_deploy.backends import PARITY_FILE, Engine
from ztp_deploy.errors import BadRequest, GateFailed
from ztp_deploy.evidence.latency import LatencyReport, asked_batches, measure_latency
from ztp_deploy.evidence.load import Load, LoadReport, put_under
from ztp_deploy.evidence.report.summary import MEASURING
from ztp_deploy.evidence.schema import stored
from ztp_deploy.evidence.verdict import ParityReport, proof_of
from ztp_deploy.manifest import manifest_sha256
from ztp_deploy.workflow.progress import Clock


def bench(
    engines: dict[str, Engine], batches: Sequence[int] | None, seconds: float, clock: Clock, command: str
) -> LatencyReport:
    """Interleaved latency of the engines by role, by default at `usual_batches`."""
    batches = asked_batches({role: engine.manifest.batch for role, engine in engines.items()}, batches)
    gc.collect()
    with clock.step(f"{MEASURING} at batch {', '.join(map(str, batches))}", float(len(batches))) as advance:
        return measure_latency(engines, batches, seconds=seconds, command=command, progress=advance)


def require_proof(engines: Iterable[Engine]) -> None:
    """Raises BadRequest for an engine that was never proved as it stands, GateFailed for one that failed."""
    for engine in engines:
        if proof_of(engine) is not None:
            continue
        again = f"`ztp check --engine {shlex.quote(str(engine.directory))}`"
        report = stored(engine.evidence / PARITY_FILE, ParityReport)
        if report is not None and not report.passed and report.manifest_sha256 == manifest_sha256(engine.directory):
            raise GateFailed(f"{engine.directory} failed its last parity check.", f"See {again}, and build it again.")
        raise BadRequest(f"{engine.directory} has passed no parity check as it stands.", f"Prove it first: {again}.")


def bench_load(
    engines: dict[str, Engine],
    loads: Sequence[Load],
    batches: Sequence[int] | None,
    seconds: float,
    clock: Clock,
    command: str,
) -> LoadReport:
    """The engines by role under load, by default at `usual_batches`; the report joins each engine's evidence.

    Raises what `require_proof` and `measure_load` raise.
    """
    batches = asked_batches({role: engine.manifest.batch for role, engine in engines.items()}, batches)
    require_proof(engines.values())
    if loads[0].rate is None:
        levels = f"with {', '.join(str(load.clients) for load in loads)} clients"
    else:
        levels = f"at {', '.join(f'{load.rate:g}' for load in loads)} requests a second"
    gc.collect()
    title = f"measure load {levels}, at batch {', '.join(map(str, batches))}"
    with clock.step(title, float(len(batches) * len(loads))) as advance:
        report = put_under(loads, engines, batches, seconds, command, advance)
    for engine in engines.values():
        write_text(engine.evidence / report.file, report.to_json())
    if extras.lacking():
        clock.warn(
            "The engines' pages are not drawn anew here, which takes the extra `build`: `ztp report` does it where that is."
        )
        return report
    from ztp_deploy.workflow.reports import write_reports

    for engine in engines.values():
        write_reports(engine)
    return report
