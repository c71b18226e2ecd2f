"""What the GPU report is to measure: models × runtimes × precisions × batches × plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ztp_deploy.defaults import (
    ENGINES_ROOT,
    EXPORT_ROOT,
    GPU_BATCHES,
    GPU_MODELS,
    GPU_PRECISIONS,
    GPU_SECONDS,
)
from ztp_deploy.errors import BadRequest
from ztp_deploy.gpu_report.runtimes import RUNTIMES, precisions_of
from ztp_deploy.methods.slice import twin_of
from ztp_deploy.models import check_request, load_model
from ztp_deploy.plan import Plan
from ztp_deploy.planning import make_plan

Group = tuple[str, str, str]
"""Model, runtime and precision: opened once, measured at every batch."""
_ONE_STAGE = ", one stage"


def plans_of(model: nn.Module) -> dict[str, Plan]:
    """The plans that are compared, dense first: ratio 0.7 and the paper's FLOP share, their slice twins, ToMe.

    The paper's share also in one stage, where the others have their first: on a GPU every stage costs its launches.
    """
    pruned = [make_plan(model, ratio=0.7), make_plan(model, flops=0.653)]
    one = make_plan(model, flops=0.653, sites=[pruned[1].stages[0].block])
    plans = [make_plan(model, "dense"), *pruned, *map(twin_of, pruned), make_plan(model, "tome", ratio=0.7)]
    named = {plan.label: plan for plan in plans}
    return named | {pruned[1].label + _ONE_STAGE: one, twin_of(pruned[1]).label + _ONE_STAGE: twin_of(one)}


@dataclass(frozen=True)
class Grid:
    """What is measured: every runtime × precision that it has × batch × plan × model; `device` is cuda or cpu.

    `seconds` is the time measured a cell. Engines are built for batches from 1 to the largest, as many side by side
    as there are `workers`: a worker is a process that loads the model itself.
    """

    models: Sequence[str] = GPU_MODELS
    runtimes: Sequence[str] = RUNTIMES
    precisions: Sequence[str] = GPU_PRECISIONS
    batches: Sequence[int] = GPU_BATCHES
    device: str = "cuda"
    weights: str = "auto"
    seconds: float = GPU_SECONDS
    workers: int = 1
    export_root: Path = EXPORT_ROOT
    engines_root: Path = ENGINES_ROOT
    load: Callable[[str, str], nn.Module] = load_model
    plans: Callable[[nn.Module], dict[str, Plan]] = plans_of

    def check(self) -> None:
        """Raises BadRequest for what no report has, and for a model or a checkpoint that is not there."""
        unknown = [runtime for runtime in self.runtimes if runtime not in RUNTIMES]
        unknown += [precision for precision in self.precisions if precision not in GPU_PRECISIONS]
        if self.workers < 1:
            raise BadRequest(
                f"{self.workers} workers were asked for.", "One builds plan after plan; more, side by side."
            )
        if unknown or self.device not in ("cuda", "cpu") or min(self.batches, default=0) < 1:
            wrong = unknown[0] if unknown else f"device {self.device} with batches {list(self.batches)}"
            raise BadRequest(
                f"The GPU report does not know {wrong}.",
                f"Runtimes: {', '.join(RUNTIMES)}; precisions: {', '.join(GPU_PRECISIONS)}; batches from 1 on.",
            )
        for precision in self.precisions:
            if not any(precision in precisions_of(runtime) for runtime in self.runtimes):
                having = [runtime for runtime in RUNTIMES if precision in precisions_of(runtime)]
                raise BadRequest(
                    f"{precision} was asked for, and none of {', '.join(self.runtimes)} has it.",
                    f"Runtimes that have it: {', '.join(having)}.",
                )
        for name in self.models:
            check_request(name, self.weights)

    def groups(self) -> list[Group]:
        """What there is to open, in order."""
        return [
            (model, runtime, precision)
            for model in self.models
            for runtime in self.runtimes
            for precision in self.precisions
            if precision in precisions_of(runtime)
        ]


def twins_among(plans: dict[str, Plan]) -> dict[str, str]:
    """The label of each plan's slice twin, where that is among the plans."""
    return {
        label: other
        for label, plan in plans.items()
        if plan.method not in ("dense", "slice")
        for other, candidate in plans.items()
        if candidate == twin_of(plan)
    }
