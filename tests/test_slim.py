"""The slim runtime: engines are served where nothing that makes them is installed, with the same results."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import ztp_deploy as ztp
from tests import slim, tiny
from tests.commands import typed
from ztp_deploy import extras
from ztp_deploy.cli.app import COMMANDS
from ztp_deploy.evidence.selftest import write_selftest
from ztp_deploy.manifest import manifest_sha256

ONNXRUNTIME = next(
    name for name in ("onnxruntime-gpu", "onnxruntime") if name in map(slim.canonical, slim.owners()["onnxruntime"])
)
LIBRARIES = {"onnxruntime": ONNXRUNTIME, "openvino": "openvino"}
SERVING = {"inspect", "selftest", "classify", "list", "doctor"}

SERVE = """
import sys
import numpy as np
import ztp_deploy as ztp

with ztp.load_engine(engine) as session:
    pixels = session.preprocess(pictures)
    found = {"pixels": pixels, "logits": session.run(pixels)}
    for kind, stages in (("kept", session.kept()), ("assignment", session.assignment())):
        found |= {f"{kind}_{number}": tokens for number, tokens in enumerate(stages, start=1)}
    repeated = ztp.repeat_selftest(session)
    found["selftest"] = np.array([repeated.images, repeated.worst_logit])
    try:
        session.run(pixels[:, :2])
    except ztp.BadRequest as error:
        found["refused"] = np.array(str(error))
np.savez(results, **found)
"""
COMMANDS_TYPED = """
import contextlib, io, json, sys
from ztp_deploy.cli.app import main

found = {}
for words in lines:
    sys.argv, out, err = ["ztp", *words], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            found[words[0]] = [ended.code or 0, out.getvalue(), err.getvalue()]
print(json.dumps(found))
"""


def commands(*lines: list[str], library: str = ONNXRUNTIME) -> dict[str, list]:
    """By its first word, how a line of `ztp` ends in the slim process: exit code, stdout and stderr."""
    ended = slim.run(COMMANDS_TYPED, library, lines=lines)
    assert (ended.code, ended.err) == (0, "")
    return json.loads(ended.out)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A colour, a grey, a transparent and a palette picture."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 211, 4), dtype=np.uint8))
    kinds = {"RGB": "jpg", "L": "png", "RGBA": "png", "P": "png"}
    for mode, ending in kinds.items():
        (noise if mode == "RGBA" else noise.convert("RGB").convert(mode)).save(folder / f"{mode}.{ending}")
    return [str(folder / f"{mode}.{ending}") for mode, ending in kinds.items()]


@pytest.fixture(scope="module", params=LIBRARIES)
def served(request, tmp_path_factory):
    """An engine with a recorded run, and the package of its library."""
    made = request.getfixturevalue({"onnxruntime": "shared_engine", "openvino": "openvino_engine"}[request.param])
    folder = tmp_path_factory.mktemp("served") / request.param
    shutil.copytree(made.directory, folder)
    write_selftest(folder, tiny.images(2))
    return folder, LIBRARIES[request.param]


def test_an_engine_is_served_as_where_it_was_made(served, pictures, tmp_path):
    engine, library = served
    names = {"engine": str(engine), "pictures": pictures}
    ended = slim.run(SERVE, library, **names, results=tmp_path / "slim.npz")
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    exec(compile(SERVE, "here", "exec"), {**names, "results": tmp_path / "here.npz"})  # noqa: S102
    with np.load(tmp_path / "slim.npz") as without, np.load(tmp_path / "here.npz") as here:
        assert set(without) == set(here)
        assert here["logits"].shape == (4, 10)
        assert {"kept_3", "assignment_3", "refused"} <= set(here)
        for name in here:
            assert (without[name].dtype, without[name].tobytes()) == (here[name].dtype, here[name].tobytes()), name


def test_commands_say_the_same(served, pictures, monkeypatch, capsys):
    engine, library = served
    for options in ([], ["--json"]):
        lines = [
            [*words, "--engine", str(engine), *options]
            for words in (["classify", *pictures], ["selftest"], ["inspect"])
        ]
        found = commands(*lines, library=library)
        for words in lines:
            code, out, err = typed(monkeypatch, capsys, *words)
            assert found[words[0]][:2] == [code, out] == [0, out]
            assert out
            assert "torch" not in err + found[words[0]][2]


def test_the_requirements_are_what_serving_imports(served, pictures, tmp_path):
    """Every package that the runtime's own code imports is required, and it imports every one that is required."""
    engine, library = served
    python = slim.run(SERVE, library, engine=engine, pictures=pictures, results=tmp_path / "slim.npz")
    command = slim.run(COMMANDS_TYPED, library, lines=[["classify", *pictures, "--engine", str(engine)]])
    imported = set().union(*(slim.owners()[module] for module in python.imported | command.imported))
    assert imported - {library} == slim.BASE
    assert library in imported


def test_what_is_not_required_cannot_be_imported():
    """Of the process that the other tests rely on."""
    for module in (*extras.BUILD_MODULES, "nncf", "openvino", "onnxruntime"):
        ended = slim.run(f"import {module}")
        assert (ended.code, f"No module named '{module}'" in ended.err) == (1, True)
    hidden = slim.run("from ztp_deploy import environment; print(environment.versions())", "openvino")
    assert set(eval(hidden.out)) <= {"ztp_deploy", "numpy", "openvino"}  # noqa: S307
    assert slim.run("import numpy, openvino, tomllib", "openvino").code == 0


def test_the_extra_for_making_engines_is_what_is_asked_for():
    packages = {slim.canonical(wanted) for wanted in slim.PROJECT["optional-dependencies"]["build"]}
    packages -= {"onnxruntime", "onnxruntime-gpu"}
    assert set().union(*(slim.owners()[module] for module in extras.BUILD_MODULES)) == packages
    assert extras.lacking() is None


def test_names_that_cannot_be_had_are_not_there():
    code = (
        "import ztp_deploy as ztp; print(hasattr(ztp, 'build'), hasattr(ztp, 'load_engine'), getattr(ztp, 'prune', 7))"
    )
    assert slim.run(code).out == "False True 7\n"


@pytest.mark.parametrize("present, said", [(True, "pip uninstall onnxruntime; pip"), (False, "pip")])
def test_the_extra_is_not_laid_over_another_onnxruntime(present, said, monkeypatch):
    def version(name):
        if not present:
            raise extras.PackageNotFoundError(name)
        return "1.31.1"

    monkeypatch.setattr(extras, "version", version)
    monkeypatch.setattr(extras.sys, "platform", "linux")
    monkeypatch.setattr(extras.platform, "machine", lambda: "x86_64")
    assert extras.install() == f'{said} install "ztp_deploy[build]"'
    monkeypatch.setattr(extras.platform, "machine", lambda: "aarch64")
    assert extras.install() == 'pip install "ztp_deploy[build]"'  # there it is the same package


NAMES = """
import json, sys
import ztp_deploy as ztp

found = {}
for name in ztp.__all__:
    try:
        getattr(ztp, name)
    except ztp.MissingSoftware as error:
        found[name] = [str(error), error.exit_code]
print(json.dumps(found))
"""


def test_what_makes_engines_is_refused_in_one_sentence():
    ended = slim.run(NAMES)
    refused = json.loads(ended.out)
    assert ended.err == ""
    assert set(ztp.__all__) - set(refused) == set(ztp._SERVING)
    assert {"load_model", "export", "build", "check_parity"} <= set(refused)
    for name, (sentence, code) in refused.items():
        assert sentence == (
            f"ztp.{name} needs torch, which is not installed here: serving engines does without it. "
            'pip install "ztp_deploy[build]"'
        )
        assert code == 3


ASKED = {
    "plan": "-m deit_t -r 0.7",
    "export": "-m deit_t -r 0.7",
    "build": "--artifact ARTIFACT",
    "check": "--engine ENGINE",
    "bench": "-m deit_t -r 0.7",
    "compare": "-m deit_t -r 0.7",
    "engine": "-m deit_t -r 0.7",
    "demo": "",
    "eval": "--engine ENGINE --data .",
    "report": "--engine ENGINE",
    "tune": "-m deit_t --images . --budget flops=0.6",
    "gpu-report": "--device cpu",
    "show": "PICTURE --engine ENGINE",
}


def test_every_command_is_tried_without_what_makes_engines():
    assert set(ASKED) == set(COMMANDS) - SERVING


def test_a_command_that_makes_engines_is_refused_in_one_sentence(
    shared_engine, artifact, pictures, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    places = {"ENGINE": shared_engine.directory, "ARTIFACT": artifact.directory, "PICTURE": pictures[0]}
    lines = {command: [str(places.get(word, word)) for word in words.split()] for command, words in ASKED.items()}
    for command, (code, out, err) in commands(*([command, *words] for command, words in lines.items())).items():
        assert (code, out) == (3, ""), command
        sentence = err.splitlines()[-1]
        if "needs torch" in sentence:
            assert re.search(rf"`ztp {command}` needs torch|ztp\.\w+ needs torch|Back end", sentence), sentence
        assert err.count("error: ") == 1, err
        assert sentence.startswith("error: "), err
        assert "which is not installed here: serving engines does without it." in sentence, command
        assert sentence.endswith(' pip install "ztp_deploy[build]"'), command
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_an_import_is_no_refusal():
    for code, told in (("import torch", True), ("import no_such_module", False), ("import json.nothing", False)):
        wrapped = f"from ztp_deploy.entrypoint import run_and_exit\ndef do():\n    {code}\nrun_and_exit(do)"
        ended = slim.run(wrapped)
        assert (ended.code, "Traceback" in ended.err) == ((3, False) if told else (70, True))


def test_the_command_line_starts_and_tells_what_it_lacks():
    found = commands(["--help"], ["--version"], ["list", "--json"], ["doctor", "--json"])
    assert [code for code, _, _ in found.values()] == [0] * 4
    assert "selftest" in found["--help"][1]
    assert found["--version"][1] == f"ztp {ztp.__version__}\n"
    _, listed, lacks = found["list"]
    status = {entry["name"]: entry["status"] for entry in json.loads(listed)["backends"]}
    assert status["onnxruntime"] == "OK"
    assert status["torchscript"] == "missing: pip install torch"
    assert set(json.loads(listed)) == {"backends"}
    assert "torch is not installed here" in " ".join(lacks.split())
    facts = json.loads(found["doctor"][1])
    assert facts["making engines"] == 'missing torch: pip install "ztp_deploy[build]"'
    assert "torch" not in facts["machine"]["packages"]
    assert facts["would use"]["openvino"] == "missing: pip install openvino"


@pytest.mark.parametrize("library", ["torchscript", "aotinductor", "openvino", "onnxruntime"])
def test_a_library_that_is_not_here_is_named(library, shared_engine, tmp_path):
    engine = tmp_path / "engine"
    shutil.copytree(shared_engine.directory, engine)
    tiny.reseal(engine, backend=library)
    package = {"torchscript": "torch", "aotinductor": "torch"}.get(library, library)
    said = f"MissingSoftware Back end {library} needs {package}, which is not installed. pip install {package}\n"
    assert slim.run(slim.LOAD, engine=engine).out == said


def test_torchscript_needs_torch_alone(torchscript_engine):
    ended = slim.run(slim.LOAD, "torch", engine=torchscript_engine.directory)
    assert (ended.code, ended.out, ended.err) == (0, "", "")


def test_warnings_come_without_torch(shared_engine, tmp_path):
    engine = tmp_path / "engine"
    shutil.copytree(shared_engine.directory, engine)
    tiny.reseal(engine, backend_version="0.1")
    report = {"passed": False, "edges": [{"reference": "eager", "candidate": "engine", "faults": ["one"]}]}
    (engine / "evidence").mkdir(exist_ok=True)
    (engine / "evidence" / "parity.json").write_text(json.dumps(report | {"manifest_sha256": manifest_sha256(engine)}))
    version, parity = slim.run(slim.LOAD, ONNXRUNTIME, engine=engine).out.splitlines()
    assert version.startswith(f"UserWarning {engine} was built and checked with onnxruntime 0.1; this is")
    assert version.endswith(f"Run `ztp check --engine {engine}`.")
    assert parity.startswith(f"ParityWarning {engine} (fp32) failed its last parity check between eager and engine")
