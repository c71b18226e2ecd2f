"""Fates of patches by pixel: tints, frames, heat maps, strips and their words."""

from __future__ import annotations

import numpy as np
import pytest

from tests.show.patches import PATCHES, SIDE, patch, photo_of, picture
from ztp_deploy import models
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.images import photograph_crops
from ztp_deploy.show import painting
from ztp_deploy.show.painting import (
    COLOURS,
    CONTRARY,
    OTHER_COLOUR,
    UNKNOWN,
    UNSCORED,
    fade,
    paint_heat,
    paint_stage,
    patch_map,
    photograph,
    render_strip,
    tint,
)


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
    from ztp_deploy.preprocessing import transform_for

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
