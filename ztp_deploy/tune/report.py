"""What a search found: the record, its words for the terminal, the recipe, and the picture of all trials."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from ztp_deploy.console import out
from ztp_deploy.errors import GateFailed
from ztp_deploy.evidence.schema import EvidenceFile
from ztp_deploy.plan import Plan
from ztp_deploy.recipes import Recipe
from ztp_deploy.tune.cost import BlockTimes, Budget, Timing
from ztp_deploy.tune.damage import Damage, HeldOut
from ztp_deploy.tune.rounds import MOST, SHARE, StageRounds

TUNE_FILE, PLAN_FILE, RECIPE_FILE, PICTURE_FILE = "tune.json", "plan.json", "recipe.toml", "pareto.png"

Verdict = Literal["better than uniform", "no better than uniform", "pruning does not pay here", "misses the budget"]


class TrialRecord(BaseModel):
    """One trial; the numbers are None where whole tokens could not meet the budget. `cost` is in the budget's unit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    params: dict[str, Any]
    sites: list[int] | None = None
    counts: list[int] | None = None
    static: list[dict[str, int]] | None = None
    flop_share: float | None = None
    cost: float | None = None
    subset: Damage | None = None


class Chosen(BaseModel):
    """A plan that was looked at closely, on the search images that choose and the held-out ones that only report."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trial: int
    plan: Plan
    cost: float
    search: Damage
    held_out: Damage


class Attempt(BaseModel):
    """One plan built and measured against its prediction, in milliseconds per run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trial: int
    predicted: float
    measured: Timing
    dense: Timing
    meets: bool


class TuneReport(EvidenceFile):
    """A search (`tune.json`). `because` is the verdict in a sentence.

    `winner`, `uniform` and `held_out` are None where the verdict was clear before anything was tried, `winner` also
    where no plan met the budget when measured. `blocks` and `attempts` belong to latency budgets.
    """

    model_config = ConfigDict(frozen=True)

    schema_: Literal["ztp.tune/1"] = Field(default="ztp.tune/1", alias="schema")
    command: str
    started: str
    model: str
    method: str
    weights: str
    images: str
    subset_images: int
    search_images: int
    held_out_images: int
    budget: Budget
    seed: int
    fingerprint: dict[str, Any]
    trials: tuple[TrialRecord, ...]
    finalists: tuple[int, ...]
    winner: Chosen | None
    uniform: Chosen | None
    held_out: HeldOut | None
    rounds: tuple[StageRounds, ...]
    blocks: BlockTimes | None
    attempts: tuple[Attempt, ...]
    verdict: Verdict
    because: str
    environment: dict[str, Any]

    @property
    def infeasible(self) -> int:
        """Trials that whole tokens could not bring to the budget."""
        return sum(trial.subset is None for trial in self.trials)

    def require(self) -> TuneReport:
        """The report itself; raises GateFailed where every plan that was measured misses the budget."""
        if self.verdict == "misses the budget":
            raise GateFailed(self.because, "Ask for a slightly smaller latency, so that predictions have room.")
        return self


def recipe_of(plan: Plan) -> Recipe:
    """The recipe that makes this plan again: counts and sites spelled out, options as they were chosen."""
    keep = plan.asked.get("keep", plan.counts)
    sites = plan.asked.get("sites", [stage.block for stage in plan.stages])
    if len(keep) != len(sites):
        keep, sites = plan.counts, [stage.block for stage in plan.stages]
    return Recipe(
        model=plan.model, method=plan.method, keep=list(keep), sites=list(sites), options=plan.asked.get("options", {})
    )


def recipe_toml(recipe: Recipe, budget: Budget) -> str:
    """The recipe as TOML."""
    lines = [f"# Found by ztp tune within {budget}."]
    lines += [f"{name} = {json.dumps(getattr(recipe, name))}" for name in ("model", "method", "keep", "sites")]
    if recipe.options:
        lines += ["", "[options]", *(f"{name} = {json.dumps(value)}" for name, value in recipe.options.items())]
    return "\n".join(lines) + "\n"


def picture(report: TuneReport) -> bytes:
    """A PNG: damage on the subset over the cost, all trials, the uniform plan and the winner marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scale, unit = (
        (100.0, "multiply-accumulates, % of dense")
        if report.budget.kind == "flops"
        else (1.0, f"predicted milliseconds per run at batch {report.budget.batch}")
    )
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    tried = [trial for trial in report.trials if trial.subset is not None and trial.cost is not None]

    def place(trials: Sequence[TrialRecord]) -> tuple[list[float], list[float]]:
        return (
            [scale * trial.cost for trial in trials if trial.cost is not None],
            [trial.subset.mean_kl for trial in trials if trial.subset is not None],
        )

    axes.scatter(*place(tried), s=18, color="0.6", label="tried")
    marks = (("uniform", report.uniform, "s", "tab:orange"), ("winner", report.winner, "*", "tab:blue"))
    for name, chosen, marker, colour in marks:
        if chosen is not None:
            mine = [trial for trial in tried if trial.number == chosen.trial]
            axes.scatter(*place(mine), s=110, marker=marker, color=colour, label=name)
    axes.axvline(scale * report.budget.limit, color="0.3", linestyle=":", label="budget")
    if all(trial.subset and trial.subset.mean_kl > 0 for trial in tried):
        axes.set_yscale("log")
    axes.set_xlabel(unit)
    axes.set_ylabel(f"mean KL(dense, pruned), nats ({report.subset_images} images)")
    axes.set_title(f"{report.model}, {report.method}, {report.budget}", loc="left")
    axes.legend(frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()


def show_tune(report: TuneReport, directory: Path, given: Sequence[str] = ()) -> None:
    """What was found, for a reader who has read nothing else; `given`: the options that the model was loaded with."""
    tried = len(report.trials) - report.infeasible
    if report.trials:
        out.print(
            f"{report.model}, {report.method}, {report.budget}: {tried} plans tried on {report.subset_images} images, "
            f"the best {len(report.finalists)} on {report.search_images}; {report.infeasible} more shapes could not "
            "meet the budget in whole tokens.",
            soft_wrap=True,
        )
    if report.winner and report.uniform:
        table = Table("", "block: tokens kept", "costs", "KL, search", "KL, held-out", "same class, held-out")
        for name, chosen in (("uniform", report.uniform), ("winner", report.winner)):
            same = chosen.held_out.agreement
            table.add_row(
                name,
                ", ".join(f"{stage.block}: {stage.tokens_out}" for stage in chosen.plan.stages),
                report.budget.shown(chosen.cost),
                f"{chosen.search.mean_kl:.4g}",
                f"{chosen.held_out.mean_kl:.4g}",
                f"{same.share:.1%} ({same.low:.1%} to {same.high:.1%})",
            )
        out.print(table)
        out.print("KL is how far pruning moves the class probabilities, in nats per image; 0 is no change.")
    for attempt in report.attempts:
        out.print(
            f"Measured, trial {attempt.trial}: {attempt.measured.median:.3f} ms per run ({attempt.measured.low:.3f} to "
            f"{attempt.measured.high:.3f}), predicted {attempt.predicted:.3f}; dense {attempt.dense.median:.3f}. "
            f"{'Within' if attempt.meets else 'Misses'} the budget."
            + (f" Inconclusive: {attempt.measured.inconclusive}." if attempt.measured.inconclusive else ""),
            soft_wrap=True,
        )
    for stage in report.rounds:
        out.print(
            f"Voting at block {stage.block}: {stage.rounds} {'round' if stage.rounds == 1 else 'rounds'} planned; from {stage.enough} on, {SHARE:.0%} of "
            f"the kept tokens are those of {MOST} rounds.",
            soft_wrap=True,
        )
    out.print(f"Verdict: {report.verdict}. {report.because}", style="bold", soft_wrap=True)
    if report.winner:
        out.print(f"Plan, recipe, record and picture: {directory}", soft_wrap=True)
        words = ["ztp", "engine", "--model", report.model, *given, "--recipe", str(directory / RECIPE_FILE)]
        out.print(f"Next: {shlex.join(words)}", soft_wrap=True)
