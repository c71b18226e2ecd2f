"""What every stage did with an image and why: the patches that went, by the decision that went against them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ztp_deploy import methods
from ztp_deploy.evidence.selection import replayed
from ztp_deploy.exporters.graph import merges
from ztp_deploy.methods.base import Replay
from ztp_deploy.plan import Plan
from ztp_deploy.pruning.assignment import assign
from ztp_deploy.show.painting import CONTRARY, SIMILARITY, UNKNOWN, UNSCORED, StagePicture
from ztp_deploy.show.seen import Seen, unscored

_RANKS_ONLY = "split"
"""The decision that drops nobody: it says whom similarity may drop."""
_HEAT_NAMES = {"score": "importance"}


def stage_pictures(seen: Seen, image: int = 0) -> list[StagePicture]:
    """What every stage did with one of the images."""
    plan, found = seen.plan, []
    patches = plan.patch_tokens
    token_before = np.arange(patches)
    tokens_in = patches
    same = seen.audited is not None
    for index, stage in enumerate(plan.stages):
        carried, kept = seen.assignment[index][image], seen.kept[index][image]
        why = _Scores(seen, index, image) if same else None
        gone = np.flatnonzero((token_before >= 0) & (carried < 0))
        found.append(
            StagePicture(
                stage=index + 1,
                block=stage.block,
                tokens_in=tokens_in,
                kept=kept[kept >= 0],
                carried=carried,
                dropped=_by_reason(gone, token_before, why, plan),
                earlier=np.flatnonzero((token_before < 0) & (carried < 0)),
                heat=why.heat(token_before) if why else None,
                heat_name=why.name if why else None,
                merges=merges(plan),
            )
        )
        token_before = np.where(carried < 0, -1, kept[carried])
        tokens_in = int((kept >= 0).sum())
        # The audit run may part from the other at a near-tie; its later scores are of other tokens.
        same = same and _same_tokens(seen, index, image)
    return found


def _same_tokens(seen: Seen, index: int, image: int) -> bool:
    assert seen.audited is not None
    one = seen.audited.at(image)
    theirs = assign(one.kept[: index + 1], one.merged[: index + 1], seen.plan.patch_tokens)[index][0]
    alike = np.array_equal(np.sort(one.kept[index][0]), seen.kept[index][image])
    return alike and np.array_equal(theirs, seen.assignment[index][image])


def parted(seen: Seen, image: int = 0) -> int | None:
    """The first stage, from 1, after which the run with scores had kept other tokens than the run that is drawn."""
    if seen.audited is None:
        return None
    return next((index + 1 for index in range(len(seen.kept) - 1) if not _same_tokens(seen, index, image)), None)


class _Scores:
    """The scores of one stage for one image, by the position a token goes by."""

    def __init__(self, seen: Seen, index: int, image: int) -> None:
        assert seen.audited is not None
        assert seen.geometry is not None
        observation = seen.audited.at(image)
        plan, stage = seen.plan, seen.plan.stages[index]
        entering = observation.entering(index, plan.patch_tokens)[0].tolist()
        self._slots = {position: slot for slot, position in enumerate(entering) if position >= 0}
        self._replay = replayed(observation, plan, index, seen.geometry)
        self.name, self._values = None, None
        widths = {stage.tokens_in: 0, stage.tokens_in + plan.special_tokens: plan.special_tokens}
        for name in methods.get(plan.method).score_names(stage):
            values = observation.scores[f"{name}_{index + 1}"]
            if values.ndim == 2 and values.shape[1] in widths:
                self.name = _HEAT_NAMES.get(name, name.replace("_", " "))
                self._values = values[0, widths[values.shape[1]] :].astype(np.float64)

    def heat(self, tokens: NDArray[Any]) -> NDArray[Any] | None:
        """The score of each of the tokens [P]; NaN for those that are out or dropped before they were ranked."""
        if self._values is None:
            return None
        heat = np.full(len(tokens), np.nan)
        for patch, token in enumerate(tokens.tolist()):
            slot = self._slots.get(token)
            if slot is not None and _against(self._replay, slot) != SIMILARITY:
                heat[patch] = self._values[slot]
        return heat

    def reason(self, token: int) -> str:
        """Why the token is dropped, by its own scores: the first decision that goes against it."""
        slot = self._slots.get(token)
        if slot is None:
            return UNKNOWN
        if not self._replay.decisions:
            return UNSCORED
        goes = self._replay.goes
        stays = slot in self._replay.kept[0].tolist() if goes is None else int(goes[0, slot]) >= 0
        return CONTRARY if stays else (_against(self._replay, slot) or CONTRARY)


def _against(replay: Replay, slot: int) -> str | None:
    for decision in replay.decisions:
        of_tokens = decision.name != _RANKS_ONLY and decision.per_token and decision.margin.ndim == 2
        if of_tokens and float(decision.margin[0, slot]) <= 0:
            return decision.name
    return None


def _by_reason(gone: NDArray[Any], tokens: NDArray[Any], why: _Scores | None, plan: Plan) -> dict[str, NDArray[Any]]:
    """Patches that went, by the reason, similarity first."""
    unexplained = UNSCORED if unscored(plan) else UNKNOWN
    reasons = [why.reason(int(tokens[patch])) if why else unexplained for patch in gone]
    order = sorted(set(reasons), key=lambda reason: (reason != SIMILARITY, reason in (CONTRARY, UNKNOWN), reason))
    return {name: gone[[reason == name for reason in reasons]] for name in order}
