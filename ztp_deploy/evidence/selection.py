"""Selection parity: per stage, do two runs keep the same tokens, and where they do not, why?

No other check sees this: logits can agree while an engine drops the wrong patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ztp_deploy import methods
from ztp_deploy.methods.base import Decision, Replay
from ztp_deploy.plan import Geometry, Plan, Stage

Cause = Literal["near_tie", "selection", "weights"]


@dataclass(frozen=True)
class Observation:
    """One run over M images: logits [M, classes], per stage kept positions [M, k] in slot order, audit scores."""

    logits: NDArray[Any]
    kept: list[NDArray[Any]]
    scores: Mapping[str, NDArray[Any]]

    def at(self, image: int) -> Observation:
        """One image of it."""
        one = slice(image, image + 1)
        return Observation(
            self.logits[one], [k[one] for k in self.kept], {name: v[one] for name, v in self.scores.items()}
        )


@dataclass(frozen=True)
class Difference:
    """A stage at which one image's candidate did not keep what the reference's scores call for.

    `cause`: "selection" (the candidate's own scores call for other tokens than it kept), "weights" (it kept
    what its scores call for, but the scores differ), "near_tie" (they differ by no more than the bound).
    `decision` names the choice that flipped, `gap` its relative distance from the cut, `tokens` the
    original positions kept by one side only.
    """

    stage: int
    cause: Cause
    decision: str
    gap: float
    tokens: list[int]


def same_sets(reference: NDArray[Any], candidate: NDArray[Any]) -> NDArray[np.bool_]:
    """Per image [M], whether kept positions [M, k] agree as sets."""
    agreeing: NDArray[np.bool_] = (np.sort(reference, 1) == np.sort(candidate, 1)).all(1)
    return agreeing


def differences(
    reference: Observation,
    kept: Sequence[NDArray[Any]],
    audited: Observation,
    plan: Plan,
    geometry: Geometry,
    bound: float,
) -> list[Difference]:
    """Explains every stage at which a candidate departs from the reference, for one image.

    `kept` [1, k] per stage is what the candidate kept when it ran; the reference was run with these tokens in
    place of its own, so that both decide on the same ones at every stage. `audited` is the candidate's
    own run with scores, which may part from its other run at near-ties. `bound` is the largest relative gap
    that counts as a near-tie.
    """
    found: list[Difference] = []
    for index, stage in enumerate(plan.stages):
        expected, expected_entering = _replay(reference, plan, index, geometry), _entering(reference, index, stage)
        tokens = _apart(expected, expected_entering, kept[index])
        if not tokens:
            continue
        entering = _entering(audited, index, stage)
        decision, gap = "unexplained", float("inf")
        if set(entering.tolist()) == set(expected_entering.tolist()):
            replay = _replay(audited, plan, index, geometry)
            wrong = _apart(replay, entering, kept[index])
            name, wrong_gap = _nearest_flip(replay, entering, wrong)
            if wrong and wrong_gap > bound:
                found.append(Difference(index + 1, "selection", name, wrong_gap, sorted(wrong)))
                continue
            decision, gap = _flipped(expected, expected_entering, replay, entering)
        if decision == "unexplained":
            decision, gap = _nearest_flip(expected, expected_entering, tokens)
        found.append(Difference(index + 1, "near_tie" if gap <= bound else "weights", decision, gap, sorted(tokens)))
    return found


def _replay(observation: Observation, plan: Plan, index: int, geometry: Geometry) -> Replay:
    method = methods.get(plan.method)
    stage = plan.stages[index]
    scores = {
        name: torch.from_numpy(np.array(observation.scores[f"{name}_{index + 1}"])).double()
        for name in method.score_names(stage)
    }
    return method.replay(stage, scores, geometry, methods.parse_options(plan.method, plan.options))


def _entering(observation: Observation, index: int, stage: Stage) -> NDArray[Any]:
    """Original positions [n] of the slots that enter a stage."""
    return np.arange(stage.tokens_in) if index == 0 else np.asarray(observation.kept[index - 1][0])


def _apart(replay: Replay, entering: NDArray[Any], kept: NDArray[Any]) -> set[int]:
    """Positions that only one side keeps: what the replayed scores call for, or `kept` [1, k]."""
    return set(entering[replay.kept[0].numpy()].tolist()) ^ set(kept[0].tolist())


def _flipped(
    reference: Replay, reference_entering: NDArray[Any], candidate: Replay, candidate_entering: NDArray[Any]
) -> tuple[str, float]:
    """The first decision that came out differently, and how far from the cut the reference saw what flipped.

    The reference's margins alone count: a candidate whose scores are all but equal has none.
    """
    for one, other in zip(reference.decisions, candidate.decisions, strict=True):
        ours, theirs = _by_position(one, reference_entering), _by_position(other, candidate_entering)
        flipped = (ours > 0) != (theirs > 0)
        if flipped.any():
            return one.name, float(np.abs(ours)[flipped].max())
    return "unexplained", float("inf")


def _by_position(decision: Decision, entering: NDArray[Any]) -> NDArray[Any]:
    margin: NDArray[Any] = decision.margin[0].numpy()
    return margin[np.argsort(entering)] if decision.per_token else margin


def _nearest_flip(replay: Replay, entering: NDArray[Any], positions: set[int]) -> tuple[str, float]:
    """How far these positions' fate was from another, by one run's decisions alone.

    A token flips with the decision it was nearest to flipping in, or with any that concerns all tokens;
    the largest such distance counts.
    """
    name, nearest = "unexplained", np.full(len(positions), np.inf)
    at = np.isin(entering, list(positions))
    for decision in replay.decisions:
        margin = decision.margin[0].abs().numpy()
        distance = margin[at] if decision.per_token else np.full(at.sum(), margin.min(initial=np.inf))
        if len(distance) != len(nearest):  # a position that is not there at all
            return "unexplained", float("inf")
        if (distance < nearest).any():
            name, nearest = decision.name, np.minimum(nearest, distance)
    return name, float(nearest.max(initial=0.0))
