"""Pictures become a model's input bit for bit as timm prepares them for evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import timm
from PIL import Image
from timm.data import create_transform

from ztp_deploy import models
from ztp_deploy.errors import BadRequest
from ztp_deploy.preprocessing import adapted, open_image, transform_for
from ztp_deploy.source import Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FIELDS = ("interpolation", "crop_pct", "crop_mode", "mean", "std")


def settings_of_our_models():
    """Every way in which timm's default settings prepare a picture for a model of ours; sizes as small as will do."""
    architectures = {*models.model_names().values()} | {
        name for name in timm.list_models(pretrained=True) if name.startswith(("vit_", "deit", "eva02_"))
    }
    configs = [timm.get_pretrained_cfg(name) for name in sorted(architectures) if name in timm.list_models()]
    configs += [timm.get_pretrained_cfg(name) for name in timm.list_pretrained() if name.startswith(("vit_", "eva02_"))]
    return sorted({tuple(getattr(config, field) for field in FIELDS) for config in configs if config})


def preprocessing(**changes):
    return Preprocessing(**{"input_size": (3, 32, 32), "mean": MEAN, "std": STD} | changes)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_equal_timms(how, image):
    for dtype in ("float32", "uint8"):
        timms = create_transform(**how.model_dump(), is_training=False, normalize=dtype == "float32")
        expected, found = np.asarray(timms(image)), transform_for(how, dtype)(image)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), (how, image.size)
        assert np.array_equal(found, expected), (how, image.size)


def test_the_settings_of_our_models_prepare_as_timm_does():
    found = settings_of_our_models()
    assert {row[0] for row in found} >= {"bicubic", "bilinear"}
    assert {row[2] for row in found} >= {"center", "squash"}
    assert len({row[1] for row in found}) >= 4
    for row in found:
        how = preprocessing(**dict(zip(FIELDS, row, strict=True)))
        for width, height in ((47, 33), (20, 71), (32, 32)):
            assert_equal_timms(how, noise(width, height))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
def test_pictures_of_any_size_are_prepared_as_timm_does(interpolation, crop_mode):
    drawn, too_narrow = np.random.default_rng(0), 0
    sides = [1, 2, 31, 32, 33, 36, 37, 300]
    for number in range(24):
        width, height = (int(drawn.choice(sides)) for _ in range(2))
        side = int(drawn.choice([24, 32, 48])) if number % 3 == 0 else 32  # not all are square
        how = preprocessing(
            input_size=(3, side, 32),
            interpolation=interpolation,
            crop_mode=crop_mode,
            crop_pct=float(drawn.choice([0.7, 0.875, 0.9, 0.95, 1.0, 1.25])),
            mean=tuple(drawn.random(3)),
            std=tuple(drawn.random(3) + 0.1),
        )
        image = noise(width, height, seed=number)
        try:
            assert_equal_timms(how, image)
        except ValueError:  # Pillow's: height and width must be > 0
            too_narrow += 1
            with pytest.raises(BadRequest, match=f"{width} x {height} pixels is too narrow"):
                transform_for(how, "uint8")(image)
    assert (too_narrow > 0) == (crop_mode == "border")


def test_every_value_of_a_pixel_is_normalised_as_timm_does():
    every = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert_equal_timms(preprocessing(input_size=(3, 16, 16), crop_pct=1.0), open_image(every))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_pictures_of_other_kinds_are_prepared_as_timm_does(mode):
    grey = np.random.default_rng(0).integers(0, 2**16, (40, 51), dtype=np.uint16)
    image = Image.fromarray(grey) if mode == "I;16" else noise(51, 40).convert(mode)
    assert_equal_timms(preprocessing(), open_image(image))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"interpolation": "random"}, "cannot be resized by interpolation='random'. Known are: nearest, bilinear"),
        ({"crop_mode": "corner"}, "cannot be cropped by crop_mode='corner'. Known are: center, squash, border."),
        ({"crop_pct": 0.0}, "cannot be prepared with crop_pct=0.0"),
        ({"crop_pct": float("nan")}, "cannot be prepared with crop_pct=nan"),
        ({"std": (0.2, 0.0, 0.2)}, r"std=\[0.2, 0.0, 0.2\]. All of these are numbers above zero."),
        ({"std": (0.2, float("inf"), 0.2)}, r"std=\[0.2, inf, 0.2\]. All of these are numbers above zero."),
        ({"mean": (0.5, float("nan"), 0.5)}, r"mean=\[0.5, nan, 0.5\]. All of these are numbers."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_known_is_refused(changes, sentence):
    with pytest.raises(BadRequest, match=sentence):
        transform_for(preprocessing(**changes), "float32")


# --- what a user knows better -----------------------------------------------------------------------


def test_what_differs_takes_the_place_of_the_usual():
    usual = preprocessing()
    found = adapted(usual, {"mean": [0.5, 0.25, 0.125], "crop_pct": "0.5", "crop_mode": "squash"})
    assert found == preprocessing(mean=(0.5, 0.25, 0.125), crop_pct=0.5, crop_mode="squash")
    assert adapted(usual, {}) == adapted(usual, usual) == usual
    whole = preprocessing(interpolation="bilinear")
    assert adapted(usual, whole) == whole
    pixel = transform_for(adapted(usual, {"mean": [0.0] * 3, "std": [0.5] * 3}), "float32")(
        Image.new("RGB", (32, 32), "white")
    )
    assert (pixel == 2.0).all()


@pytest.mark.parametrize(
    "wanted, sentence",
    [
        ({"means": [0.5] * 3}, "Preprocessing has no 'means'. Did you mean: mean?"),
        ({"mean": [0.5] * 2}, r"no mean=\[0.5, 0.5\]: .*Means and standard deviations are three numbers"),
        ({"mean": "0.5"}, "no mean='0.5': Input should be a valid tuple"),
        ({"mean": ["a", "0.5", "0.5"]}, r"no mean=\['a', '0.5', '0.5'\]: Input should be a valid number"),
        ({"crop_pct": "all"}, "no crop_pct='all': Input should be a valid number"),
        ({"crop_pct": 0}, "crop_pct=0.0 and"),
        ({"interpolation": "random"}, "cannot be resized by interpolation='random'"),
        ({"crop_mode": "corner"}, "cannot be cropped by crop_mode='corner'"),
        (
            {"mean": [123.675, 116.28, 103.53]},
            r"mean=\[123.675, 116.28, 103.53\] and std=.* are not those of pixels from 0 to 1. Divide by 255",
        ),
        (
            {"input_size": [3, 48, 48]},
            r"input_size=\[3, 48, 48\], which is not its to say: the model takes \(3, 32, 32\).",
        ),
        (
            preprocessing(input_size=(3, 48, 48)),
            r"input_size=\(3, 48, 48\), .* the model takes \(3, 32, 32\).*--img-size",
        ),
        (["mean"], "preprocessing is a list, not a preprocessing"),
        ({"crop_pct": 9}, "crop_pct=9 is not the share .* not a percentage"),
        ({"crop_pct": 90}, "crop_pct=90.0: nothing would be left of them.*share"),
        ({"crop_pct": 0.01}, "crop_pct=0.01 is not the share"),
        ({"crop_pct": 200}, "crop_pct=200.0: nothing would be left of them"),
        ({"std": [58, 57, 57]}, r"std=\[58.0, 57.0, 57.0\] are not those of pixels from 0 to 1"),
    ],
)
def test_what_no_picture_can_be_prepared_by_is_refused(wanted, sentence):
    with pytest.raises(BadRequest, match=sentence):
        adapted(preprocessing(), wanted)
