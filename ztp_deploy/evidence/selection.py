"""Selection parity: per stage, do two runs keep the same tokens, and where they do not, why?

No other check sees this: logits can agree while an engine drops the wrong patches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ztp_deploy import methods
from ztp_deploy.methods.base import Decision, Replay
from ztp_deploy.plan import Geometry, Plan

Cause = Literal["near_tie", "selection", "weights"]
_KINDS = ("kept", "merged")


@dataclass(frozen=True)
class Observation:
    """One run over M images: logits [M, classes], per stage kept positions [M, k] in slot order, audit scores.

    `merged` [M, n] per stage, of methods that merge, else empty: the slot that each entering slot went into.
    """

    logits: NDArray[Any]
    kept: list[NDArray[Any]]
    merged: list[NDArray[Any]]
    scores: Mapping[str, NDArray[Any]]

    @classmethod
    def of(cls, values: Mapping[str, NDArray[Any]]) -> Observation:
        """A run by the names of its outputs (`InferenceGraph`), in stage order; the scores may be among them."""
        kept, merged = ([values[name] for name in values if re.fullmatch(rf"{kind}_\d+", name)] for kind in _KINDS)
        return cls(values["logits"], kept, merged, values)

    def at(self, image: int) -> Observation:
        """One image of it."""
        one = slice(image, image + 1)
        return Observation(
            self.logits[one],
            [k[one] for k in self.kept],
            [m[one] for m in self.merged],
            {name: v[one] for name, v in self.scores.items()},
        )

    def destinations(self, index: int, patch_tokens: int) -> NDArray[Any]:
        """Per position [M, patches + stages] the position its token goes by after a stage, -1 where it is out.

        Positions that do not enter the stage count as out. A token that is only kept goes by its own.
        """
        kept = self._known(self.kept[index], patch_tokens)
        destinations = np.full((len(kept), patch_tokens + len(self.kept) + 1), -1, dtype=np.int64)
        if self.merged:
            entering = self.entering(index, patch_tokens)
            slots = self.merged[index].clip(-1, kept.shape[1] - 1)
            now = np.where(slots < 0, -1, np.take_along_axis(kept, slots.clip(0), axis=1))
            np.put_along_axis(destinations, entering.astype(np.int64), now, axis=1)
        else:
            np.put_along_axis(destinations, kept.astype(np.int64), kept, axis=1)
        return destinations[:, :-1]  # masked slots, at -1, fell into the last column

    def entering(self, index: int, patch_tokens: int) -> NDArray[Any]:
        """Positions [M, n] of the slots that enter a stage."""
        if index:
            return self._known(self.kept[index - 1], patch_tokens)
        return np.tile(np.arange(patch_tokens), (len(self.kept[0]), 1))

    def _known(self, kept: NDArray[Any], patch_tokens: int) -> NDArray[Any]:
        """Positions with -1 for what a broken engine made up: it keeps no token by that."""
        return np.where((kept >= 0) & (kept < patch_tokens + len(self.kept)), kept, -1)

    def forced(self, patch_tokens: int) -> list[NDArray[Any]]:
        """Per stage what makes another run decide as this one did (`StageModule.forward`)."""
        if not self.merged:
            return self.kept
        return [self.destinations(index, patch_tokens) for index in range(len(self.kept))]


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


def same_destinations(
    reference: Observation, candidate: Observation, index: int, patch_tokens: int
) -> NDArray[np.bool_]:
    """Per image and position [M, P], whether a stage does the same with the token there."""
    same: NDArray[np.bool_] = reference.destinations(index, patch_tokens) == candidate.destinations(index, patch_tokens)
    return same


def differences(
    reference: Observation,
    candidate: Observation,
    audited: Observation,
    plan: Plan,
    geometry: Geometry,
    bound: float,
) -> list[Difference]:
    """Explains every stage at which a candidate departs from the reference, for one image.

    `candidate` is what was kept when it ran; the reference was run with these tokens in place of its own, so that
    both decide on the same ones at every stage. `audited` is the candidate's own run with scores,
    which may part from its other run at near-ties. `bound` is the largest relative gap that counts as a near-tie.
    """
    found: list[Difference] = []
    patches = plan.patch_tokens
    for index in range(len(plan.stages)):
        did = candidate.destinations(index, patches)[0]
        entering = candidate.entering(index, patches)[0]
        expected_entering = reference.entering(index, patches)[0]
        expected = replayed(reference, plan, index, geometry)
        tokens = _apart(expected, expected_entering, did, patches + index)
        if not tokens:
            continue
        audited_entering = audited.entering(index, patches)[0]
        decision, gap = "unexplained", float("inf")
        if set(audited_entering.tolist()) == set(entering.tolist()):
            replay = replayed(audited, plan, index, geometry)
            wrong = _apart(replay, audited_entering, did, patches + index)
            name, wrong_gap = _nearest_flip(replay, audited_entering, wrong)
            if wrong and wrong_gap > bound:
                found.append(Difference(index + 1, "selection", name, wrong_gap, sorted(wrong)))
                continue
            decision, gap = _flipped(expected, expected_entering, replay, audited_entering)
        if decision == "unexplained":
            decision, gap = _nearest_flip(expected, expected_entering, tokens)
        found.append(Difference(index + 1, "near_tie" if gap <= bound else "weights", decision, gap, sorted(tokens)))
    return found


def replayed(observation: Observation, plan: Plan, index: int, geometry: Geometry) -> Replay:
    """A stage's selection recomputed from the scores that a run reported for it."""
    method = methods.get(plan.method)
    stage = plan.stages[index]
    scores = {
        name: torch.from_numpy(np.array(observation.scores[f"{name}_{index + 1}"])).double()
        for name in method.score_names(stage)
    }
    return method.replay(stage, scores, geometry, methods.parse_options(plan.method, plan.options))


def _apart(replay: Replay, entering: NDArray[Any], did: NDArray[Any], made_anew: int) -> set[int]:
    """Positions of entering tokens that go elsewhere by the replayed scores than they went; `did` [P] as `destinations`."""
    kept = replay.kept[0].numpy()
    if replay.goes is None:
        chosen = set(entering[kept[kept >= 0]].tolist())
        wanted = np.array([position if position in chosen else -1 for position in entering])
    else:
        goes = replay.goes[0].numpy()
        wanted = np.where(goes < 0, -1, np.append(entering, made_anew)[goes])
    present = entering >= 0
    return set(entering[present & (wanted != did[entering])].tolist())


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
    if not decision.per_token:
        return margin
    order = np.argsort(entering)
    return margin[order] if margin.ndim == 1 else margin[np.ix_(order, order)]


def _nearest_flip(replay: Replay, entering: NDArray[Any], positions: set[int]) -> tuple[str, float]:
    """How far these positions' fate was from another, by one run's decisions alone.

    A token flips with the decision it was nearest to flipping in, or with any that concerns all tokens;
    the largest such distance counts.
    """
    name, nearest = "unexplained", np.full(len(positions), np.inf)
    at = np.isin(entering, list(positions))
    for decision in replay.decisions:
        margin = decision.margin[0].abs().numpy()
        margin = margin.min(1) if margin.ndim == 2 else margin
        distance = margin[at] if decision.per_token else np.full(at.sum(), margin.min(initial=np.inf))
        if len(distance) != len(nearest):  # a position that is not there at all
            return "unexplained", float("inf")
        if (distance < nearest).any():
            name, nearest = decision.name, np.minimum(nearest, distance)
    return name, float(nearest.max(initial=0.0))
