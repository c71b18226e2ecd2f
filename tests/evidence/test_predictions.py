"""Runs over labelled pictures: cut short and gone on with, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.pictures import write_pictures
from ztp_deploy.errors import BadRequest, DamagedFiles, GateFailed, WriteFailed
from ztp_deploy.evidence import predictions
from ztp_deploy.evidence.labelled import read_labelled
from ztp_deploy.evidence.predictions import Predictor, partial_file, predict
from ztp_deploy.preprocessing import transform_for


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of labelled pictures."""
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def predictor(model):
    """The tiny model in eager PyTorch."""

    def forward(images):
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    transform = transform_for(model.source.preprocessing, "float32")
    return Predictor("pruned", "eager", {"model": "tiny"}, transform, 4, forward)


def test_an_edited_picture_of_the_same_size_is_another_run(predictor, tmp_path):
    (tmp_path / "pictures").mkdir()
    data = read_labelled(write_pictures(tmp_path / "pictures"), 10, None)
    path = partial_file(tmp_path, predictor, data)
    again = replace(data)  # what a later process reads
    assert partial_file(tmp_path, predictor, again) == path
    file = data.files[3]
    file.write_bytes(file.read_bytes()[::-1])
    edited = replace(data)
    assert edited.sha256 == data.sha256
    assert partial_file(tmp_path, predictor, edited) != path


def test_a_run_goes_on_where_it_was_cut_short(predictor, pictures, tmp_path, monkeypatch):
    data = read_labelled(pictures, 10, None)
    whole, speed = predict(predictor, data, 10, workers=2)
    assert speed.images == 22
    assert speed.images_per_second == pytest.approx(22 / speed.seconds, rel=0.05)
    monkeypatch.setattr(predictions, "SAVE_EVERY", 2)
    seen = []

    def stopping(images):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(images))
        return predictor.forward(images)

    with pytest.raises(KeyboardInterrupt, match="12 of 22 images are kept"):
        predict(replace(predictor, forward=stopping), data, 10, workers=2, folder=tmp_path)
    assert seen == [4, 4, 4]
    path = partial_file(tmp_path, predictor, data)
    assert [path] == list(tmp_path.iterdir())
    steps = []
    again, speed = predict(predictor, data, 10, workers=1, folder=tmp_path, advance=steps.append)
    assert steps == [12, 4, 4, 2]
    assert speed.images == 10
    assert again.tobytes() == whole.tobytes()
    _, speed = predict(predictor, data, 10, workers=1, folder=tmp_path)  # all is there until the caller is done
    assert (speed.images, speed.images_per_second) == (0, None)
    assert partial_file(tmp_path, replace(predictor, batch=5), data) != path
    assert partial_file(tmp_path, replace(predictor, identity={"model": "other"}), data) != path


def test_a_run_that_is_killed_loses_the_last_batches_only(predictor, pictures, tmp_path, monkeypatch):
    """A picture that cannot be read ends the run like a crash would; what was written before stays good."""
    data = read_labelled(pictures, 10, None)
    monkeypatch.setattr(predictions, "SAVE_EVERY", 2)
    saved = []
    real = predictions._save
    monkeypatch.setattr(predictions, "_save", lambda *given: (saved.append(len(given[2])), real(*given)))
    predict(predictor, data, 10, workers=1, folder=tmp_path)
    assert saved == [0, 8, 16, 22]
    broken = replace(data, files=(*data.files[:9], tmp_path / "gone.png", *data.files[10:]))
    (tmp_path / "gone.png").write_bytes(b"no image")
    with pytest.raises(BadRequest, match=r"gone\.png"):
        predict(predictor, broken, 10, workers=2, folder=tmp_path)
    with np.load(partial_file(tmp_path, predictor, broken)) as left:
        assert left["logits"].shape == (8, 10)


def test_a_run_that_never_began_leaves_nothing(predictor, pictures, tmp_path):
    data = read_labelled(pictures, 10, None)

    def broken(images):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="0 of 22"):
        predict(replace(predictor, forward=broken), data, 10, workers=1, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(WriteFailed, match="could not be written"):
        predict(replace(predictor, forward=broken), data, 10, workers=1, folder=tmp_path / "taken")


def test_partial_files_of_others_are_refused(predictor, pictures, tmp_path):
    data = read_labelled(pictures, 10, None)
    path = partial_file(tmp_path, predictor, data)
    for content in (b"no npz", b""):
        path.write_bytes(content)
        with pytest.raises(DamagedFiles, match="no run that can be gone on from"):
            predict(predictor, data, 10, workers=1, folder=tmp_path)
    np.savez(path, key=np.array("another"), logits=np.zeros((4, 10), np.float32))
    with pytest.raises(DamagedFiles, match="Remove it"):
        predict(predictor, data, 10, workers=1, folder=tmp_path)


def test_logits_that_are_no_numbers_fail_the_gate(predictor, pictures):
    data = read_labelled(pictures, 10, None)

    def broken(images):
        logits = predictor.forward(images)
        logits[1, 3] = np.nan
        return logits

    with pytest.raises(GateFailed, match=rf"{data.names[1]} are NaN"):
        predict(replace(predictor, forward=broken), data, 10, workers=1)
    with pytest.raises(BadRequest, match="of 12 classes"):
        predict(predictor, data, 12, workers=1)
