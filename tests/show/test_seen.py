"""What an engine reports is what is drawn, its scores are its own, and tokens that cannot be fail the gate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from tests.show.patches import PATCHES, patch, photo_of, pruned_by
from ztp_deploy import backends
from ztp_deploy.backends.base import Session
from ztp_deploy.errors import GateFailed, MissingSoftware
from ztp_deploy.show.draw import stage_numbers
from ztp_deploy.show.painting import COLOURS, CONTRARY, UNKNOWN, paint_stage, tint
from ztp_deploy.show.seen import Seen, seen_by_engine, seen_by_model
from ztp_deploy.show.stages import parted, stage_pictures


class Says:
    """A runner that reports what it is told."""

    def __init__(self, outputs, audit=None):
        self.outputs, self.audited, self.batches = outputs, audit, []

    def run(self, images):
        self.batches.append(len(images))
        return {name: value[: len(images)] for name, value in self.outputs.items()}

    def audit(self, images):
        if self.audited is None:
            raise MissingSoftware("It was built without them.")
        return {name: value[: len(images)] for name, value in self.audited.items()}

    def close(self):
        pass


@pytest.fixture(scope="module")
def told(torchscript_engine):
    """The engine's own outputs and audit over four images."""
    images = tiny.images(4)
    with backends.load_engine(torchscript_engine.directory) as session:
        return session._runner.run(images), session.audit(images), session.manifest


def session_of(manifest, outputs, audit=None):
    return Session(Path("engine"), manifest, Says(outputs, audit))


def geometry_of(pruned):
    return pruned.host.geometry


def test_an_engine_shows_what_eager_does(torchscript_engine, pruned):
    images = tiny.images(9)  # more than its largest batch
    with backends.load_engine(torchscript_engine.directory) as session:
        seen = seen_by_engine(session, images, geometry_of(pruned))
    eager = seen_by_model(pruned, images)
    assert seen.notes == ()
    for image in range(9):
        assert parted(seen, image) is None
        for ours, theirs in zip(stage_pictures(seen, image), stage_pictures(eager, image), strict=True):
            assert stage_numbers(ours) == stage_numbers(theirs)
            np.testing.assert_allclose(ours.heat, theirs.heat, rtol=1e-3, atol=1e-5)


def test_the_engines_own_tokens_are_drawn(told, pruned):
    outputs, audit, manifest = told
    first = outputs["kept_1"].copy()
    inside, outside = int(first[0, 0]), min(set(range(PATCHES)) - set(first[0].tolist()))
    first[0, 0] = outside
    session = session_of(manifest, outputs | {"kept_1": first}, audit)
    seen = seen_by_engine(session, tiny.images(4), geometry_of(pruned))
    stages = stage_pictures(seen)
    assert outside in stages[0].kept
    assert stages[0].dropped[CONTRARY].tolist() == [inside]
    photo = photo_of()
    painted = paint_stage(photo, stages[0])
    assert (patch(painted, outside) == patch(photo, outside)).all()
    assert (patch(painted, inside)[1:-1, 1:-1] == tint(patch(photo, inside), COLOURS[CONTRARY])[1:-1, 1:-1]).all()
    # What the audit run says of later stages is about other tokens: it is left out.
    assert parted(seen) == 1
    assert [stage.heat is None for stage in stages] == [False, True, True]
    assert set(stages[1].dropped) == {UNKNOWN}
    assert parted(seen, 1) is None


def test_without_scores_there_is_no_heat_map_and_it_is_said(told, pruned):
    outputs, _, manifest = told
    images = tiny.images(4)
    seen = seen_by_engine(session_of(manifest, outputs), images, geometry_of(pruned))
    assert seen.audited is None
    assert seen.notes == ("Scores are not shown: the engine does not give them. It was built without them.",)
    for stage, done in zip(manifest.plan.stages, stage_pictures(seen), strict=True):
        assert (done.heat, list(done.dropped)) == (None, [UNKNOWN])
        assert len(done.dropped[UNKNOWN]) == stage.tokens_in - stage.tokens_out
    [note] = seen_by_engine(session_of(manifest, outputs), images).notes
    assert "handed over in Python" in note


def test_small_batches_are_filled_up(told, pruned):
    outputs, audit, manifest = told
    manifest = manifest.model_copy(update={"batch": manifest.batch.model_copy(update={"min": 4, "opt": 4, "max": 4})})
    session = session_of(manifest, outputs, audit)
    seen = seen_by_engine(session, tiny.images(1), geometry_of(pruned))
    assert session._runner.batches == [4]
    assert [kept.shape[0] for kept in seen.kept] == [1, 1, 1]
    assert seen.audited.logits.shape[0] == 1


@pytest.mark.parametrize("position, words", [(900, "position 900"), (-7, "position -7"), (None, "twice")])
def test_tokens_that_cannot_be_fail_the_gate(told, pruned, position, words):
    outputs, audit, manifest = told
    second = outputs["kept_2"].copy()
    second[1, 0] = second[1, 1] if position is None else position
    session = session_of(manifest, outputs | {"kept_2": second}, audit)
    with pytest.raises(GateFailed, match=f"stage 2 kept .*{words}.*ztp check"):
        seen_by_engine(session, tiny.images(4), geometry_of(pruned))
    for ask in (session.kept, session.assignment):
        with pytest.raises(GateFailed, match=words):
            ask()


def test_merges_that_cannot_be_fail_the_gate(model, told):
    _, _, manifest = told
    pruned = pruned_by(model, "tome")
    images = tiny.images(1)
    with torch.inference_mode():
        ran = pruned.run(torch.from_numpy(images))
    outputs = {"logits": ran.logits.numpy()}
    outputs |= {f"kept_{n}": value.numpy() for n, value in enumerate(ran.kept, start=1)}
    outputs |= {f"merged_{n}": value.numpy() for n, value in enumerate(ran.merged, start=1)}
    manifest = manifest.model_copy(update={"plan": pruned.plan, "outputs": tuple(outputs)})
    fine = seen_by_engine(session_of(manifest, outputs), images, geometry_of(pruned))
    assert [done.groups for done in stage_pictures(fine)] == [
        done.groups for done in stage_pictures(seen_by_model(pruned, images))
    ]
    outputs["merged_1"] = outputs["merged_1"] + 500
    with pytest.raises(GateFailed, match="merged into others that are not there"):
        seen_by_engine(session_of(manifest, outputs), images, geometry_of(pruned))


def test_a_merging_engine_is_compared_group_by_group(model):
    pruned = pruned_by(model, "tome")
    own = seen_by_model(pruned, tiny.images(1))
    moved = own.assignment[0].copy()
    [pair, *_] = stage_pictures(own)[0].groups
    moved[0, pair[1]] = (moved[0, pair[1]] + 1) % len(own.kept[0][0])
    other = Seen(own.plan, own.kept, [moved, *own.assignment[1:]], own.audited, own.geometry)
    assert (parted(own), parted(other)) == (None, 1)
