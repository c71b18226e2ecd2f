"""`make compare`: pruning methods against each other, in one interleaved run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ztp_deploy.defaults import BENCH_SECONDS
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.latency import check_seconds
from ztp_deploy.evidence.methods import DENSE, MethodsReport, methods_report, twin_role
from ztp_deploy.methods.slice import twin_of
from ztp_deploy.plan import Plan
from ztp_deploy.planning import make_plan
from ztp_deploy.workflow import steps
from ztp_deploy.workflow.progress import Clock, Monitor
from ztp_deploy.workflow.requests import BuildRequest, PlanRequest


def compare_methods(
    model_name: str,
    wanted: Sequence[PlanRequest],
    build: BuildRequest,
    monitor: Monitor,
    *,
    images: Path | str | None = None,
    batches: Sequence[int] | None = None,
    seconds: float = BENCH_SECONDS,
    command: str = "ztp_deploy.workflow.compare.compare_methods",
) -> MethodsReport:
    """Several methods on one model at one ratio or FLOP share, and their slice twins, in one interleaved run.

    Every engine passes the parity gate first. Raises GateFailed where one does not, and what `make_engine` raises.
    """
    clock = Clock(monitor)
    batches = steps.measured_batches(batches, build)
    check_seconds(seconds)
    steps.check_runnable(build)
    steps.check_wanted(wanted, build, images)
    model = steps.load(wanted[0].backbone, clock)
    plans: dict[str, Plan] = {DENSE: make_plan(model, "dense")}
    for request in wanted:
        plan = request.plan(model)
        if not plan.stages:
            raise BadRequest(f"{request.method} keeps every token there.", "Compare at a smaller ratio or FLOP share.")
        plans |= {request.method: plan, twin_role(request.method): twin_of(plan)}
    engines = {role: steps.engine_for(model, plan, build, clock, images) for role, plan in plans.items()}
    steps.prove(list(engines.values()), model, images, clock)
    del model
    latency = steps.bench(engines, batches, seconds, clock, command)
    first = wanted[0]
    asked = {"ratio": first.ratio} if first.ratio is not None else {"flops": first.flops}
    return methods_report(model_name, {name: value for name, value in asked.items() if value}, engines, latency)
