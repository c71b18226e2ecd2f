"""Zero-TPrune's stage as OpenVINO's operator: its numbers, which stages it takes, what is listed and refused."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import openvino
import pytest
import torch
from openvino.utils.node_factory import NodeFactory

import ztp_deploy as ztp
from tests import tiny
from ztp_deploy import environment
from ztp_deploy.backends.openvino import backend, ir
from ztp_deploy.backends.openvino import stage as stages
from ztp_deploy.errors import BadRequest, DamagedFiles, MissingSoftware
from ztp_deploy.methods import zero_tprune
from ztp_deploy.plan import Stage

HEADS, WIDTH = 3, 40
"""Of a made-up attention and its keys; a width that no vector divides."""
HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def needs_compiler():
    if shutil.which("g++") is None:
        pytest.skip("needs g++ (apt-get install g++)")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    needs_compiler()
    directory = tmp_path_factory.mktemp("library")
    assert stages.compile_library(directory)
    return directory / stages.LIBRARY_FILE


@pytest.fixture(scope="module")
def compiled(artifact, tmp_path_factory):
    needs_compiler()
    directory = tmp_path_factory.mktemp("compiled") / "engine"
    return ztp.build(artifact, "openvino", batch=(1, 4, 8), settings={"stage": "compiled"}, directory=directory)


def tensor(values, kind):
    if kind == "f32":
        return openvino.Tensor(np.ascontiguousarray(values))
    made = openvino.Tensor(openvino.Type.bf16, openvino.Shape(values.shape))
    np.frombuffer(made.data, np.uint16).reshape(values.shape)[...] = values.view(np.uint32) >> 16
    return made


def run_operator(library, attention, keys, numbers, kind="f32"):
    """The operator alone: row sums and report."""
    core = openvino.Core()
    core.add_extension(str(library))
    factory = NodeFactory()
    factory.add_extension(str(library))
    inputs = [
        openvino.op.Parameter(getattr(openvino.Type, kind), openvino.Shape(value.shape)) for value in (attention, keys)
    ]
    operator = factory.create(stages.OPERATOR, [value.output(0) for value in inputs], numbers)
    compiled = core.compile_model(
        openvino.Model(operator.outputs(), inputs), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    found = compiled([tensor(attention, kind), tensor(keys, kind)])
    return found[0].copy(), found[1][..., 0].copy()


def held(values, kind):
    """float32 values that the type holds."""
    if kind == "f32":
        return values
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


def taken_apart(report, kept, scores):
    """Kept slots and scores by name, of a report: spreads, slots, other scores."""
    spreads = {name: score for name, score in scores.items() if score.dim() == 3}
    others = {name: score for name, score in scores.items() if score.dim() == 2}
    sizes = [*(s[0].numel() for s in spreads.values()), kept, *(s[0].numel() for s in others.values())]
    parts = dict(zip([*spreads, "kept", *others], np.split(report, np.cumsum(sizes)[:-1], axis=1), strict=True))
    assert sum(sizes) == report.shape[1]
    return parts.pop("kept"), parts


CASES = {
    "default": {},
    "two special": {"special": 2},
    "no special": {"special": 0, "class_token": None},
    "no S-stage": {"similar": 0},
    "no S-stage, three rounds": {"similar": 0, "rounds": 3},
    "three rounds": {"rounds": 3},
    "renormalised": {"options": {"renormalise": True}, "rounds": 3},
    "mean": {"options": {"heads": "mean"}},
    "no bounds": {"options": {"variance_bounds": None}},
    "dot": {"options": {"metric": "dot"}},
    "uniform": {"options": {"start": "uniform"}},
    "large": {"patches": 196, "similar": 29, "kept": 137, "batch": 3},
    "least": {"patches": 2, "similar": 1, "kept": 1},
}


@pytest.mark.parametrize("exponentials", [False, True])
@pytest.mark.parametrize("kind", ["f32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_the_operator_computes_what_select_does(library, case, kind, exponentials):
    compare_with_select(library, case, kind, exponentials)


@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_the_operator_compiled_for_lesser_processors(processor, tmp_path, monkeypatch):
    """Without AMX, with vectors half as long, and with none of the compiler's knowing."""
    needs_compiler()
    needed = {"x86-64": set(), "x86-64-v3": {"avx2", "fma"}, "x86-64-v4": {"avx512f", "avx512bw", "avx512vl"}}
    if platform.machine() != "x86_64" or not needed[processor] <= environment.instruction_flags():
        return  # nothing below this processor to compile for
    flags = [f"-march={processor}" if flag == "-march=native" else flag for flag in stages._FLAGS]
    monkeypatch.setattr(stages, "_FLAGS", (*flags, "-Werror", "-Wno-psabi"))
    stages.compile_library(tmp_path)
    for kind in ("f32", "bf16"):
        for exponentials in (False, True):
            compare_with_select(tmp_path / stages.LIBRARY_FILE, "large", kind, exponentials)


def compare_with_select(library, case, kind, exponentials):
    """The operator on made-up attention and keys against the method's own `select`."""
    given = {"patches": 37, "similar": 7, "kept": 20, "batch": 2, "special": 1, "rounds": 1, "class_token": 0}
    given |= CASES[case]
    options = zero_tprune.Options(**given.get("options", {}))
    patches, special = given["patches"], given["special"]
    tokens, batch = patches + special, given["batch"]
    random = np.random.default_rng(0)
    raw = np.exp(random.standard_normal((batch, HEADS, tokens, tokens + exponentials))).astype(np.float32)
    if not exponentials:
        raw /= raw.sum(-1, keepdims=True)
    attention = held(raw, kind)
    keys = held(random.standard_normal((batch, tokens, WIDTH)).astype(np.float32), kind)
    stage = Stage(
        block=1,
        place="after_block",
        tokens_in=patches,
        tokens_out=given["kept"],
        static={"similar": given["similar"], "rounds": given["rounds"]},
    )
    starts = zero_tprune.Starts.of(stage, special, given["class_token"], options)
    probabilities = torch.from_numpy(attention[..., :tokens].copy())
    row_sums = probabilities.sum(-1, keepdim=True)
    if exponentials:
        probabilities = probabilities / row_sums
    features = torch.from_numpy(keys).unsqueeze(1)
    expected = zero_tprune.select(probabilities, features, stage, starts, special_tokens=special, options=options)
    bounds = options.variance_bounds or (0.0, 0.0)
    numbers = {
        "kept": given["kept"],
        "similar": given["similar"],
        "rounds": given["rounds"],
        "special": special,
        "boosted": -1 if given["class_token"] is None or options.start == "uniform" else given["class_token"],
        "renormalise": options.renormalise,
        "mean": options.heads == "mean",
        "cosine": options.metric == "cosine",
        "bounded": options.variance_bounds is not None,
        "low": bounds[0],
        "high": bounds[1],
        "exponentials": exponentials,
    }
    sums, report = run_operator(library, attention, keys, numbers, kind)
    kept, scores = taken_apart(report, given["kept"], expected.scores)
    for name, wanted in expected.scores.items():
        np.testing.assert_allclose(scores[name], wanted.flatten(1), rtol=2e-5, atol=2e-5, err_msg=name)
    assert np.array_equal(kept, expected.kept)
    if exponentials:
        np.testing.assert_allclose(sums, row_sums, rtol=1e-6)


def test_ties_go_to_the_lower_slot(library):
    """Attention that is the same for all, and keys that are the same: everything ties."""
    attention = np.full((1, HEADS, 9, 9), 1 / 9, np.float32)
    numbers = {"kept": 5, "similar": 2, "rounds": 1, "special": 1, "boosted": 0, "renormalise": False, "mean": False}
    numbers |= {"cosine": True, "bounded": True, "low": 0.01, "high": 0.7, "exponentials": False}
    _, report = run_operator(library, attention, np.ones((1, 9, WIDTH), np.float32), numbers)
    # The less important half is 4 to 7 by the ties; of it, 4 and 5 resemble the others as much as any and come first.
    assert report[0, 2 * HEADS : 2 * HEADS + 5].tolist() == [0, 1, 2, 3, 6]


def test_an_engine_with_compiled_stages_passes_parity(compiled, openvino_engine, model):
    built = compiled.manifest.built
    assert built["compiled_stages"] == "3 of 3"
    assert set(compiled.manifest.files) == {"model.bin", "model.xml", stages.LIBRARY_FILE}
    assert set(built["cpu_flags"]) <= environment.instruction_flags()
    graph = (compiled.directory / "model.xml").read_text()
    assert graph.count(f'type="{stages.OPERATOR}"') == 3
    assert 'type="TopK"' not in graph
    with ztp.load_engine(compiled.directory) as session:
        audited = session.audit(tiny.images(2))
    assert audited["spread_1"].shape == audited["pre_spread_1"].shape == (2, 3, 1)
    assert audited["pre_score_1"].shape == audited["score_1"].shape == (2, 36)
    assert audited["similarity_1"].shape == (2, 18)
    report = ztp.check_parity(compiled, model, tiny.images(6))
    assert report.edges[1].worst_logit < 1e-4
    images = tiny.images(3)
    with ztp.load_engine(compiled.directory) as new, ztp.load_engine(openvino_engine.directory) as old:
        np.testing.assert_allclose(new.run(images), old.run(images), atol=1e-4)
        for mine, its in zip(new.kept(), old.kept(), strict=True):
            assert mine.dtype == np.int32
            assert np.array_equal(mine, its)


@pytest.mark.parametrize("batch", [(1, 4, 8), 2], ids=["a range", "fixed"])
def test_in_bf16_nothing_is_converted_for_the_operator(artifact, model, tmp_path, batch):
    needs_compiler()
    wanted = {"precision": "bf16", "batch": batch, "settings": {"stage": "compiled"}, "directory": tmp_path / "e"}
    if not HAS_BF16:
        with pytest.raises(MissingSoftware, match="no instructions for it"):
            ztp.build(artifact, "openvino", **wanted)
        return
    engine = ztp.build(artifact, "openvino", **wanted)
    ztp.check_parity(engine, model, tiny.images(2))
    with ztp.load_engine(engine.directory) as session:
        audited = session.audit(tiny.images(2))
    for name in ("pre_score_1", "score_3", "similarity_2", "spread_1"):
        assert (audited[name].view(np.uint32) & 0xFFFF).any(), f"{name} went through bf16"
    core = openvino.Core()
    core.add_extension(str(engine.directory / stages.LIBRARY_FILE))
    properties = engine.manifest.built["properties"]
    compiled = core.compile_model(str(engine.directory / "model.xml"), "CPU", properties)
    notes = {}
    for operation in compiled.get_runtime_model().get_ops():
        told = {key: operation.get_rt_info()[key].astype(str) for key in ("layerType", "outputPrecisions")}
        notes[operation.get_friendly_name()] = (told, [value.get_node() for value in operation.input_values()])
    operators = [name for name, (told, _) in notes.items() if told["layerType"] == "Reference"]
    assert len(operators) == 3
    for name in operators:
        for source in notes[name][1]:
            told = notes[source.get_friendly_name()][0]
            assert told["layerType"] not in ("Convert", "Reorder")
            assert told["outputPrecisions"] == "bf16"


def test_several_streams_run_it_at_once(artifact, tmp_path):
    needs_compiler()
    precision = "bf16" if HAS_BF16 else "fp32"
    settings = {"stage": "compiled", "hint": "throughput", "streams": 2, "threads": 2}
    engine = ztp.build(artifact, "openvino", precision=precision, settings=settings, directory=tmp_path / "e")
    batches = [tiny.images(1 + number % 3, seed=number) for number in range(12)]
    with ztp.load_engine(engine.directory) as session, ThreadPoolExecutor(4) as pool:
        alone = [session.run(images) for images in batches]
        for _ in range(3):
            for one, together in zip(alone, pool.map(session.run, batches), strict=True):
                assert np.array_equal(one, together)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 3),
        ({"metric": "dot"}, 3),
        ({"temperature": 2.0}, 0),
        ({"partition": "alternate"}, 0),
        ({"metric": "manhattan"}, 0),
        ({"features": "queries"}, 0),
        ({"feature_heads": "averaged"}, 0),
    ],
)
def test_a_stage_with_other_options_stays_in_the_graph(artifact, library, options, count):
    plan = artifact.manifest.plan
    plan = plan.model_copy(update={"options": plan.options | options})
    core = openvino.Core()
    core.add_extension(str(library))
    model = core.read_model(str(artifact.directory / "model.onnx"))
    ir.fuse(model)
    assert stages.replace(model, plan, library, bf16=False) == count
    kinds = [operation.get_type_name() for operation in model.get_ops()]
    assert kinds.count(stages.OPERATOR) == count
    assert kinds.count("TopK") == 9 - 3 * count


def test_without_a_compiler_it_is_refused(artifact, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingSoftware, match="found no working compiler") as refusal:
        ztp.build(artifact, "openvino", settings={"stage": "compiled"}, directory=tmp_path / "e")
    assert refusal.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_the_compilers_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "SOURCE", tmp_path / "none.cpp")
    monkeypatch.setenv("CXX", "env g++")  # a command line, as make and CMake take it
    with pytest.raises(MissingSoftware, match=r"^g\+\+ .* does not compile .*none\.cpp: No such file"):
        stages.compile_library(tmp_path)


def test_other_methods_are_told_that_nothing_was_compiled(model, exported, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    plan = ztp.make_plan(model, "evit", ratio=0.7)
    other = exported(ztp.prune(model, plan))
    engine = ztp.build(other, "openvino", settings={"stage": "compiled"}, directory=tmp_path / "e")
    assert engine.manifest.built["compiled_stages"] == f"0 of {len(plan.stages)}"
    assert "the operator knows Zero-TPrune alone" in engine.manifest.built["notes"][-1]


@pytest.mark.parametrize("settings", [{}, {"stage": "compiled"}], ids=["model", "stage"])
def test_a_disk_that_refuses_is_said_to(settings, artifact, tmp_path):
    """Neither OpenVINO nor a compiler says that it was the disk."""
    script = f"""
import resource, sys, ztp_deploy as ztp
from ztp_deploy.exporters import load_artifact
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    ztp.build(load_artifact({str(artifact.directory)!r}), "openvino", settings={settings!r}, directory={str(tmp_path / "e")!r})
except ztp.ZtpError as error:
    print(type(error).__name__, error.problem)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("WriteFailed"), done.stdout
    assert "the disk (or its quota) is full" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_go_together_is_refused():
    for precision, settings in (("int8", {}), ("fp32", {"cache": True})):
        with pytest.raises(BadRequest, match="stage=compiled"):
            backend._check_stage(precision, backend.Settings(stage="compiled", **settings))
    backend._check_stage("bf16", backend.Settings(stage="compiled"))


def test_without_a_stage_nothing_is_compiled(model, exported, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    dense = exported(ztp.prune(model, ztp.make_plan(model, "dense")))
    engine = ztp.build(dense, "openvino", settings={"stage": "compiled"}, directory=tmp_path / "e")
    assert set(engine.manifest.files) == {"model.bin", "model.xml"}
    assert "cpu_flags" not in engine.manifest.built


def test_a_plan_that_the_operator_does_not_know_is_told(tmp_path):
    needs_compiler()
    model = tiny.model(size=tiny.SIZE.model_copy(update={"depth": 1}))
    plan = ztp.make_plan(model, ratio=0.6, sites=[1], options={"temperature": 2.0})
    artifact = ztp.export(ztp.prune(model, plan), "onnx", tmp_path / "a")
    engine = ztp.build(artifact, "openvino", settings={"stage": "compiled"}, directory=tmp_path / "e")
    assert set(engine.manifest.files) == {"model.bin", "model.xml"}
    assert engine.manifest.built["compiled_stages"] == "0 of 1"
    assert engine.manifest.built["notes"] == [
        "No stage was compiled: the operator knows Zero-TPrune alone, and not all of its options."
    ]


def test_another_processor_and_a_changed_library_are_refused(compiled, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(compiled.directory, copy)
    built = compiled.manifest.built
    tiny.reseal(copy, built={**built, "cpu_flags": [*built["cpu_flags"], "avx4096"]})
    with pytest.raises(MissingSoftware, match="compiled for a CPU with avx4096"):
        ztp.load_engine(copy)
    # What another release of OpenVINO says of the library, a file that is none makes this one say.
    (copy / stages.LIBRARY_FILE).write_bytes(b"none")
    tiny.reseal(copy, backend_version="2000.1", built=built)
    with pytest.raises(MissingSoftware, match=r"compiled for OpenVINO 2000\.1, and this one does not take them"):
        ztp.load_engine(copy)
    changed = tmp_path / "changed"
    shutil.copytree(compiled.directory, changed)
    with (changed / stages.LIBRARY_FILE).open("ab") as file:
        file.write(b"more")
    with pytest.raises(DamagedFiles):
        ztp.load_engine(changed)


def test_other_methods_have_no_such_stage():
    assert stages.replace(None, SimpleNamespace(method="evit"), None, False) == 0
