"""What an engine or a model did with images, and the scores it did it by.

What an engine kept is what the engine reports. Its scores are those of its own audit run; an eager model's are never
put in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ztp_deploy import methods
from ztp_deploy.backends.base import Session
from ztp_deploy.backends.batches import filled_batches
from ztp_deploy.errors import ZtpError
from ztp_deploy.evidence.observe import observe, observe_eager
from ztp_deploy.evidence.selection import Observation
from ztp_deploy.exporters.graph import InferenceGraph
from ztp_deploy.plan import Geometry, Plan
from ztp_deploy.pruning.assignment import assign
from ztp_deploy.pruning.prune import PrunedModel


@dataclass(frozen=True)
class Seen:
    """What a run over M images did, and the scores behind it.

    Per stage `kept` [M, k] and `assignment` [M, P] as `Session` reports them. `audited` is the same engine's or model's
    run with its scores, None where it has none; `notes` say so, and why.
    """

    plan: Plan
    kept: list[NDArray[Any]]
    assignment: list[NDArray[Any]]
    audited: Observation | None
    geometry: Geometry | None
    notes: tuple[str, ...] = ()


def seen_by_model(pruned: PrunedModel, pixels: NDArray[Any]) -> Seen:
    """What eager PyTorch does with images [M, 3, H, W], float32 normalised, one by one."""
    seen = observe_eager(InferenceGraph(pruned, "float32"), pixels, batch=1)
    plan = pruned.plan
    kept = [np.sort(positions, axis=1) for positions in seen.kept]
    carried: list[NDArray[Any]] = [*assign(seen.kept, seen.merged, plan.patch_tokens)]
    return Seen(plan, kept, carried, seen, pruned.host.geometry, unscored(plan))


def seen_by_engine(session: Session, pixels: NDArray[Any], geometry: Geometry | None = None) -> Seen:
    """What an open engine does with images [M, 3, H, W], as `session.preprocess` makes them.

    With the model's `geometry` its audit scores are asked for as well. Raises GateFailed where the engine reports
    tokens that cannot be.
    """
    manifest = session.manifest
    plan, span = manifest.plan, manifest.batch
    kept: list[list[NDArray[Any]]] = []
    carried: list[list[NDArray[Any]]] = []
    for chunk, count in filled_batches(pixels, span.max, span.min):
        session.run(chunk)
        kept.append([positions[:count] for positions in session.kept()])
        carried.append([slots[:count] for slots in session.assignment()])
    audited, notes = None, unscored(plan)
    if not notes and geometry is None:
        notes = (
            "Why a token was dropped is not shown: the backbone was handed over in Python, and is not known here.",
        )
    if not notes:
        try:
            audited = observe(session.audit, pixels, (*manifest.outputs, *manifest.audit), span.max, span.min)
        except ZtpError as error:
            notes = (f"Scores are not shown: the engine does not give them. {error.problem}",)
    return Seen(plan, _columns(kept), _columns(carried), audited, geometry, notes)


def unscored(plan: Plan) -> tuple[str, ...]:
    """That a plan's method scores nothing, where it does not; else empty."""
    method = methods.get(plan.method)
    scored = any(method.score_names(stage) for stage in plan.stages)
    return () if scored else (f"{plan.method} scores nothing: there is no heat map.",)


def _columns(parts: Sequence[Sequence[NDArray[Any]]]) -> list[NDArray[Any]]:
    return [np.concatenate(column) for column in zip(*parts, strict=True)]
