"""`ztp show` as it is typed: what it writes, says and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests import tiny
from tests.commands import typed
from ztp_deploy import backends, models
from ztp_deploy.errors import BadRequest, WriteFailed
from ztp_deploy.evidence.images import photograph_crops
from ztp_deploy.show.draw import picture_paths


@pytest.fixture
def ztp(monkeypatch, capsys, tmp_path):
    """Runs a command in an empty folder with two photographs; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    # Small models, so that the command takes no time.
    load_model, describe = models.load_model, models.describe
    monkeypatch.setattr(
        models,
        "load_model",
        lambda name, weights="auto", size=None, *more: load_model(name, weights, size or tiny.SIZE, *more),
    )
    monkeypatch.setattr(models, "describe", lambda name, size=None: describe(name, size or tiny.SIZE if isinstance(name, str) else None))  # fmt: skip
    for name, crop in zip(("one.png", "two.jpg"), photograph_crops(2).values(), strict=True):
        crop.save(name)

    def run(*arguments):
        return typed(monkeypatch, capsys, *arguments)

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
        (("one.png", "--engine", "nowhere"), ("not an engine folder",)),
        (("three.png", *MODEL), ("no file three.png",)),
        (("broken.png", *MODEL), ("broken.png", "not an image")),
        (("one.png", "deep/ONE.jpg", *MODEL), ("one.png and deep/ONE.jpg", "Rename one")),
        (("one.png", "one.png", *MODEL), ("one.png and one.png",)),
        (("one.png", "-m", "deit_t"), ("exactly one",)),
        (("one.png", "-m", "deit_t", "--method", "dense"), ("keeps every token", "ratio below 1")),
        (("one.png", "-m", "deit_t", "-r", 1.0), ("keeps every token",)),
        (("one.png", "-m", "deit_x", "-r", 0.7), ("deit_x", "deit_s")),
        (("one.png", *MODEL, "--directory", "one.png"), ("one.png is not a folder", "--directory")),
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

    root = Path(__file__).parents[2]

    def line(*variables):
        command = ["make", "-n", "--no-print-directory", "-o", ".venv/.ready", "show", "IMAGES=a.jpg b.jpg", *variables]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
        return " ".join(done.stdout.split())

    assert line("ENGINE=engines/mine") == '.venv/bin/ztp show a.jpg b.jpg --engine "engines/mine"'
    plan = '.venv/bin/ztp show a.jpg b.jpg --model "deit_s"'
    assert line("RATIO=0.5").startswith(f'{plan} --ratio "0.5"')
    assert line("RATIO=0.5", "METHOD=tome").startswith(f'{plan} --method "tome" --ratio "0.5"')


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
    from ztp_deploy.show.draw import write_picture

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
        "import sys, ztp_deploy.show.draw; "
        "print([m for m in ('onnx', 'onnxruntime', 'openvino', 'tensorrt', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
