"""The search itself: Optuna proposes shapes, a study on disk remembers them, halving chooses among the best."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from ztp_deploy.errors import BadRequest, write_failed
from ztp_deploy.plan import Plan
from ztp_deploy.tune.damage import Damage
from ztp_deploy.tune.space import Cost, Space

STUDY_FILE = "study.log"
FINALISTS = 5
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Trial:
    """One plan that was tried: its cost in the budget's unit and its damage on the subset. Number 0 is the uniform plan.

    `plan` is None for a shape that whole tokens cannot bring within 0.5 % of the budget.
    """

    number: int
    params: dict[str, Any]
    plan: Plan | None
    cost: float | None
    damage: Damage | None


def open_study(directory: Path, fingerprint: Mapping[str, Any]) -> optuna.Study:
    """The study in a folder, begun where there is none.

    Raises BadRequest, naming what differs, where it was begun for something else; WriteFailed.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = directory / STUDY_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(path)))
        study = optuna.create_study(storage=storage, study_name="tune", load_if_exists=True)
        wanted = json.loads(json.dumps(fingerprint))
        found = study.user_attrs.get("fingerprint")
        if found is None:
            study.set_user_attr("fingerprint", wanted)
    except OSError as error:
        raise write_failed(str(path), error) from error
    except (KeyError, ValueError) as error:
        raise BadRequest(
            f"{path} is not a study of ztp tune that can be read.", "Move it away, or give another --directory."
        ) from error
    if found is not None and found != wanted:
        different = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        first = different[0]
        raise BadRequest(
            f"{directory} holds a search with other {', '.join(different)}: {first} was {found.get(first)}, "
            f"now it is {wanted.get(first)}.",
            "Give another --directory, or remove this one.",
        )
    return study


def run_trials(
    study: optuna.Study,
    space: Space,
    uniform: Plan,
    cost: Cost,
    limit: float,
    damage: Callable[[Plan], Damage],
    *,
    trials: int,
    seed: int,
    advance: Callable[[float], None] = lambda amount: None,
) -> list[Trial]:
    """Tries plans until `trials` of them are in the study, the uniform one first, and returns these.

    Each proposal depends on the seed and on the trials before it alone, so that an interrupted search goes on as
    if it had not been. A trial that was under way when it ended is begun anew.
    """
    done = finished(study)
    advance(min(len(done), trials))
    distributions = space.distributions()
    while len(done) < trials:
        number = len(done)
        if not number:
            measured = damage(uniform)
            params = space.uniform_params()
            study.add_trial(
                create_trial(
                    params=params,
                    distributions=distributions,
                    value=measured.mean_kl,
                    user_attrs=_attributes(uniform, cost(uniform.stages), measured),
                )
            )
        else:
            _try_next(study, space, _known(done), cost, limit, damage, distributions, _sampler(seed, number))
        done = finished(study)
        advance(1)
    return done[:trials]


def _sampler(seed: int, number: int) -> TPESampler:
    # A sampler's own generator is not in the storage: one of each trial's own makes proposals independent of restarts.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(seed=(seed * 1_000_003 + number) % 2**32, multivariate=True, constant_liar=False)


def _try_next(
    study: optuna.Study,
    space: Space,
    known: Mapping[str, Damage],
    cost: Cost,
    limit: float,
    damage: Callable[[Plan], Damage],
    distributions: Any,
    sampler: TPESampler,
) -> None:
    study.sampler = sampler
    trial = study.ask(distributions)
    try:
        plan = space.plan(trial.params, cost, limit)
        if plan is None:
            study.tell(trial, state=TrialState.PRUNED)
            return
        found = known.get(_key(plan)) or damage(plan)
        for name, value in _attributes(plan, cost(plan.stages), found).items():
            trial.set_user_attr(name, value)
        study.tell(trial, found.mean_kl)
    except BaseException:
        study.tell(trial, state=TrialState.FAIL)
        raise


def finished(study: optuna.Study) -> list[Trial]:
    """The study's finished trials in their order, numbered from 0."""
    trials = sorted(study.get_trials(deepcopy=False, states=_FINISHED), key=lambda trial: trial.number)
    return [_read(number, trial) for number, trial in enumerate(trials)]


def finalists(trials: list[Trial], count: int = FINALISTS) -> list[Trial]:
    """The uniform plan and the `count` best others on the subset, without repeats, best first."""
    ranked = sorted(
        (trial for trial in trials if trial.damage), key=lambda t: (t.damage and t.damage.mean_kl, t.number)
    )
    chosen: dict[str, Trial] = {}
    for trial in ranked:
        assert trial.plan is not None
        if len(chosen) < count and trial.number:
            chosen.setdefault(_key(trial.plan), trial)
    uniform = trials[0]
    assert uniform.plan is not None
    chosen.pop(_key(uniform.plan), None)
    return [uniform, *chosen.values()]


def _attributes(plan: Plan, cost: float, damage: Damage) -> dict[str, Any]:
    return {"plan": plan.to_json(), "cost": cost, "damage": damage.model_dump(mode="json")}


def _read(number: int, trial: FrozenTrial) -> Trial:
    attributes = trial.user_attrs
    if "plan" not in attributes:
        return Trial(number, dict(trial.params), None, None, None)
    return Trial(
        number,
        dict(trial.params),
        Plan.from_json(attributes["plan"]),
        attributes["cost"],
        Damage.model_validate(attributes["damage"]),
    )


def _known(trials: list[Trial]) -> dict[str, Damage]:
    return {_key(trial.plan): trial.damage for trial in trials if trial.plan and trial.damage}


def _key(plan: Plan) -> str:
    """Equal for plans that compute the same."""
    return json.dumps([stage.model_dump(mode="json") for stage in plan.stages])
