"""The runner's own logic on a fake engine, and the refusals before a library is touched. Only a GPU proves the rest."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ztp_deploy as ztp
from tests import tiny
from tests.backends.tensorrt import needs_rtx
from tests.backends.tensorrt.fake_engine import FakeEngine
from ztp_deploy import backends, environment
from ztp_deploy.backends.base import Session
from ztp_deploy.backends.tensorrt import home, runtime
from ztp_deploy.backends.tensorrt.library import RTX, STANDARD, Library, forwarding_log, logger
from ztp_deploy.backends.tensorrt.runtime import Executor, TensorRTRunner
from ztp_deploy.errors import BadRequest, DamagedFiles, MissingSoftware
from ztp_deploy.manifest import BatchRange

H100 = environment.Gpu("NVIDIA H100", "9.0", 80.0)


def compute(images):
    sums = images.flatten(1).sum(1, keepdim=True)
    return sums * torch.arange(10), (sums.int() % 33 + torch.tensor([3, 2, 1, 0])).int()


def executor(engine=None, cuda_graph=False):
    return Executor(engine or FakeEngine(compute), largest=8, device="cpu", cuda_graph=cuda_graph)


@pytest.fixture
def session(shared_engine, tmp_path):
    """A session over the fake engine, with the manifest of a real one."""
    manifest = shared_engine.manifest.model_copy(update={"outputs": ("logits", "kept_1"), "audit": ()})
    runner = TensorRTRunner(executor(), executor, manifest.outputs, ())
    return Session(tmp_path, manifest, runner)


def test_outputs_are_those_of_the_images(session):
    for batch in (3, 1, 8, 3):
        images = tiny.images(batch, seed=batch)
        logits, kept = compute(torch.from_numpy(images))
        np.testing.assert_array_equal(session.run(images), logits.numpy())
        assert session.kept()[0].tolist() == kept.sort(1).values.tolist()


def test_buffers_stay_and_shapes_are_told_once():
    engine = FakeEngine(compute)
    runs = executor(engine)
    for batch in (2, 2, 2, 5, 5):
        runs.run(torch.from_numpy(tiny.images(batch)))
    [context] = engine.contexts
    assert engine.shapes_told == 2
    assert context.addresses["logits"] == runs._lanes[0].buffers["logits"].data_ptr()
    assert runs._lanes[0].buffers["logits"].shape == (8, 10)  # once, for the largest batch


def test_outputs_belong_to_the_caller():
    runs = executor()
    first = runs.run(torch.from_numpy(tiny.images(2, seed=1)))["logits"]
    before = first.clone()
    runs.run(torch.from_numpy(tiny.images(2, seed=2)))
    assert torch.equal(first, before)


def placed(images, offset):
    """The images so many bytes behind a multiple of 256."""
    memory = torch.empty(images.nelement() * 4 + 512, dtype=torch.uint8)
    start = -memory.data_ptr() % 256 + offset
    lies = memory[start : start + images.nelement() * 4].view(torch.float32).view(images.shape)
    return lies.copy_(images)


def test_the_images_are_read_where_they_lie():
    engine = FakeEngine(compute)
    images = placed(torch.from_numpy(tiny.images(2)), 0)
    executor(engine).run(images)
    assert engine.contexts[0].addresses["images"] == images.data_ptr()


def test_images_that_lie_where_tensorrt_cannot_read_are_copied():
    engine = FakeEngine(compute)
    images = placed(torch.from_numpy(tiny.images(2)), 4)
    assert torch.equal(executor(engine).run(images)["logits"], compute(images)[0])
    assert engine.contexts[0].addresses["images"] != images.data_ptr()


@pytest.mark.parametrize("name, cuda_graph", [("images", False), ("images", True), ("logits", False)])
def test_an_address_that_is_not_taken_ends_the_run(name, cuda_graph):
    engine = FakeEngine(compute)
    engine.takes_no = name
    with pytest.raises(DamagedFiles, match=f"did not take the memory for {name}"):
        executor(engine, cuda_graph).run(torch.zeros(1, 3, 96, 96))
    assert not engine.executions


def test_memory_that_was_short_once_is_asked_for_again(monkeypatch):
    engine = FakeEngine(compute)
    runs, images, empty = executor(engine), torch.from_numpy(tiny.images(2)), torch.empty
    with monkeypatch.context() as short:

        def fails(shape, **options):
            if options["dtype"] is torch.int32:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return empty(shape, **options)

        short.setattr(torch, "empty", fails)
        with pytest.raises(torch.OutOfMemoryError):
            runs.run(images)
    assert torch.equal(runs.run(images)["logits"], compute(images)[0])


def test_a_cuda_graph_per_batch_size(monkeypatch):
    """Recorded after one plain run, then replayed from buffers whose addresses never change."""
    engine = FakeEngine(compute)
    runs = executor(engine, cuda_graph=True)
    recorded = []

    def record(lane, stream):
        recorded.append(lane.context.shape[0])
        return SimpleNamespace(replay=lambda: lane.context.execute_async_v3(stream))

    monkeypatch.setattr(runs, "_record", record)
    for batch in (2, 5, 2, 5, 2):
        images = torch.from_numpy(tiny.images(batch, seed=batch))
        addresses = [dict(context.addresses) for context in engine.contexts]
        assert torch.equal(runs.run(images)["logits"], compute(images)[0])
        assert addresses == [dict(context.addresses) for context in engine.contexts][: len(addresses)]
    assert recorded == [2, 5]
    assert [context.runs for context in engine.contexts] == [3, 2]


def test_what_cannot_be_recorded_is_run_plainly_and_not_tried_again(monkeypatch):
    engine, tries = FakeEngine(compute), []

    @contextmanager
    def fails(stream):
        tries.append(stream)
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(runtime, "capture", fails)
    runs = executor(engine, cuda_graph=True)
    images = torch.from_numpy(tiny.images(2))
    with pytest.warns(UserWarning, match="without a CUDA graph, which could not be recorded: operation failed"):
        outputs = [runs.run(images)["logits"] for _ in range(3)]
    assert all(torch.equal(logits, compute(images)[0]) for logits in outputs)
    assert len(tries) == 1


RTX_RELEASES = {
    "1.7": {
        "CudaGraphStrategy": SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole"),
        "DynamicShapesKernelSpecializationStrategy": SimpleNamespace(EAGER="eager"),
    },
    "1.1": {"DynamicShapesKernelSpecializationStrategy": SimpleNamespace(EAGER="eager")},
    "1.0": {},
}


def test_the_portable_library_records_by_itself(monkeypatch):
    """A recording of ours would keep kernels that it means to replace."""
    trt = SimpleNamespace(__version__="1.7", **RTX_RELEASES["1.7"])
    monkeypatch.setattr(runtime, "capture", None)
    engine = FakeEngine(compute)
    config = runtime.portable_config(trt, engine, True)
    assert vars(config) == {
        "cuda_graph_strategy": "whole",
        "dynamic_shapes_kernel_specialization_strategy": "eager",
    }
    runs = Executor(engine, largest=8, device="cpu", cuda_graph=True, config=config)
    images = [torch.from_numpy(tiny.images(batch, seed=batch)) for batch in (2, 5, 2, 2)]
    addresses = []
    for batch in images:
        assert torch.equal(runs.run(batch)["logits"], compute(batch)[0])
        addresses.append(dict(engine.contexts[0].addresses))
    assert engine.config is config
    assert [context.runs for context in engine.contexts] == [3, 1]
    assert addresses[0] == addresses[-1]  # what it recorded is still true


@pytest.mark.parametrize("release", ["1.0", "1.1"])
def test_older_releases_of_the_portable_library_record_nothing(release):
    trt = SimpleNamespace(__version__=release, **RTX_RELEASES[release])
    assert "cuda_graph_strategy" not in vars(runtime.portable_config(trt, FakeEngine(compute), False))
    with pytest.raises(MissingSoftware, match=f"needs TensorRT-RTX 1.2 or newer; this is {release}"):
        runtime.portable_config(trt, FakeEngine(compute), True)


@needs_rtx
def test_the_portable_library_has_what_its_engines_are_run_with():
    trt = RTX.load()
    for name in ("cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"):
        assert hasattr(trt.IRuntimeConfig, name)
    assert {"WHOLE_GRAPH_CAPTURE"} <= set(trt.CudaGraphStrategy.__members__)
    assert {"EAGER"} <= set(trt.DynamicShapesKernelSpecializationStrategy.__members__)


def test_closing_waits_for_the_device():
    engine, done = FakeEngine(compute), []
    runs = executor(engine)
    runs.run(torch.zeros(1, 3, 96, 96))
    runs._stream = SimpleNamespace(synchronize=lambda: done.append(len(runs._lanes)))
    runs.close()
    assert done == [1]  # with the contexts still there
    assert not runs._lanes


def test_a_run_that_comes_after_closing_says_so(session):
    session.close()
    for late in (session._runner.run, session._runner.audit):  # as from a thread that had passed the session's check
        with pytest.raises(BadRequest, match="closed"):
            late(tiny.images(1))


def test_threads_wait_for_each_other(session):
    inside = threading.Barrier(4)

    def one(seed: int) -> bool:
        images = tiny.images(seed % 3 + 1, seed=seed)
        inside.wait()
        same = True
        for _ in range(20):
            logits = session.run(images)
            same &= np.array_equal(logits, compute(torch.from_numpy(images))[0].numpy())
            same &= session.kept()[0].shape == (len(images), 4)
        return same

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(4)))  # the fake engine refuses two runs at once


def test_tensors_come_back_as_tensors(session):
    images = torch.from_numpy(tiny.images(3))
    logits = session.run(images)
    assert isinstance(logits, torch.Tensor)
    assert torch.equal(logits, compute(images)[0])
    assert session.kept()[0].dtype == np.int32
    assert torch.equal(session.run(images.permute(0, 1, 3, 2)), compute(images.permute(0, 1, 3, 2))[0])


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(1, 3, 96, 96, dtype=torch.float64), "got float64"),
        (torch.zeros(9, 3, 96, 96), "outside this engine's range 1 to 8"),
        (torch.zeros(3, 96, 96), r"\[3, 96, 96\]"),
        (torch.zeros(1, 3, 96, 96, device="meta"), "tensors on cpu; got one on meta"),
    ],
)
def test_wrong_tensors_are_refused(session, images, message):
    with pytest.raises(BadRequest, match=message):
        session.run(images)


def test_a_closed_session_says_so(session):
    session.close()
    for images in (tiny.images(1), torch.zeros(1, 3, 96, 96)):
        with pytest.raises(BadRequest, match="closed"):
            session.run(images)
    with pytest.raises(BadRequest, match="closed"):
        session.audit(tiny.images(1))


def test_what_the_engine_refuses_is_a_sentence():
    engine = FakeEngine(compute, largest=4)
    with pytest.raises(BadRequest, match=r"takes no images of shape \[5, 3, 96, 96\]"):
        executor(engine).run(torch.zeros(5, 3, 96, 96))
    engine.fails = True
    with pytest.raises(DamagedFiles, match="could not run"):
        executor(engine).run(torch.zeros(1, 3, 96, 96))
    engine.full = True
    with pytest.raises(MissingSoftware, match="memory is short"):
        executor(engine).run(torch.zeros(1, 3, 96, 96))


class FakeLogger:
    def __init__(self) -> None:
        pass


def fake_library(deserialised, message="", monkeypatch=None):
    """A library whose runtime answers `deserialised`, complaining with `message`."""

    class Runtime:
        def __init__(self, log):
            self.log = log

        def deserialize_cuda_engine(self, data):
            if message:
                self.log.log(SimpleNamespace(name="ERROR"), message)
            return deserialised

    trt = type("fakert", (), {"ILogger": FakeLogger, "__version__": "9.9", "Runtime": Runtime})
    library = Library("fake", "fake", "FakeRT", portable=False)
    monkeypatch.setattr(Library, "load", lambda self: trt)
    return library


def test_a_plan_that_does_not_open_is_a_sentence(monkeypatch, tmp_path):
    (tmp_path / "model.plan").write_bytes(b"plan")
    library = fake_library(None, "The engine plan file is not compatible", monkeypatch)
    with pytest.raises(
        DamagedFiles, match=r"FakeRT 9\.9 cannot open .*model\.plan: The engine plan file is not compatible"
    ):
        runtime.open_engine(library, tmp_path / "model.plan", None)
    engine = object()
    assert runtime.open_engine(fake_library(engine, "", monkeypatch), tmp_path / "model.plan", None) is engine


@pytest.mark.parametrize(
    "validity, found, message",
    [
        ("INVALID", 2, r"FakeRT 9\.9 cannot run .*: it does not support the compute capability of this GPU"),
        ("INVALID", 4 | 32, "the GPU's driver is too old"),
        ("INVALID", 1, "built with another release"),
        ("INVALID", 32, None),  # damaged: the library says the rest when it opens it
        ("SUBOPTIMAL", 2, None),
    ],
)
def test_a_plan_that_is_not_for_this_machine_is_not_called_damaged(monkeypatch, tmp_path, validity, found, message):
    (tmp_path / "model.plan").write_bytes(b"plan")
    engine = object()
    library = fake_library(engine, "", monkeypatch)
    diagnostics = {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2, "OLD_CUDA_DRIVER": 4, "MALFORMED_ENGINE": 32}
    answer = SimpleNamespace(name=validity), found
    monkeypatch.setattr(library.load(), "EngineInvalidityDiagnostics", SimpleNamespace(**diagnostics), raising=False)
    monkeypatch.setattr(library.load().Runtime, "get_engine_validity", lambda self, plan: answer, raising=False)
    if message is None:
        assert runtime.open_engine(library, tmp_path / "model.plan", None) is engine
    else:
        with pytest.raises(MissingSoftware, match=message):
            runtime.open_engine(library, tmp_path / "model.plan", None)


@needs_rtx
def test_the_portable_library_can_tell_whether_a_plan_fits():
    trt = RTX.load()
    assert set(runtime._UNFIT) <= set(trt.EngineInvalidityDiagnostics.__members__)
    validity, found = trt.Runtime(logger(trt)).get_engine_validity(bytes(4096))
    assert (validity.name, found) == ("INVALID", int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE))


def test_a_plan_is_opened_on_the_first_gpu(monkeypatch, tmp_path):
    """Whichever is the thread's own: home and manifest speak of the first."""
    (tmp_path / "model.plan").write_bytes(b"plan")
    current = [1]

    @contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", device)
    library = fake_library(None, "", monkeypatch)
    monkeypatch.setattr(library.load().Runtime, "deserialize_cuda_engine", lambda self, data: current[-1])
    assert runtime.open_engine(library, tmp_path / "model.plan", None) == 0
    assert current == [1]


def test_there_is_one_logger_and_one_listener_at_a_time():
    trt = type("Module", (), {"ILogger": FakeLogger})
    outer, inner = [], []
    with forwarding_log(trt, lambda *heard: outer.append(heard)) as log:
        with forwarding_log(trt, lambda *heard: inner.append(heard)) as same:
            assert same is log is logger(trt)
            log.log(SimpleNamespace(name="WARNING"), "inside")
        log.log(SimpleNamespace(name="ERROR"), "outside")
    log.log(SimpleNamespace(name="ERROR"), "nobody")
    assert (inner, outer) == ([("warning", "inside")], [("error", "outside")])


def test_an_engines_reasons_are_its_callers_and_no_builds():
    """A build in another thread listens to the same logger, and takes its last error for its own."""
    trt = type("OtherModule", (), {"ILogger": FakeLogger})
    engine, build = FakeEngine(compute), []
    engine.complain = lambda message: logger(trt).log(SimpleNamespace(name="ERROR"), message)
    engine.fails = True
    with forwarding_log(trt, lambda *heard: build.append(heard)):
        with pytest.raises(DamagedFiles, match=r"could not run the engine: Cuda Runtime \(an illegal access\)\."):
            executor(engine).run(torch.zeros(1, 3, 96, 96))
        assert build == []
        engine.complain("the build's own")
    assert build == [("error", "the build's own")]


def test_a_library_that_does_not_start_is_a_sentence(monkeypatch, tmp_path):
    (tmp_path / "model.plan").write_bytes(b"plan")
    library = fake_library(None, "", monkeypatch)

    def fails(log):
        log.log(SimpleNamespace(name="ERROR"), "CUDA initialization failure with error: 35.")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(library.load(), "Runtime", fails)
    with pytest.raises(MissingSoftware, match=r"FakeRT cannot start: CUDA initialization failure with error: 35\."):
        runtime.open_engine(library, tmp_path / "model.plan", None)


@pytest.mark.parametrize("parses, reason", [(False, "no weights for qkv"), (True, "it gave no reason")])
def test_weights_that_do_not_fit_say_why(monkeypatch, tmp_path, parses, reason):
    (tmp_path / "model.plan").write_bytes(b"plan")
    trt = fake_library(object(), "" if parses else "no weights for qkv", monkeypatch)
    fails = SimpleNamespace(refit_from_file=lambda path: parses, refit_cuda_engine=lambda: False)
    for name in ("Refitter", "OnnxParserRefitter"):
        monkeypatch.setattr(trt.load(), name, lambda *arguments: fails, raising=False)
    with pytest.raises(DamagedFiles, match=rf"do not fit the stripped plan: {reason}\."):
        runtime.open_engine(trt, tmp_path / "model.plan", tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "here, version, settings, message",
    [
        ((), "11.4", {}, "needs an NVIDIA GPU, and none was found"),
        ((H100,), "11.3", {}, r"was built with TensorRT 11\.4; this is 11\.3.*or build with version_compatible"),
        ((H100,), "11.4.post1", {}, None),  # as the wheel names it
        ((H100,), "11.5", {"version_compatible": True}, None),
        ((H100,), "11.3", {"version_compatible": True}, r"this is 11\.3\.\s+Build it again with this release"),
        ((H100,), "12.0", {"version_compatible": True}, r"was built with TensorRT 11\.4; this is 12\.0"),
        (
            (environment.Gpu("NVIDIA L4", "8.9", 24.0),),
            "11.4",
            {},
            r"built for NVIDIA H100 \(compute capability 9\.0\); this is NVIDIA L4",
        ),
        ((environment.Gpu("NVIDIA L4", "8.9", 24.0),), "11.4", {"hardware_compatible": "ampere_plus"}, None),
        (
            (environment.Gpu("NVIDIA T4", "7.5", 16.0),),
            "11.4",
            {"hardware_compatible": "ampere_plus"},
            r"for GPUs of compute capability 8\.0 or newer; this is NVIDIA T4 \(7\.5\)",
        ),
        ((environment.Gpu("NVIDIA H200", "9.0", 140.0),), "11.4", {}, "this is NVIDIA H200"),
        (
            (environment.Gpu("NVIDIA H200", "9.0", 140.0),),
            "11.4",
            {"hardware_compatible": "same_compute_capability"},
            None,
        ),
        ((H100,), "11.4", {}, None),
    ],
)
def test_a_plan_stays_at_home(here, version, settings, message, shared_engine, monkeypatch, tmp_path):
    """Another GPU or release is refused before the library sees the plan."""
    backend = backends.get("tensorrt")
    monkeypatch.setattr(environment, "gpus", lambda: here)
    monkeypatch.setattr(backend, "version", lambda: version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    built = {"gpu": {"name": H100.name, "compute_capability": H100.compute_capability}}
    changes = {"backend_version": "11.4", "settings": backend.Settings(**settings).model_dump(), "built": built}
    manifest = shared_engine.manifest.model_copy(update=changes)
    # What passes the gate meets the next one: this machine's torch sees no GPU.
    with pytest.raises(MissingSoftware, match=message or "torch sees no GPU"):
        backend.open_runner(tmp_path, manifest)


def test_plans_of_10_open_in_11_where_built_for_later_ones():
    """The one pair of major versions in TensorRT's support matrix that this project's releases can meet."""
    assert home._opens("10.16.1.11", "11.4.0.106", True)
    assert not home._opens("10.16.1.11", "11.4.0.106", False)
    assert not home._opens("11.0", "10.16", True)
    assert not home._opens("9.3", "10.0", True)
    assert not home._opens("8.6", "11.0", True)


def test_an_audit_plan_that_was_never_hashed_stays_closed(shared_engine, monkeypatch, tmp_path):
    """Plans are code: one that lies beside an engine built without it is nobody's."""
    backend, opened = backends.get("tensorrt"), []
    monkeypatch.setattr(environment, "gpus", lambda: (H100,))
    monkeypatch.setattr(backend, "version", lambda: "11.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime, "open_engine", lambda library, path, *others: opened.append(path.name))
    monkeypatch.setattr(runtime, "Executor", lambda *arguments, **settings: opened.append(settings["device"]))
    (tmp_path / "audit.plan").write_bytes(b"planted")
    [record] = [record for name, record in shared_engine.manifest.files.items() if name == "model.onnx"]
    built = {"gpu": {"name": H100.name, "compute_capability": H100.compute_capability}}
    settings = backend.Settings(audit=False).model_dump()
    changes = {"backend_version": "11.4", "settings": settings, "built": built, "files": {"model.plan": record}}
    runner = backend.open_runner(tmp_path, shared_engine.manifest.model_copy(update=changes))
    with pytest.raises(BadRequest, match=r"has no audit\.plan"):
        runner.audit(np.zeros((1, 3, 96, 96), np.float32))
    assert opened == ["model.plan", "cuda:0"]


@pytest.mark.parametrize("name, config", [("tensorrt", None), ("tensorrt_rtx", ("rtx", "engine", True))])
def test_only_a_portable_librarys_plans_are_opened_with_its_configuration(name, config, shared_engine, monkeypatch):
    backend, made = backends.get(name), []
    monkeypatch.setattr(environment, "gpus", lambda: (H100,))
    monkeypatch.setattr(backend, "version", lambda: "1.7")
    monkeypatch.setattr(Library, "load", lambda self: "rtx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime, "open_engine", lambda *where: "engine")
    monkeypatch.setattr(runtime, "portable_config", lambda trt, engine, recording: (trt, engine, recording))
    monkeypatch.setattr(runtime, "Executor", lambda engine, **settings: made.append((engine, settings)))
    [record] = [record for name, record in shared_engine.manifest.files.items() if name == "model.onnx"]
    settings = backend.Settings(cuda_graph=True).model_dump()
    changes = {"backend_version": "1.7", "settings": settings, "built": {}, "files": {"model.plan": record}}
    backend.open_runner(shared_engine.directory, shared_engine.manifest.model_copy(update=changes))
    [(engine, found)] = made
    assert (engine, found["config"], found["cuda_graph"]) == ("engine", config, True)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(Library, "found", lambda self: None)
    assert backends.get("tensorrt").missing() == "tensorrt"
    assert backends.get("tensorrt_rtx").missing() == "tensorrt-rtx"
    with pytest.raises(MissingSoftware, match="pip install tensorrt-rtx"):
        backends.usable("tensorrt_rtx")
    with pytest.raises(MissingSoftware, match="TensorRT is not installed"):
        STANDARD.load()
    monkeypatch.setattr(Library, "found", lambda self: self.module)
    assert backends.get("tensorrt").missing() is None
    monkeypatch.setattr(environment, "installed", lambda package: None)
    assert backends.get("tensorrt").missing() == "torch"


def test_a_library_that_does_not_load_says_why(monkeypatch, tmp_path):
    (tmp_path / "brokenrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingSoftware, match=r"cannot be loaded: libnvinfer\.so\.11"):
        Library("brokenrt", "brokenrt", "BrokenRT", portable=False).load()


def test_uint8_sessions_take_uint8_tensors(session):
    manifest = session.manifest
    changed = manifest.model_copy(update={"input": manifest.input.model_copy(update={"dtype": "uint8"})})
    pixels = Session(session.directory, changed, session._runner)
    with pytest.raises(BadRequest, match="takes uint8 arrays"):
        pixels.run(torch.zeros(1, 3, 96, 96))
    assert changed.batch == BatchRange(min=1, opt=4, max=8)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "fp8"])
def test_an_engine_runs_on_a_gpu(precision, cuda_graph, model, tmp_path):
    """What no harness can do: the plan runs, from NumPy and from CUDA tensors alike, and passes the gate."""
    if not environment.gpus():
        pytest.skip("running a TensorRT plan needs an NVIDIA GPU and its driver; none was found on this machine")
    if package := backends.get("tensorrt").missing():
        pytest.skip(f"{package} is not installed beside this GPU: pip install {package}")
    gpu = environment.gpus()[0]
    if precision == "fp8" and float(gpu.compute_capability) < 8.9:
        pytest.skip(f"fp8 needs a GPU of compute capability 8.9 or newer; {gpu.name} has {gpu.compute_capability}")
    pruned = ztp.prune(model, ztp.make_plan(model, ratio=0.7))
    graph_precision = backends.get("tensorrt").graph_precision(precision)
    artifact = ztp.export(pruned, "onnx", tmp_path / "a", precision=graph_precision)
    engine = ztp.build(
        artifact,
        "tensorrt",
        precision=precision,
        batch="1:4:8",
        directory=tmp_path / "e",
        settings={"cuda_graph": cuda_graph},
        calibration=tiny.images(8, seed=1),
    )
    assert ztp.check_parity(engine, model, tiny.images(5)).require().passed
    with ztp.load_engine(engine.directory) as session:
        for batch in (1, 8, 3, 3):
            images = tiny.images(batch, seed=batch)
            logits = session.run(torch.from_numpy(images).cuda())
            assert logits.is_cuda
            kept = session.kept()
            np.testing.assert_array_equal(logits.cpu().numpy(), session.run(images))
            assert all(np.array_equal(a, b) for a, b in zip(kept, session.kept(), strict=True))
