"""Photographs: distinct, deterministic crops; folders; files that are no images."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from ztp_deploy.defaults import CHECK_IMAGES
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.images import load_images, photograph_crops
from ztp_deploy.preprocessing import open_image


@pytest.fixture(scope="module")
def preprocessing():
    return tiny.model().source.preprocessing


def test_the_default_crops_are_distinct_and_the_same_everywhere(preprocessing):
    images = load_images(None, preprocessing, "float32")
    assert len(images.names) == CHECK_IMAGES == 64
    assert images.pixels.shape == (64, 3, 96, 96)
    assert images.pixels.dtype == np.float32
    assert len({picture.tobytes() for picture in images.pixels}) == 64
    assert len(set(images.names)) == 64
    again = load_images(None, preprocessing, "float32")
    assert images.sha256 == again.sha256


def test_crops_stay_distinct_for_many():
    assert len(photograph_crops(300)) == 300


def test_uint8_comes_before_the_normalisation(preprocessing):
    pixels = load_images(None, preprocessing, "uint8", 2).pixels
    floats = load_images(None, preprocessing, "float32", 2).pixels
    assert pixels.dtype == np.uint8
    mean = np.array(preprocessing.mean, np.float32).reshape(1, 3, 1, 1)
    std = np.array(preprocessing.std, np.float32).reshape(1, 3, 1, 1)
    np.testing.assert_allclose((pixels.astype(np.float32) / 255 - mean) / std, floats, atol=1e-6)


def test_a_folder_is_sampled_evenly_with_its_sub_folders(preprocessing, tmp_path):
    for index in range(10):
        folder = tmp_path / f"class{index % 2}"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (120, 100), (index * 20, 0, 0)).save(folder / f"{index}.png")
    for name in (".hidden", "Thumbs.db", "class0/desktop.ini"):
        (tmp_path / name).write_text("not an image, not looked at")
    images = load_images(tmp_path, preprocessing, "uint8", 4)
    assert len(images.names) == 4
    assert {name.split("/")[0] for name in images.names} == {"class0", "class1"}
    assert "4 of 10" in images.origin
    assert len(load_images(tmp_path, preprocessing, "uint8").names) == 10


@pytest.mark.parametrize("number, shared", [(1, 1), (4, 4), (5, 3), (7, 1), (8, 0), (20, 0)])
def test_calibration_takes_other_images_than_the_check_and_never_only_a_few(preprocessing, tmp_path, number, shared):
    for index in range(number):
        Image.new("RGB", (120, 100), (index, 0, 0)).save(tmp_path / f"{index:02}.png")
    checked = load_images(tmp_path, preprocessing, "uint8", 4)
    fitted = load_images(tmp_path, preprocessing, "uint8", 4, purpose="calibration")
    assert len(fitted.names) == len(set(fitted.names)) == min(number, 4)
    assert len(set(fitted.names) & set(checked.names)) == fitted.shared == shared
    assert checked.shared == 0


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_colour_mode_becomes_rgb(mode, tmp_path):
    suffix = ".tiff" if mode in ("CMYK", "I;16") else ".png"
    picture = Image.new(mode, (20, 30))
    picture.save(tmp_path / f"a{suffix}")
    opened = open_image(tmp_path / f"a{suffix}")
    assert opened.mode == "RGB"
    assert opened.size == (20, 30)


def test_sixteen_bit_greys_are_scaled(tmp_path):
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png"))[..., 0], values >> 8)
    Image.new("F", (5, 5)).save(tmp_path / "a.tiff")
    with pytest.raises(BadRequest, match="F pixels"):
        open_image(tmp_path / "a.tiff")


def test_what_is_no_image_is_named(preprocessing, tmp_path):
    with pytest.raises(BadRequest, match="not a folder"):
        load_images(tmp_path / "missing", preprocessing, "uint8")
    with pytest.raises(BadRequest, match="holds no images"):
        load_images(tmp_path, preprocessing, "uint8")
    Image.new("RGB", (50, 50)).save(tmp_path / "good.png")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(BadRequest, match=r"notes\.txt"):
        load_images(tmp_path, preprocessing, "uint8")
    (tmp_path / "notes.txt").rename(tmp_path / "notes.jpg")
    with pytest.raises(BadRequest, match=r"notes\.jpg is not an image"):
        load_images(tmp_path, preprocessing, "uint8")
    Image.effect_noise((300, 300), 90).save(tmp_path / "notes.jpg")
    whole = (tmp_path / "notes.jpg").read_bytes()
    (tmp_path / "notes.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadRequest, match=r"notes\.jpg cannot be read"):
        load_images(tmp_path, preprocessing, "uint8")
    with pytest.raises(BadRequest, match="no file"):
        open_image(tmp_path / "nothing.png")
    with pytest.raises(BadRequest, match="at least 1"):
        load_images(None, preprocessing, "uint8", 0)
