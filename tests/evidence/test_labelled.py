"""Labelled pictures: folders and CSV files, how labels become class indices, and what is refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

from tests import tiny
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence import labelled
from ztp_deploy.evidence.labelled import Labelled, batches, check_readable, class_indices, read_labelled
from ztp_deploy.preprocessing import open_image, transform_for
from ztp_deploy.source import Preprocessing

IMAGENET = tuple(timm.data.ImageNetInfo().label_descriptions())
ANIMALS = ("tench, Tinca tinca", "crane", "house finch, linnet", "crane")


def picture(path, size=(40, 30), colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


# --- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, classes, labels, expected, words",
    [
        (["0", "7", "12"], 20, None, [0, 7, 12], "class indices"),
        (["0", "007"], 8, ANIMALS, [0, 7], "class indices"),
        (["Tench", "house_finch"], 4, ANIMALS, [0, 2], "the model's class names"),
        (["HOUSE FINCH, linnet", "tench, tinca tinca"], 4, ANIMALS, [2, 0], "the model's class names"),
        (["n01440764", "n15075141"], 1000, IMAGENET, [0, 999], "WordNet ids"),
        (["goldfish", "toilet_tissue"], 1000, IMAGENET, [1, 999], "the model's class names"),
        (["bee", "ant", "cow"], 3, None, [1, 0, 2], "sorted order"),
        (["n01440764", "n01443537"], 2, None, [0, 1], "sorted order"),
        (["bee", "ant"], 2, ("one", "two"), [1, 0], "sorted order"),
    ],
)
def test_labels_become_indices(names, classes, labels, expected, words):
    index, mapping = class_indices(names, classes, labels)
    assert [index[name] for name in names] == expected
    assert words in mapping


def test_classes_that_are_called_by_numbers_are_meant_by_their_names():
    """A file of names in the order of `ImageFolder`, which sorts texts."""
    called = sorted(map(str, range(12)))
    index, mapping = class_indices(called, 12, called)
    assert (index["10"], index["2"]) == (2, 4)
    assert mapping == "Labels were matched to the model's class names."
    in_order = [str(number) for number in range(12)]
    assert class_indices(in_order, 12, in_order)[1] == "Labels are class indices."
    with pytest.raises(BadRequest, match="the model's class names, but '0' is none of them"):
        class_indices(["0", "3"], 12, ["3", "cat", *map(str, range(20, 30))])  # "3" is what class 0 is called


@pytest.mark.parametrize(
    "names, classes, labels, words",
    [
        (["0", "ant"], 10, None, "class indices, but 'ant' is none"),
        (["0", "ant", "bee"], 3, None, r"'ant' \(and 1 more\) is none"),
        (["0", "10"], 10, None, "Label 10 is out of range: the classes are 0 to 9"),
        (["1", "01"], 10, None, "'1' and '01' are the same class, 1"),
        (["tench", "tenhc"], 4, ANIMALS, "the model's class names, but 'tenhc' is none of them.*Nearest: tench"),
        (["tench", "crane"], 4, ANIMALS, "'crane' may be any of the classes 1, 3"),
        (["tench", "Tench"], 4, ANIMALS, "same class, 0"),
        (["n01440764", "n99999999"], 1000, IMAGENET, "WordNet ids.*but 'n99999999' is none"),
        (["n01440764", "tabby"], 1000, IMAGENET, "the model's class names, but 'n01440764' is none"),
        (["n01440764", "what"], 1000, IMAGENET, "WordNet ids.*but 'what' is none"),
        (
            ["ant", "bee"],
            3,
            None,
            r"'ant' \(and 1 more\): not a class of the model's \(3 classes; the data has 2\).*from 0",
        ),
        (["ant"], 1000, IMAGENET[::-1], "same|the model's own"),
        (["what"], 1000, IMAGENET, "labels or WordNet ids"),
        (["what"], 4, ANIMALS, "by the model's labels"),
    ],
)
def test_labels_that_are_refused(names, classes, labels, words):
    if names == ["ant"]:
        # ImageNet's labels in another order are not ImageNet: names still work, WordNet ids do not.
        assert class_indices(names, classes, labels)[0] == {"ant": 999 - 310}
        names = ["n01440764"]
        words = "not a class of the model's"
    with pytest.raises(BadRequest, match=f"(?s){words}"):
        class_indices(names, classes, labels)


# --- folders ------------------------------------------------------------------------------------


def test_a_folder_with_a_sub_folder_a_class(tmp_path):
    for name in ("2/b.png", "2/deep/a.png", "0/c.PNG", "2/.hidden", ".git/x.txt"):
        path = tmp_path / name
        if path.suffix.lower() == ".png":
            picture(path)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text("not looked at")
    data = read_labelled(tmp_path, 3, None)
    assert data.names == ("0/c.PNG", "2/b.png", "2/deep/a.png")
    assert data.labels.tolist() == [0, 2, 2]
    assert data.labels.dtype == np.int64
    assert data.origin == f"3 images of 2 classes in {tmp_path.name}"
    again = read_labelled(str(tmp_path), 3, None)
    assert again.sha256 == data.sha256
    (tmp_path / "2").rename(tmp_path / "1")
    assert read_labelled(tmp_path, 3, None).sha256 != data.sha256


def test_what_a_system_leaves_in_folders_is_passed_over_at_every_level(tmp_path):
    picture(tmp_path / "0" / "a.png")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "0/Thumbs.db", "0/Desktop.ini"):
        (tmp_path / name).write_text("the system's")
    assert read_labelled(tmp_path, 2, None).names == ("0/a.png",)


def test_the_hash_is_of_the_data_and_not_of_its_place(tmp_path):
    for root in ("a", "b"):
        picture(tmp_path / root / "0" / "x.png")
    one, other = (read_labelled(tmp_path / root, 2, None) for root in ("a", "b"))
    assert one.sha256 == other.sha256
    picture(tmp_path / "b" / "0" / "x.png", size=(400, 300))
    assert read_labelled(tmp_path / "b", 2, None).sha256 != one.sha256


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(BadRequest, match="neither a folder nor a file"):
        read_labelled(tmp_path / "missing", 3, None)
    with pytest.raises(BadRequest, match="holds no sub-folders"):
        read_labelled(tmp_path, 3, None)
    picture(tmp_path / "0" / "a.png")
    (tmp_path / "1").mkdir()
    with pytest.raises(BadRequest, match=r"/1 holds no images\. Fill it"):
        read_labelled(tmp_path, 3, None)
    (tmp_path / "1" / "notes.txt").write_text("x")
    (tmp_path / "1" / "other.txt").write_text("x")
    with pytest.raises(BadRequest, match=r"notes\.txt \(and 1 more\) in --data: no image's name"):
        read_labelled(tmp_path, 3, None)
    picture(tmp_path / "loose.png")
    with pytest.raises(BadRequest, match=r"loose\.png in --data belongs to no class"):
        read_labelled(tmp_path, 3, None)


# --- CSV files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["", "file,label\n", "\ufeffFile, Label\n"])
def test_a_csv_file_with_or_without_its_header(tmp_path, head):
    outside = picture(tmp_path / "elsewhere" / "c.png")
    picture(tmp_path / "set" / "a.png")
    picture(tmp_path / "set" / "in" / "b, c.png")
    listing = tmp_path / "set" / "list.csv"
    listing.write_text(f'{head}a.png,1\n"in/b, c.png",0\n\n{outside},1\n', encoding="utf-8")
    data = read_labelled(listing, 2, None)
    assert data.names == ("a.png", "in/b, c.png", "c.png")
    assert data.labels.tolist() == [1, 0, 1]
    assert "3 images of 2 classes in list.csv" in data.origin


def test_a_csv_file_may_name_labels(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "list.csv").write_text('a.png,"Tench, Tinca tinca"\nb.png,house finch\n')
    assert read_labelled(tmp_path / "list.csv", 4, ANIMALS).labels.tolist() == [0, 2]


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "lists no images"),
        ("file,label\n", "lists no images"),
        ("label,file\n1,a.png\n", "has the columns label,file"),
        ("a.png\n", "Line 1 of .* is 'a.png'"),
        ("a.png;1\n", "one comma between"),
        ("a.png,1,2\n", "Line 1 of"),
        ("a.png,1\nb.png,\n", "Line 2 of"),
        ("path,class\na.png,1\n", r"no file .*path \(line 1\).*header can only be file,label"),
        ("a.png,1\nx.png,1\ny.png,0\n", r"no file .*x\.png \(line 2\) \(and 1 more\)"),
        ("a.png,1\n./a.png,0\n", "listed twice, again in line 2"),
        ("a.png,2\n", "Label 2 is out of range"),
        ("a.png,cat\n", "not a class of the model's"),
    ],
)
def test_csv_files_that_are_refused(tmp_path, text, words):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(BadRequest, match=f"(?s){words}"):
        read_labelled(tmp_path / "list.csv", 2, None)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "list.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadRequest, match="no CSV file in UTF-8"):
        read_labelled(tmp_path / "list.csv", 2, None)


# --- pictures -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Labelled:
    """Pictures of several sizes and modes, larger and smaller than the model's."""
    root = tmp_path_factory.mktemp("several")
    generator = np.random.default_rng(0)
    sizes = [(96, 96), (500, 375), (80, 300), (33, 41), (110, 96), (109, 110), (640, 97)]
    for index, (width, height) in enumerate(sizes):
        noise = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        (root / "0").mkdir(exist_ok=True)
        image.convert("L" if index == 2 else "RGB").save(root / "0" / f"{index}.{'jpg' if index % 2 else 'png'}")
    return read_labelled(root, 10, None)


@pytest.mark.parametrize("change", [{}, {"crop_pct": 0.95, "interpolation": "bilinear"}, {"crop_mode": "squash"}])
def test_preprocessing_is_timms_own_to_the_bit(several, change):
    """In the classifier's order: `resolve_data_config`, `create_transform`, PIL's RGB."""
    preprocessing = Preprocessing(**{**tiny.model().source.preprocessing.model_dump(), **change})
    assert preprocessing.input_size == (3, 96, 96)
    config = timm.data.resolve_data_config(preprocessing.model_dump())
    theirs = timm.data.create_transform(**config, is_training=False)
    expected = torch.stack([theirs(Image.open(file).convert("RGB")) for file in several.files]).numpy()
    [found] = batches(several, transform_for(preprocessing, "float32"), 7, workers=3)
    assert found.dtype == np.float32
    assert found.tobytes() == expected.tobytes()


def test_batches_come_in_order_whatever_the_workers(several):
    transform = transform_for(tiny.model().source.preprocessing, "uint8")
    whole = np.stack([transform(open_image(file)) for file in several.files])
    for workers in (1, 4):
        parts = list(batches(several, transform, 3, workers))
        assert [len(part) for part in parts] == [3, 3, 1]
        assert np.concatenate(parts).tobytes() == whole.tobytes()
    assert np.concatenate(list(batches(several, transform, 3, 2, first=3))).tobytes() == whole[3:].tobytes()
    assert list(batches(several, transform, 3, 2, first=7)) == []


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "broken.png").write_bytes(b"no image")
    data = read_labelled(tmp_path, 2, None)
    with pytest.raises(BadRequest, match=r"broken\.png"):
        list(batches(data, transform_for(tiny.model().source.preprocessing, "uint8"), 3, 2))


def test_pictures_that_cannot_be_read_are_found_without_a_run(several, tmp_path, monkeypatch):
    """Whole JPEG and PNG files are not even decoded."""
    shutil.copytree(several.files[0].parent, tmp_path / "0")
    monkeypatch.setattr(labelled, "_TOGETHER", 2)
    seen: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(labelled, "open_image", lambda file: pytest.fail(f"{file} was decoded"))
        check_readable(read_labelled(tmp_path, 10, None), 2, seen.append)
    assert seen == [2, 2, 2, 1]
    whole = {name: (tmp_path / "0" / name).read_bytes() for name in ("0.png", "1.jpg", "3.jpg", "4.png")}
    # What ends strangely but can be read is no fault.
    (tmp_path / "0" / "1.jpg").write_bytes(whole["1.jpg"] + bytes(7))
    (tmp_path / "0" / "4.png").write_bytes(whole["4.png"][:-2])
    for kind in ("bmp", "webp"):
        picture(tmp_path / "0" / f"x.{kind}")
    check_readable(read_labelled(tmp_path, 10, None), 2)
    (tmp_path / "0" / "3.jpg").write_bytes(whole["3.jpg"][:-100])
    with pytest.raises(BadRequest, match=r"0/3\.jpg cannot be read: image file is truncated"):
        check_readable(read_labelled(tmp_path, 10, None), 2)
    flipped = bytearray(whole["0.png"])
    flipped[len(flipped) // 2] ^= 255
    (tmp_path / "0" / "0.png").write_bytes(flipped)
    Image.fromarray(np.zeros((9, 9), np.int32)).save(tmp_path / "0" / "grey.tif")
    (tmp_path / "0" / "x.bmp").write_bytes((tmp_path / "0" / "x.bmp").read_bytes()[:-9])
    (tmp_path / "0" / "y.jpg").write_bytes(b"")
    names = [str(tmp_path / "0" / name) for name in ("0.png", "3.jpg", "grey.tif", "x.bmp", "y.jpg")]
    with pytest.raises(BadRequest) as refused:
        check_readable(read_labelled(tmp_path, 10, None), 2)
    assert refused.value.problem == f"5 of 11 pictures cannot be read: {', '.join(names)}."
    monkeypatch.setattr(labelled, "_NAMED", 1)
    with pytest.raises(BadRequest, match=r"0\.png \(and 4 more\)\. Take them out"):
        check_readable(read_labelled(tmp_path, 10, None), 2)
