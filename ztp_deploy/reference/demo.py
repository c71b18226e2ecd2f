"""`make demo`: the reference classifier's engine, with accuracy, agreement, speed-up and pictures, offline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ztp_deploy import models
from ztp_deploy.defaults import DEMO_CANVASES, PICTURES_ROOT
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.accuracy import AccuracyReport
from ztp_deploy.reference import canvases
from ztp_deploy.show.draw import Shown, show_engine
from ztp_deploy.workflow import evaluate
from ztp_deploy.workflow.make import Result, make_engine
from ztp_deploy.workflow.progress import Clock, Monitor
from ztp_deploy.workflow.requests import BuildRequest, PlanRequest
from ztp_deploy.workflow.steps import check_runnable

MODEL, RATIO = "vit_digits", 0.7
SHOWN, SECONDS = 4, 8.0
DEFAULT = PlanRequest(model=MODEL, ratio=RATIO, weights="pretrained")


@dataclass(frozen=True)
class Demo:
    """What the demonstration made and found."""

    result: Result
    accuracy: AccuracyReport
    pictures: Shown


def demonstrate(
    build: BuildRequest,
    monitor: Monitor,
    *,
    wanted: PlanRequest = DEFAULT,
    directory: Path = PICTURES_ROOT,
    count: int = DEMO_CANVASES,
    seconds: float = SECONDS,
    command: str = "ztp_deploy.reference.demo.demonstrate",
) -> Demo:
    """Builds, proves and measures the engine, evaluates it on `count` test canvases, and draws what it keeps of four.

    Raises what `make_engine` and `evaluate_engine` raise.
    """
    clock = Clock(monitor)
    if wanted.weights in ("auto", "random"):
        raise BadRequest("The demonstration shows accuracy: it needs trained weights.", "Give pretrained, or a path.")
    check_runnable(build)
    model = models.load_model(wanted.model, wanted.weights)  # what cannot be had is refused before anything is drawn
    if not wanted.plan(model).stages:
        raise BadRequest(
            "The demonstration shows what pruning does; this plan prunes nothing.", "Give a smaller ratio."
        )
    folder = directory / f"canvases-{count}"  # one of its own: evaluation takes all that a folder holds
    with clock.step(f"draw {count} test canvases"):
        paths = list(canvases.write(folder, "test", count, by_class=True))
    result = make_engine(wanted, build, monitor, images=folder, seconds=seconds, command=command)
    data = evaluate.EvalRequest(data=folder, command=command)
    dense = result.yardsticks["dense"].directory
    accuracy = evaluate.evaluate_engine(result.engine.directory, data, monitor, dense_engine=dense)
    pictures = show_engine(paths[:SHOWN], directory, clock, result.engine.directory)
    return Demo(result, accuracy, pictures)
