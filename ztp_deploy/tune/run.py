"""`ztp tune` from start to end: load, split the images, search, choose, measure, say what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ztp_deploy import backends, environment, exporters, models
from ztp_deploy.atomic import write_bytes, write_text
from ztp_deploy.backends import torch_device
from ztp_deploy.backends.base import Device
from ztp_deploy.defaults import METHOD, TUNE_IMAGES, TUNE_SECONDS, TUNE_TRIALS
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.images import ImageSet, image_files, load_images
from ztp_deploy.evidence.latency import check_seconds
from ztp_deploy.manifest import sources_sha256
from ztp_deploy.plan import Plan
from ztp_deploy.planning import make_plan
from ztp_deploy.recipes import read_recipe
from ztp_deploy.source import ModelSize
from ztp_deploy.tune import rounds, space
from ztp_deploy.tune.cost import BlockTimes, Budget, Timer, engine_timer, flop_share, measure_blocks
from ztp_deploy.tune.damage import Damage, HeldOut, Judge, Split, held_out, split
from ztp_deploy.tune.report import (
    PICTURE_FILE,
    PLAN_FILE,
    RECIPE_FILE,
    TUNE_FILE,
    Attempt,
    Chosen,
    TrialRecord,
    TuneReport,
    Verdict,
    picture,
    recipe_of,
    recipe_toml,
)
from ztp_deploy.tune.search import Trial, finalists, open_study, run_trials
from ztp_deploy.tune.space import Cost, Space
from ztp_deploy.workflow.evaluate import refuse_meaningless
from ztp_deploy.workflow.progress import Clock, Monitor
from ztp_deploy.workflow.requests import BuildRequest, ModelRequest
from ztp_deploy.workflow.steps import check_runnable, load_trained

ATTEMPTS = 3
"""Plans that are built and measured, at most, until one meets a latency budget."""


@dataclass(frozen=True)
class TuneRequest:
    """What was asked of a search.

    `size`, `labels` and `preprocessing` hold what differs from the named model's; `images` is a folder without labels, of which `count` are
    used; `build` says what engines a latency budget is
    measured in, each for `seconds`; `device` is where eager PyTorch runs.
    """

    model: str
    images: Path | str
    budget: str
    method: str = METHOD
    weights: str = "auto"
    size: ModelSize | None = None
    labels: tuple[str, ...] | None = None
    preprocessing: Mapping[str, Any] | None = None
    build: BuildRequest = field(default_factory=BuildRequest)
    trials: int = TUNE_TRIALS
    count: int = TUNE_IMAGES
    seed: int = 0
    seconds: float = TUNE_SECONDS
    device: str = "auto"
    directory: Path | None = None
    command: str = "ztp_deploy.tune.run.tune"

    def check(self) -> Budget:
        """The budget. Raises BadRequest for what can be refused before anything is loaded."""
        budget = Budget.parse(self.budget)
        space.search_of(self.method)
        if self.trials < 1 or self.seed < 0:
            raise BadRequest(
                f"--trials {self.trials} and --seed {self.seed} were asked for.", "Give at least 1 and at least 0."
            )
        if self.weights == "random":
            raise BadRequest(
                f"The weights of {self.model} are random: what pruning changes in its predictions means nothing.",
                "Give trained ones: --weights path.",
            )
        split(self.count)
        check_seconds(self.seconds)
        self.backbone.check()
        make_plan(self.model, self.method, ratio=0.5, overrides=self.size)
        image_files(Path(self.images))
        if budget.kind == "latency":
            check_runnable(self.build)
        return budget

    @property
    def backbone(self) -> ModelRequest:
        """The model that is searched for."""
        return ModelRequest(self.model, self.weights, self.size, self.labels, self.preprocessing)

    @property
    def folder(self) -> Path:
        """Where the search and its outcome lie."""
        return self.directory or Path("tuned", f"{self.model}--{self.method}--{self.budget}".replace("=", ""))


@dataclass(frozen=True)
class _Verdict:
    verdict: Verdict
    because: str


@dataclass(frozen=True)
class _Ranked:
    """A finalist and its damage on all search images."""

    number: int
    plan: Plan
    cost: float
    search: Damage


@dataclass(frozen=True)
class _Job:
    """A request with all that is loaded for it. `rows` say which of the images choose."""

    request: TuneRequest
    budget: Budget
    clock: Clock
    device: str
    model: nn.Module
    images: ImageSet
    rows: Split
    fingerprint: dict[str, Any]
    study: optuna.Study
    started: str


@dataclass(frozen=True)
class _Prices:
    """What plans cost; under a latency budget by `blocks`, which the `timer` measured as it will the winner."""

    cost: Cost
    blocks: BlockTimes | None = None
    timer: Timer | None = None


def tune(request: TuneRequest, monitor: Monitor, *, timer: Timer | None = None) -> TuneReport:
    """Searches for the least damaging plan within the budget and writes plan, recipe, record and picture.

    All trials see a subset of the search images; the best few and the uniform plan see all of these, and the best
    there wins. The held-out images choose nothing. Under a latency budget the winner is built and measured; where
    it misses, the next best is, at most `ATTEMPTS` in all. Interrupted, the same request goes on. `timer` measures
    plans in place of real engines. Raises BadRequest, MissingSoftware and GateFailed.
    """
    job = _prepare(request, monitor)
    prices = _prices(job, timer)
    if prices.blocks and (early := _hopeless(job, prices.blocks, prices.cost)):
        return _report(job, early, blocks=prices.blocks)
    judge, choices, some = _open_search(job)
    trials = _try_plans(job, prices, judge, choices)
    best = finalists(trials)
    with job.clock.step(f"judge the best on {len(job.rows.search)} images", float(len(best))) as advance:
        ranked = _rank(judge, best, job.rows, advance)
    attempts, first = _verify(job, ranked, prices.timer)
    verdict, judged = _judge(job, judge, ranked, first, attempts)
    return _report(
        job,
        verdict,
        trials=tuple(map(_record, trials)),
        finalists=tuple(trial.number for trial in best),
        rounds=() if first is None else rounds.of_plan(judge.model, first.plan, some),
        blocks=prices.blocks,
        attempts=attempts,
        **judged,
    )


def _prepare(request: TuneRequest, monitor: Monitor) -> _Job:
    """Loads what the request names and opens its study."""
    budget = request.check()
    device = torch_device.resolve(request.device, "Eager PyTorch")
    torch_device.prepare(device.provider)
    clock = Clock(monitor)
    model = load_trained(request.backbone, clock)
    source = models.source_of(model)
    refuse_meaningless(source, make_plan(model, request.method, ratio=0.5))
    with clock.step(f"prepare the images of {Path(request.images).name}"):
        images = load_images(request.images, source.preprocessing, "float32", request.count)
    rows = split(len(images.names))
    fingerprint = _fingerprint(request, budget, source.weights.sha256, images.sha256, device)
    return _Job(
        request=request,
        budget=budget,
        clock=clock,
        device=device.provider,
        model=model,
        images=images,
        rows=rows,
        fingerprint=fingerprint,
        study=open_study(request.folder, fingerprint),
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _prices(job: _Job, timer: Timer | None) -> _Prices:
    geometry = models.describe(job.model)[1]
    if job.budget.kind == "flops":
        return _Prices(flop_share(geometry))
    timer = timer or _timer(job)
    blocks = _blocks(job.study, job.model, job.request.method, timer)
    return _Prices(lambda stages: blocks.predict(geometry, stages), blocks, timer)


def _open_search(job: _Job) -> tuple[Judge, Space, Tensor]:
    """Who judges plans, what may be chosen, and the few images [B, 3, H, W] that voting rounds are measured on."""
    with job.clock.step("run the dense model"):
        judge = Judge(job.model, job.images, job.device)
    some = torch.from_numpy(job.images.pixels[list(job.rows.subset[: rounds.IMAGES])]).to(job.device)
    enough = rounds.by_block(judge.model, some) if rounds.has_rounds(job.request.method) else {}
    return judge, Space(job.model, job.request.method, enough), some


def _try_plans(job: _Job, prices: _Prices, judge: Judge, choices: Space) -> list[Trial]:
    """As many trials as were asked for, the uniform plan's first."""
    budget, subset, trials = job.budget, job.rows.subset, job.request.trials
    uniform = choices.uniform(prices.cost, budget.limit, budget.limit if budget.kind == "flops" else None)
    with job.clock.step(f"try plans on {len(subset)} images", float(trials)) as advance:
        return run_trials(
            job.study,
            choices,
            uniform,
            prices.cost,
            budget.limit,
            lambda plan: judge.damage(plan, subset),
            trials=trials,
            seed=job.request.seed,
            advance=advance,
        )


def _judge(
    job: _Job, judge: Judge, ranked: Sequence[_Ranked], first: _Ranked | None, attempts: Sequence[Attempt]
) -> tuple[_Verdict, dict[str, Any]]:
    """The verdict, and what the held-out images say of the uniform plan and of the winner, where there is one."""
    uniform, base = _held_out(judge, next(one for one in ranked if one.number == 0), job.rows)
    winner = compared = None
    if first is not None:
        winner, kl = _held_out(judge, first, job.rows)
        compared = held_out(base, kl, job.request.seed)
    verdict = _conclude(job.budget, winner, compared, attempts)
    return verdict, {"winner": winner, "uniform": uniform, "held_out": compared}


def _report(job: _Job, verdict: _Verdict, **found: Any) -> TuneReport:
    """The record of what was found, written; what is not given was not looked for."""
    request, weights = job.request, models.source_of(job.model).weights
    nothing = {"trials": (), "finalists": (), "winner": None, "uniform": None, "held_out": None, "rounds": ()}
    report = TuneReport(
        command=request.command,
        started=job.started,
        model=request.model,
        method=request.method,
        weights=weights.shown,
        images=job.images.origin,
        subset_images=len(job.rows.subset),
        search_images=len(job.rows.search),
        held_out_images=len(job.rows.held_out),
        budget=job.budget,
        seed=request.seed,
        fingerprint=job.fingerprint,
        verdict=verdict.verdict,
        because=verdict.because,
        environment=environment.snapshot(),
        **({**nothing, "blocks": None, "attempts": ()} | found),
    )
    _write(report, request.folder, job.model)
    return report


def _fingerprint(request: TuneRequest, budget: Budget, weights: str, images: str, device: Device) -> dict[str, Any]:
    """All that decides what a trial gives; the number of trials is not among it, so that a search can be prolonged."""
    found: dict[str, Any] = {
        "model": request.model,
        "weights": weights,
        # Before the images, whose hash it changes: what is told to differ is what was typed.
        **({"preprocessing": dict(request.preprocessing)} if request.preprocessing else {}),
        "images": images,
        "budget": str(budget),
        "method": request.method,
        "seed": request.seed,
        "space": space.VERSION,
        "eager": f"torch {torch.__version__} on {device.slug}",
    }
    rooms: tuple[str, ...] = exporters.SOURCES
    if budget.kind == "latency":
        target = request.build.target()
        found["engine"] = (
            f"{target.name} {target.backend.version()} on {target.device.slug}, {target.precision}, "
            f"{request.build.input} images"
        )
        if target.device.name == "cpu":
            found["processor"] = environment.cpu_name()
        found |= {"settings": target.settings, "instructions": target.backend.instructions(target.settings)}
        rooms = backends.SOURCES
    return found | {"code": sources_sha256(*rooms)[:12]}


def _timer(job: _Job) -> Timer:
    """Builds and measures engines of the budget's batch, in the search's own folder."""
    request, batch = job.request, job.budget.batch
    assert batch is not None
    placed = {"export_root": request.folder / "export", "engines_root": request.folder / "engines"}
    build = request.build.model_copy(update={"batch": str(batch), **placed})
    return engine_timer(job.model, build, batch, request.seconds, job.clock, request.command, request.images)


def _blocks(study: optuna.Study, model: nn.Module, method: str, timer: Timer) -> BlockTimes:
    """Measured once a study: a second measurement would move every prediction under trials already made."""
    stored = study.user_attrs.get("blocks")
    if stored is not None:
        return BlockTimes.model_validate(stored)
    measured = measure_blocks(model, method, timer)
    study.set_user_attr("blocks", measured.model_dump(mode="json"))
    return measured


def _hopeless(job: _Job, blocks: BlockTimes, cost: Cost) -> _Verdict | None:
    """Where there is nothing to search: dense is within the budget, or nothing is faster than dense."""
    if blocks.dense.median <= job.budget.limit:
        return _Verdict(
            "pruning does not pay here",
            f"The dense model already meets {job.budget}: it takes {blocks.dense.median:.3f} ms per run.",
        )
    choices = Space(job.model, job.request.method, {})
    first = choices.uniform_params()["site_1"]
    least = make_plan(job.model, job.request.method, keep=[1], sites=[first])
    if cost(least.stages) >= blocks.dense.median:
        return _Verdict(
            "pruning does not pay here",
            f"Even one token of {choices.geometry.patch_tokens} after block {first} is predicted to take "
            f"{cost(least.stages):.3f} ms per run; the dense model takes {blocks.dense.median:.3f}.",
        )
    return None


def _rank(judge: Judge, best: Sequence[Trial], rows: Split, advance: Callable[[float], None]) -> list[_Ranked]:
    """The finalists by damage on all search images, ties to the earlier trial."""
    found = []
    for trial in best:
        assert trial.plan is not None
        assert trial.cost is not None
        found.append(_Ranked(trial.number, trial.plan, trial.cost, judge.damage(trial.plan, rows.search)))
        advance(1)
    return sorted(found, key=lambda one: (one.search.mean_kl, one.number))


def _held_out(judge: Judge, one: _Ranked, rows: Split) -> tuple[Chosen, NDArray[np.float64]]:
    """A finalist with its damage on the held-out images, and the KL of each of them."""
    logits = judge.logits(one.plan, rows.held_out)
    damage = judge.compare(logits, rows.held_out)
    chosen = Chosen(trial=one.number, plan=one.plan, cost=one.cost, search=one.search, held_out=damage)
    return chosen, judge.kl(logits, rows.held_out)


def _verify(job: _Job, ranked: Sequence[_Ranked], timer: Timer | None) -> tuple[tuple[Attempt, ...], _Ranked | None]:
    """Builds and measures the best plans in turn against dense until one's median meets the budget.

    Without a timer the best one wins as it is.
    """
    if timer is None:
        return (), ranked[0]
    attempts: list[Attempt] = []
    dense = make_plan(job.model, "dense")
    for chosen in ranked[:ATTEMPTS]:
        times = timer({"dense": dense, "winner": chosen.plan}, "winner")
        meets = times["winner"].median <= job.budget.limit
        attempts.append(
            Attempt(
                trial=chosen.number,
                predicted=chosen.cost,
                measured=times["winner"],
                dense=times["dense"],
                meets=meets,
            )
        )
        if meets:
            return tuple(attempts), chosen
    return tuple(attempts), None


def _conclude(budget: Budget, winner: Chosen | None, compared: HeldOut | None, attempts: Sequence[Attempt]) -> _Verdict:
    if winner is None or compared is None:
        measured = ", ".join(f"{attempt.measured.median:.3f}" for attempt in attempts)
        return _Verdict(
            "misses the budget", f"The best {len(attempts)} plans take {measured} ms per run when measured: {budget}."
        )
    if attempts and attempts[-1].measured.over_dense_low <= 1:
        last = attempts[-1].measured
        return _Verdict(
            "pruning does not pay here",
            f"The winner is not measurably faster than the dense model: × {last.over_dense:.2f} "
            f"({last.over_dense_low:.2f} to {last.over_dense_high:.2f}).",
        )
    numbers = f"{compared.difference:.4g} nats per image ({compared.low:.4g} to {compared.high:.4g}, 95 % interval)"
    if winner.trial == 0:
        return _Verdict("no better than uniform", "No plan that was tried beats the uniform one on the search images.")
    if compared.low > 0:
        return _Verdict(
            "better than uniform",
            f"On {compared.images} held-out images the winner's KL is lower than the uniform plan's by {numbers}.",
        )
    return _Verdict(
        "no better than uniform",
        f"On {compared.images} held-out images the uniform plan's KL less the winner's is {numbers}: "
        "these images cannot tell them apart, or the uniform plan is the better one.",
    )


def _record(trial: Trial) -> TrialRecord:
    if trial.plan is None:
        return TrialRecord(number=trial.number, params=trial.params)
    return TrialRecord(
        number=trial.number,
        params=trial.params,
        sites=[stage.block for stage in trial.plan.stages],
        counts=trial.plan.counts,
        static=[stage.static for stage in trial.plan.stages],
        flop_share=trial.plan.flops.share,
        cost=trial.cost,
        subset=trial.damage,
    )


def _write(report: TuneReport, folder: Path, model: nn.Module) -> None:
    """The record, and, where there is a winner, its plan, a recipe that was read back, and the picture."""
    if report.winner is not None:
        plan = report.winner.plan
        path = folder / RECIPE_FILE
        write_text(folder / PLAN_FILE, plan.to_json())
        write_text(path, recipe_toml(recipe_of(plan), report.budget))
        read = read_recipe(str(path))
        again = make_plan(model, read.method, keep=read.keep, sites=read.sites, options=read.options)
        assert again.stages == plan.stages, f"{path} does not make the plan it was written for"
        write_bytes(folder / PICTURE_FILE, picture(report))
    write_text(folder / TUNE_FILE, report.to_json())
