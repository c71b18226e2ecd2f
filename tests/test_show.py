"""Pictures of pruning: fates of patches by number and by pixel, what an engine reports, and how `ztp show` refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ztp_deploy as ztp_api
from tests import tiny
from ztp_deploy import backends, cli, models, painting
from ztp_deploy.backends.base import Session
from ztp_deploy.errors import BadRequest, GateFailed, MissingSoftware, WriteFailed
from ztp_deploy.evidence.images import photograph_crops
from ztp_deploy.methods import avit
from ztp_deploy.painting import (
    COLOURS,
    CONTRARY,
    OTHER_COLOUR,
    UNKNOWN,
    UNSCORED,
    StagePicture,
    fade,
    paint_heat,
    paint_stage,
    patch_map,
    photograph,
    render_strip,
    tint,
)
from ztp_deploy.show import (
    Seen,
    parted,
    picture_paths,
    seen_by_engine,
    seen_by_model,
    show,
    stage_numbers,
    stage_pictures,
)
from ztp_deploy.workflow import Clock

PATCHES, SIDE = 36, 16


def photo_of(size=96, seed=0):
    """A photograph [size, size, 3] of noise, no two patches alike."""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def picture(carried, dropped=None, earlier=(), heat=None, merges=False):
    """A stage made up: who carries each patch, and why others went."""
    carried = np.array(carried)
    return StagePicture(
        stage=1,
        block=3,
        tokens_in=len(carried),
        kept=np.unique(carried[carried >= 0]),
        carried=carried,
        dropped={reason: np.array(positions) for reason, positions in (dropped or {}).items()},
        earlier=np.array(earlier, dtype=int),
        heat=None if heat is None else np.array(heat, dtype=float),
        heat_name=None if heat is None else "importance",
        merges=merges,
    )


def patch(pixels, number, side=SIDE, columns=6):
    """The pixels of one patch."""
    top, left = number // columns * side, number % columns * side
    return pixels[top : top + side, left : left + side]


def pruned_by(model, method, **request):
    return ztp_api.prune(model, ztp_api.make_plan(model, method, **(request or {"ratio": 0.6})))


# --- painting ------------------------------------------------------------------------------------


def test_kept_patches_stay_dropped_ones_take_the_colour_of_the_reason():
    photo = photo_of()
    carried = list(range(PATCHES))
    for gone in (0, 7, 14, 35):
        carried[gone] = -1
    painted = paint_stage(photo, picture(carried, {"similarity": [0, 7], "importance": [14]}, earlier=[35]))
    for number in range(PATCHES):
        here, before = patch(painted, number), patch(photo, number)
        if number in (0, 7):
            assert (here[0] == COLOURS["similarity"]).all()
            assert (here[:, -1] == COLOURS["similarity"]).all()
            assert (here[1:-1, 1:-1] == tint(before, COLOURS["similarity"])[1:-1, 1:-1]).all()
        elif number == 14:
            assert (here[-1] == OTHER_COLOUR).all()
            assert (here[1:-1, 1:-1] == tint(before, OTHER_COLOUR)[1:-1, 1:-1]).all()
        elif number == 35:
            assert (here == fade(before)).all()
        else:
            assert (here == before).all()


def test_tints_and_greys_by_hand():
    white, black = np.full((1, 3), 255, dtype=np.uint8), np.zeros((1, 3), dtype=np.uint8)
    assert tint(white, (0, 165, 255)).tolist() == [[102, 201, 255]]
    assert tint(black, (0, 165, 255)).tolist() == [[0, 99, 153]]
    assert fade(white).tolist() == [[151, 151, 151]]
    assert fade(black).tolist() == [[100, 100, 100]]
    assert len({*COLOURS.values(), OTHER_COLOUR}) == 4  # unseen and unknown never come together


def test_neighbours_dropped_for_one_reason_share_a_frame():
    photo = photo_of()
    carried = [-1, -1, *range(34)]
    painted = paint_stage(photo, picture(carried, {"similarity": [0, 1]}))
    assert (painted[5, SIDE - 1 : SIDE + 1] == tint(photo[5, SIDE - 1 : SIDE + 1], COLOURS["similarity"])).all()
    assert (painted[5, 2 * SIDE - 1] == COLOURS["similarity"]).all()
    assert (painted[5, 2 * SIDE] == photo[5, 2 * SIDE]).all()


def test_groups_take_their_mean_and_an_outline():
    photo = photo_of() // 4
    photo[:SIDE] = 200 + photo[:SIDE] % 40
    carried = np.arange(PATCHES)
    carried[1] = carried[0]  # two bright neighbours
    carried[35] = carried[12]  # two dark ones that are apart
    stage = picture(carried, merges=True)
    assert stage.groups == [[0, 1], [12, 35]]
    painted = paint_stage(photo, stage)
    bright = np.rint(photo[:SIDE, : 2 * SIDE].reshape(-1, 3).mean(axis=0))
    assert (painted[1 : SIDE - 1, 1 : 2 * SIDE - 1] == bright).all()
    assert (painted[0, : 2 * SIDE] == 0).all()
    assert (painted[:SIDE, 2 * SIDE - 1] == 0).all()
    dark = np.rint(np.concatenate([patch(photo, 12), patch(photo, 35)]).reshape(-1, 3).mean(axis=0))
    for number in (12, 35):
        assert (patch(painted, number)[1:-1, 1:-1] == dark).all()
        assert (patch(painted, number)[0] == 255).all()
    for number in set(range(PATCHES)) - {0, 1, 12, 35}:
        assert (patch(painted, number) == patch(photo, number)).all()


def test_heat_maps_run_from_the_lowest_to_the_highest_and_leave_the_unscored_grey():
    photo = photo_of()
    heat = np.linspace(2.0, 4.0, PATCHES)
    heat[5] = np.nan
    painted = paint_heat(photo, picture(range(PATCHES), heat=heat))
    low, middle, high = painting.heat_colours(np.array([0.0, 18 / 35, 1.0]))
    assert (patch(painted, 0) == low).all()
    assert (patch(painted, 18) == middle).all()
    assert (patch(painted, 35) == high).all()
    assert (patch(painted, 5) == fade(patch(photo, 5))).all()
    flat = paint_heat(photo, picture(range(PATCHES), heat=[1.0] * PATCHES))
    assert (flat == painting.heat_colours(np.array([0.5]))[0]).all()


@pytest.mark.parametrize(
    "size, patches, side, rest", [(96, 36, 16, 0), (384, 729, 14, 6), (32, 4, 16, 0), (98, 49, 14, 0)]
)
def test_any_square_grid(size, patches, side, rest):
    where = patch_map(size, patches)
    columns = size // side
    assert (where[0, :side] == 0).all()
    assert where[size - rest - 1, size - rest - 1] == patches - 1
    assert where[side, 0] == columns
    assert (where == -1).sum() == size * size - (size - rest) ** 2
    assert (np.bincount(where[where >= 0]) == side * side).all()


@pytest.mark.parametrize("size, patches", [(96, 35), (4, 36), (96, 0)])
def test_grids_that_are_none(size, patches):
    with pytest.raises(BadRequest, match=f"{patches} patches make no square"):
        patch_map(size, patches)


@pytest.mark.parametrize("input", ["float32", "uint8"])
def test_the_photograph_is_what_the_model_sees(model, input):
    from ztp_deploy.models.preprocessing import transform_for

    preprocessing = models.source_of(model).preprocessing
    [crop] = photograph_crops(1).values()
    pixels = transform_for(preprocessing, input)(crop)
    expected = np.moveaxis(transform_for(preprocessing, "uint8")(crop), 0, -1)
    assert (photograph(pixels, preprocessing) == expected).all()


def test_the_strip_holds_every_panel_and_grows_small_images():
    photo = photo_of()
    stages = [picture([*range(35), -1], {"similarity": [35]}, heat=np.arange(PATCHES)) for _ in range(7)]
    strip = np.asarray(render_strip(photo, stages, title="a title", subtitle="below", notes=["mind this"]))
    large = painting.enlarge(photo, 3)
    assert large.shape == (288, 288, 3)

    def places(panel):
        first = np.argwhere((strip == panel[0, 0]).all(-1))
        return [
            (y, x)
            for y, x in first.tolist()
            if strip[y : y + 288, x : x + 288].shape == panel.shape and (strip[y : y + 288, x : x + 288] == panel).all()
        ]

    assert len(places(large)) == 1
    for panel in (paint_stage(photo, stages[0]), paint_heat(photo, stages[0])):
        found = places(painting.enlarge(panel, 3))
        assert len(found) == 7
        assert len({x for _, x in found}) == 6  # the seventh begins a second row
    assert strip.shape[1] < 7 * 320
    alone = np.asarray(render_strip(photo, stages[:1], title="a title"))
    assert alone.shape[0] < strip.shape[0]
    assert (strip == (190, 30, 20)).all(-1).any()  # the note's ink
    assert not (alone == (190, 30, 20)).all(-1).any()


def test_text_is_wrapped_to_the_strip():
    lines = painting._wrapped("several words that need more than one line " + "x" * 80, 200)
    assert len(lines) > 2
    assert all(painting._width(line) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == "severalwordsthatneedmorethanoneline" + "x" * 80
    assert painting._wrapped("", 200) == []


@pytest.mark.parametrize(
    "reason, words",
    [
        ("similarity", "dropped by similarity (S)"),
        ("importance", "dropped by importance (I)"),
        ("class_attention", "dropped by class attention"),
        ("halted", "dropped: halted"),
        (CONTRARY, "dropped against its scores"),
        (UNSCORED, "dropped unseen"),
        (UNKNOWN, "dropped, reason unknown"),
    ],
)
def test_the_legends_words(reason, words):
    assert painting.label_of(reason, [picture([0, -1, 1, 2], {"similarity": [1]})]) == words


def test_importance_is_no_stage_i_without_similarity():
    assert painting.label_of("importance", [picture([0, -1, 1, 2], {"importance": [1]})]) == "dropped by importance"


# --- what the stages did ---------------------------------------------------------------------------


def test_counts_of_zero_tprune_are_the_plans(pruned):
    seen = seen_by_model(pruned, tiny.images(3))
    for image in range(3):
        before = set(range(PATCHES))
        for stage, done in zip(pruned.plan.stages, stage_pictures(seen, image), strict=True):
            assert (done.block, done.tokens_in, len(done.kept)) == (stage.block, stage.tokens_in, stage.tokens_out)
            assert list(done.dropped) == ["similarity", "importance"]
            similar, unimportant = (set(positions.tolist()) for positions in done.dropped.values())
            assert len(similar) == stage.static["similar"]
            assert len(unimportant) == stage.tokens_in - stage.tokens_out - stage.static["similar"]
            kept = set(done.kept.tolist())
            assert kept | similar | unimportant == before
            assert set(done.earlier.tolist()) == set(range(PATCHES)) - before
            # By the method's own account: S-dropped ones are at −1, and I drops the lowest of the rest.
            heat = done.heat
            assert {p for p in before if np.isnan(heat[p])} == similar
            assert max(heat[p] for p in unimportant) <= min(heat[p] for p in kept)
            assert done.heat_name == "importance"
            before = kept


def test_similarity_is_told_from_importance_by_the_stages_own_scores(pruned):
    images = tiny.images(2)
    with torch.inference_mode():
        outputs = pruned.run(torch.from_numpy(images))
    scores = [stage["score"].numpy() for stage in outputs.scores]
    for image in range(2):
        for index, done in enumerate(stage_pictures(seen_by_model(pruned, images), image)):
            entering = outputs.kept[index - 1][image].numpy() if index else np.arange(PATCHES)
            assert set(done.dropped["similarity"].tolist()) == set(entering[scores[index][image] < 0].tolist())


@pytest.mark.parametrize("method, reason", [("evit", "class_attention"), ("ats", "sampled"), ("slice", UNSCORED)])
def test_other_methods_have_their_own_reasons(model, method, reason):
    seen = seen_by_model(pruned_by(model, method), tiny.images(1))
    for stage, done in zip(seen.plan.stages, stage_pictures(seen), strict=True):
        assert list(done.dropped) == [reason]
        assert len(done.kept) + len(done.dropped[reason]) == done.tokens_in == stage.tokens_in
        assert (done.heat is None) == (method == "slice")
    assert [note[:5] for note in seen.notes] == (["slice"] if method == "slice" else [])


def test_groups_are_those_of_the_assignment(model):
    images = tiny.images(2)
    pruned = pruned_by(model, "tome")
    traces = ztp_api.trace_tokens(pruned, torch.from_numpy(images))
    seen = seen_by_model(pruned, images)
    for image in range(2):
        for stage, done, trace in zip(pruned.plan.stages, stage_pictures(seen, image), traces, strict=True):
            carried = trace.assignment[image].tolist()
            together = [[p for p in range(PATCHES) if carried[p] == token] for token in range(stage.tokens_out)]
            assert sorted(done.groups) == sorted(group for group in together if len(group) > 1)
            assert (done.dropped, done.heat, len(done.kept)) == ({}, None, stage.tokens_out)
            numbers = stage_numbers(done)
            assert numbers["groups"] == done.groups


def test_merging_methods_drop_too_and_fused_tokens_go_on(model):
    seen = seen_by_model(pruned_by(model, "diffrate", ratio=0.5, options={"pruned": 0.5}), tiny.images(1))
    done = stage_pictures(seen)
    assert set().union(*(stage.dropped for stage in done)) == {"importance"}
    for stage in done:
        gone = sum(map(len, stage.dropped.values())) + len(stage.earlier)
        assert gone + (stage.carried >= 0).sum() == PATCHES
        assert np.isnan(stage.heat).sum() == len(stage.earlier)
    seen = seen_by_model(pruned_by(model, "evit", ratio=0.6, options={"fuse": True}), tiny.images(1))
    for index, stage in enumerate(stage_pictures(seen)):
        assert stage.dropped == {}
        assert PATCHES + index in stage.kept  # the token made anew
        assert np.isfinite(stage.heat).all()


def test_dropping_what_the_scores_would_merge_is_against_them(model):
    own = seen_by_model(pruned_by(model, "diffrate", ratio=0.5, options={"pruned": 0.5}), tiny.images(1))
    [pair, *_] = stage_pictures(own)[0].groups
    joined = next(p for p in pair if p not in own.kept[0][0])
    lost = own.assignment[0].copy()
    lost[0, joined] = -1
    seen = Seen(own.plan, own.kept, [lost, *own.assignment[1:]], own.audited, own.geometry)
    assert stage_pictures(seen)[0].dropped[CONTRARY].tolist() == [joined]


def test_masked_slots_are_out_and_counted_as_such(model):
    options = {"form": "masked", "gate_scale": 3.0, "gate_center": 0.5}
    seen = seen_by_model(pruned_by(model, "avit", ratio=1.0, options=options), tiny.images(1))
    before = PATCHES
    for index, done in enumerate(stage_pictures(seen)):
        alive = seen.kept[index][0][seen.kept[index][0] >= 0]
        assert done.kept.tolist() == alive.tolist()
        assert done.tokens_in == before
        gone = sum(map(len, done.dropped.values()))
        assert (len(done.kept) + gone, set(done.dropped) <= {"halted"}) == (before, True)
        # The scores count the class token, which is no patch: one slot off, this would not hold.
        assert (done.heat[done.kept] < avit.THRESHOLD).all()
        assert all((done.heat[positions] >= avit.THRESHOLD).all() for positions in done.dropped.values())
        before = len(done.kept)
    assert 0 < before < PATCHES


def test_images_are_run_one_by_one(pruned):
    images = tiny.images(2)
    both, second = seen_by_model(pruned, images), seen_by_model(pruned, images[1:])
    for ours, theirs in zip(both.kept, second.kept, strict=True):
        assert (ours[1] == theirs[0]).all()


# --- engines ---------------------------------------------------------------------------------------


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


# --- the command -----------------------------------------------------------------------------------


@pytest.fixture
def ztp(monkeypatch, capsys, tmp_path):
    """Runs a command in an empty folder with two photographs; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    # Small models, so that the command takes no time.
    load_model, describe = models.load_model, models.describe
    monkeypatch.setattr(models, "load_model", lambda name, weights="auto": load_model(name, weights, tiny.SIZE))
    monkeypatch.setattr(models, "describe", lambda name, size=None: describe(name, size or tiny.SIZE if isinstance(name, str) else None))  # fmt: skip
    for name, crop in zip(("one.png", "two.jpg"), photograph_crops(2).values(), strict=True):
        crop.save(name)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ztp", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run


def test_show_of_a_model(ztp):
    code, out, err = ztp("show", "one.png", "two.jpg", "-m", "deit_t", "-r", 0.7, "--weights", "random")
    assert code == 0, err
    assert out.splitlines() == ["pictures/one--zero_tprune-0.7.png", "pictures/two--zero_tprune-0.7.png"]
    assert "Random weights" in err
    assert sorted(path.name for path in Path("pictures").iterdir()) == [Path(line).name for line in out.splitlines()]
    with Image.open(out.splitlines()[0]) as strip:
        assert (strip.mode, strip.format) == ("RGB", "PNG")
        assert strip.width > 4 * 288


def test_show_of_an_engine(ztp, torchscript_engine):
    code, out, err = ztp("show", "one.png", "--engine", torchscript_engine.directory, "--directory", "shown", "--json")
    assert code == 0, err
    assert "random weights" in err
    shown = json.loads(out)
    plan = torchscript_engine.manifest.plan
    assert (shown["schema"], shown["random_weights"], shown["plan"]) == ("ztp.show/1", True, plan.label)
    assert shown["ran"].startswith("torchscript")
    [image] = shown["images"]
    assert image["image"] == "one.png"
    assert image["picture"] == f"shown/one--{plan.label}.png"
    assert Path(image["picture"]).is_file()
    assert "Random weights: which tokens are kept means nothing." in image["notes"]
    with backends.load_engine(torchscript_engine.directory) as session:
        session.run(session.preprocess("one.png"))
        kept = session.kept()
    for stage, positions, planned in zip(image["stages"], kept, plan.stages, strict=True):
        assert stage["kept"] == {"count": planned.tokens_out, "positions": positions[0].tolist()}
        assert stage["dropped"]["similarity"]["count"] == planned.static["similar"]
        gone = sum(dropped["count"] for dropped in stage["dropped"].values())
        assert (stage["tokens_in"], stage["tokens_out"]) == (planned.tokens_in, planned.tokens_out)
        assert gone == planned.tokens_in - planned.tokens_out


def test_an_untrained_method_is_said_loudly(ztp):
    code, _, err = ztp("show", "one.png", "-m", "deit_t", "-r", 0.7, "--weights", "random",
                       "--method", "dynamicvit", "-o", "weights=random", "--json")  # fmt: skip
    assert code == 0, err
    assert "predictors are random" in " ".join(err.replace("│", " ").split())


MODEL = ("-m", "deit_t", "-r", 0.7, "--weights", "random")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("one.png",), ("--engine", "--model")),
        (("one.png", "--engine", "a", *MODEL), ("--engine", "--model")),
        (MODEL, ("IMAGE",)),
        (("one.png", "--engine", "a", "-r", 0.7), ("--ratio makes no sense with --engine",)),
        (("one.png", "--engine", "a", "--weights", "random"), ("--weights makes no sense",)),
        (("one.png", "--engine", "a", "-o", "rounds=2"), ("--option makes no sense",)),
        (("one.png", "--engine", "nowhere"), ("no engine folder",)),
        (("three.png", *MODEL), ("no file three.png",)),
        (("broken.png", *MODEL), ("broken.png", "no image")),
        (("one.png", "deep/ONE.jpg", *MODEL), ("one.png and deep/ONE.jpg", "Rename one")),
        (("one.png", "one.png", *MODEL), ("one.png and one.png",)),
        (("one.png", "-m", "deit_t"), ("exactly one",)),
        (("one.png", "-m", "deit_t", "--method", "dense"), ("keeps every token", "ratio below 1")),
        (("one.png", "-m", "deit_t", "-r", 1.0), ("keeps every token",)),
        (("one.png", "-m", "deit_x", "-r", 0.7), ("deit_x", "deit_s")),
        (("one.png", *MODEL, "--directory", "one.png"), ("one.png is no folder", "--directory")),
    ],
)
def test_refusals(ztp, arguments, words):
    Path("broken.png").write_bytes(b"no picture")
    before = sorted(path.name for path in Path.cwd().iterdir())
    code, out, err = ztp("show", *arguments)
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("error: ")
    for word in words:
        assert word in err
    assert sorted(path.name for path in Path.cwd().iterdir()) == before


def test_make_show_passes_an_engine_or_a_plan_on():
    import subprocess

    root = Path(__file__).parent.parent

    def line(*variables):
        command = ["make", "-n", "--no-print-directory", "-o", ".venv/.ready", "show", "IMAGES=a.jpg b.jpg", *variables]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
        return " ".join(done.stdout.split())

    assert line("ENGINE=engines/mine") == '.venv/bin/ztp show a.jpg b.jpg --engine "engines/mine"'
    plan = '.venv/bin/ztp show a.jpg b.jpg --model "deit_s"'
    assert line("RATIO=0.5").startswith(f'{plan} --ratio "0.5"')
    assert line("RATIO=0.5", "METHOD=tome").startswith(f'{plan} --method "tome" --ratio "0.5"')


def test_one_source_or_the_other():
    with pytest.raises(BadRequest, match="Either an engine or a plan"):
        show([Path("a.png")], Path("pictures"), Clock(cli.Bars()))


def test_names_of_pictures():
    assert picture_paths([Path("a/x.y.png"), Path("b.jpg")], Path("out"), "tome-0.7") == [
        Path("out/x.y--tome-0.7.png"),
        Path("out/b--tome-0.7.png"),
    ]
    same = Path("a/x.png")
    with pytest.raises(BadRequest, match=r"a/x.png and a/x.png"):
        picture_paths([same, same], Path("out"), "tome-0.7")
    with pytest.raises(BadRequest, match=r"a/x.png and b/X.jpg would both be out/X--tome-0.7.png"):
        picture_paths([Path("a/x.png"), Path("b/X.jpg")], Path("out"), "tome-0.7")


def test_no_half_picture_is_left(tmp_path, monkeypatch):
    from ztp_deploy.show import write_picture

    def full(self, data):
        raise OSError(28, "No space left on device")

    target = tmp_path / "one.png"
    target.write_bytes(b"old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(WriteFailed, match="disk"):
        write_picture(Image.new("RGB", (4, 4)), target)
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]
    assert target.read_bytes() == b"old"


def test_pictures_load_no_engine_library():
    import subprocess

    script = (
        "import sys, ztp_deploy.show, ztp_deploy.painting; "
        "print([m for m in ('onnx', 'onnxruntime', 'openvino', 'tensorrt', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
