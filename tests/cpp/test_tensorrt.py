"""The C++ runtime's TensorRT source over a stand-in for TensorRT-RTX, whose headers no package index has.

This shows what the source does with the calls it makes. It does not show that NVIDIA's libraries answer likewise.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import ztp_deploy as ztp
from tests.cpp import toys
from tests.cpp.conftest import (
    FLAGS,
    HERE,
    SOURCE,
    STRICT,
    build_runtime,
    cmake,
    command,
    program,
    require_tools,
    reseal,
)
from ztp_deploy import environment
from ztp_deploy.backends.tensorrt.home import check_home
from ztp_deploy.backends.tensorrt.library import RTX
from ztp_deploy.backends.tensorrt.settings import Settings
from ztp_deploy.errors import ZtpError
from ztp_deploy.manifest import EngineManifest, read_manifest

pytestmark = pytest.mark.slow

FAKE = HERE / "fake_tensorrt"
VERSION = "1.7.1.116"
GPU = environment.Gpu("Stand-in 0", "9.0", 80.0)
OTHERS = [f"-DZTP_WITH_{name}=OFF" for name in ("OPENVINO", "ONNXRUNTIME", "AOTINDUCTOR")]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A folder like that of TensorRT-RTX, with CUDA's and TensorRT's libraries in it."""
    require_tools()
    root = tmp_path_factory.mktemp("tensorrt_rtx")
    (root / "include").symlink_to(FAKE)
    (root / "lib").mkdir()
    library = root / "lib" / "libtensorrt_rtx.so"
    done = command("g++", *STRICT, "-shared", "-fPIC", f"-Wl,-soname,{library.name}", FAKE / "fake.cpp", "-o", library)
    assert done.returncode == 0, done.stderr
    for name in ("libcudart.so", "libcuda.so.1", "libnvinfer.so"):
        (library.parent / name).symlink_to(library)
    return root


@pytest.fixture(scope="module")
def runtime(stand_in, tmp_path_factory):
    options = ["-DBUILD_SHARED_LIBS=ON", "-DZTP_BUILD_RUN=OFF", *OTHERS, "-DZTP_WITH_TENSORRT=OFF"]
    roots = [f"-DTENSORRT_RTX_ROOT={stand_in}", f"-DCUDA_ROOT={stand_in}", "-DZTP_WITH_TENSORRT_RTX=ON"]
    return build_runtime(tmp_path_factory.mktemp("cpp"), *options, *roots)


@pytest.fixture
def engine(stand_in, shared_engine, tmp_path, monkeypatch):
    """The toy as a plan for the stand-in, and a GPU of its own."""
    monkeypatch.setenv("FAKE_GPUS", "1")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(stand_in / "lib"))  # where the driver is looked for
    return plan(tmp_path / "engine", shared_engine.directory)


def plan(directory, like, dtype="float32", **changes):
    directory.mkdir()
    (directory / "model.plan").write_text(f"toy {dtype} {toys.SIZE} 8\n")
    described = {"backend": "tensorrt_rtx", "device": "cuda", "provider": "TensorRT-RTX", "settings": {}}
    described["backend_version"] = VERSION
    return reseal(directory, like, **described, **toys.interface(dtype), **changes)


def noise(batch):
    return np.random.default_rng(batch).standard_normal((batch, 3, toys.SIZE, toys.SIZE), dtype=np.float32)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_results_come_back_from_the_device(runtime, engine, tmp_path, batch):
    assert runtime.backends == ("tensorrt_rtx",)
    found = runtime.outputs(engine, noise(batch), tmp_path, threads=min(batch, 4))
    logits, kept = toys.expected(noise(batch))
    np.testing.assert_allclose(found.logits, logits, atol=1e-6)
    assert found.kept[0].tolist() == kept.tolist()


def test_pixels_are_bytes_where_the_engine_takes_bytes(runtime, engine, shared_engine, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, toys.SIZE, toys.SIZE), dtype=np.uint8)
    found = runtime.outputs(plan(tmp_path / "uint8", shared_engine.directory, "uint8"), pixels, tmp_path)
    np.testing.assert_allclose(found.logits, toys.expected(pixels)[0], rtol=1e-5)
    other = plan(tmp_path / "other", shared_engine.directory, "uint8")
    (other / "model.plan").write_text(f"toy float32 {toys.SIZE} 8\n")
    reseal(other)
    done = runtime.consume(other, pixels, tmp_path)
    assert done.stderr.startswith("TensorRT-RTX's engine takes no uint8 images, unlike its manifest.")
    assert done.returncode == 2


def test_without_a_gpu_it_is_refused_in_pythons_words(runtime, engine, tmp_path, monkeypatch):
    """Before the library sees the plan, which would end the process."""
    monkeypatch.setenv("FAKE_GPUS", "0")
    monkeypatch.setattr(environment, "gpus", lambda: ())
    with pytest.raises(ZtpError) as caught:
        ztp.load_engine(engine)
    done = runtime.consume(engine, noise(1), tmp_path)
    assert done.stderr.splitlines() == [caught.value.problem, caught.value.fix]
    assert done.returncode == caught.value.exit_code == 3
    assert "runs on cuda, but no NVIDIA GPU was found" in done.stderr


# A third entry: the library's major version and the GPU's where they are others than 1 and 9.
HOMES = {
    "the wheel's name of this version": ({"backend_version": "1.7.1.116.post1"}, None),
    "another version": ({"backend_version": "1.7.1.115"}, "was built with TensorRT-RTX 1.7.1.115; this is 1.7.1.116."),
    "an older one, for later ones": ({"backend_version": "1.6.9", "settings": {"version_compatible": True}}, None),
    "a later one": (
        {"backend_version": "1.8", "settings": {"version_compatible": True}},
        "was built with TensorRT-RTX 1.8; this is 1.7.1.116.",
    ),
    "another major one": (
        {"backend_version": "2.0", "settings": {"version_compatible": True}},
        "was built with TensorRT-RTX 2.0; this is 1.7.1.116.",
    ),
    "another major one that this one takes": (
        {"backend_version": "10.16.1.11", "settings": {"version_compatible": True}},
        None,
        ("11", "9"),
    ),
    "this GPU": ({"built": {"gpu": {"name": "Stand-in 0", "compute_capability": "9.0"}}}, None),
    "another GPU": (
        {"built": {"gpu": {"name": "Other", "compute_capability": "9.0"}}},
        "was built for Other (compute capability 9.0); this is Stand-in 0 (9.0).",
    ),
    "another of the same": (
        {
            "built": {"gpu": {"name": "Other", "compute_capability": "9.0"}},
            "settings": {"hardware_compatible": "same_compute_capability"},
        },
        None,
    ),
    "another capability": (
        {
            "built": {"gpu": {"name": "Other", "compute_capability": "8.6"}},
            "settings": {"hardware_compatible": "same_compute_capability"},
        },
        "was built for Other (compute capability 8.6); this is Stand-in 0 (9.0).",
    ),
    "any GPU": (
        {
            "built": {"gpu": {"name": "Other", "compute_capability": "8.6"}},
            "settings": {"hardware_compatible": "ampere_plus"},
        },
        None,
    ),
    "an older GPU than any": (
        {"settings": {"hardware_compatible": "ampere_plus"}},
        "was built for GPUs of compute capability 8.0 or newer; this is Stand-in 0 (7.0).",
        ("1", "7"),
    ),
}


@pytest.mark.parametrize("home", HOMES)
def test_plans_of_another_home_are_refused_in_pythons_words(runtime, engine, tmp_path, monkeypatch, home):
    changes, said, *other = HOMES[home]
    major, capability = other[0] if other else ("1", "9")
    reseal(engine, **changes)
    monkeypatch.setenv("FAKE_MAJOR", major)
    monkeypatch.setenv("FAKE_CAPABILITY", capability)
    done = runtime.consume(engine, noise(1), tmp_path)
    monkeypatch.setattr(environment, "gpus", lambda: (replace(GPU, compute_capability=f"{capability}.0"),))
    manifest = read_manifest(engine, EngineManifest)
    version = f"{major}{VERSION.removeprefix('1')}"
    question = (engine, manifest, RTX, version, Settings.model_validate(manifest.settings))
    if said is None:
        check_home(*question)
        assert done.returncode == 0, done.stderr
        return
    with pytest.raises(ZtpError) as caught:
        check_home(*question)
    assert caught.value.problem == f"{engine} {said}"
    assert done.stderr.splitlines() == [caught.value.problem, caught.value.fix]
    assert done.returncode == caught.value.exit_code == 3


def linked(runtime, stand_in, name, scratch):
    """A program of the folder of stand-ins, with CUDA's and the runtime's headers and libraries."""
    library = [f"-I{FAKE}", f"-L{stand_in / 'lib'}", "-lcudart", f"-Wl,-rpath,{stand_in / 'lib'}"]
    return program(runtime, HERE / f"{name}.cpp", scratch / name, *library)


def test_a_second_session_speaks_through_the_first_ones_logger(runtime, stand_in, engine, tmp_path):
    """The libraries keep the first logger of a process, which must outlive the session that it came with."""
    broken = plan(tmp_path / "broken", engine)
    (broken / "model.plan").write_text("engine")
    reseal(broken)
    done = command(linked(runtime, stand_in, "sessions", tmp_path), engine, broken)
    assert done.stderr.splitlines() == [
        "TensorRT-RTX: no such plan",
        f"TensorRT-RTX cannot open {broken}/model.plan: see its message above.",
    ]
    assert done.returncode == 2


def test_a_plug_in_that_is_unloaded_leaves_the_logger_behind(runtime, stand_in, engine, tmp_path):
    """As Triton's back ends are; the library that keeps the logger stays, and speaks through it again."""
    broken = plan(tmp_path / "broken", engine)
    (broken / "model.plan").write_text("engine")
    reseal(broken)
    host = tmp_path / "plugin"
    library = [f"-L{stand_in / 'lib'}", "-l:libcudart.so", f"-Wl,-rpath,{stand_in / 'lib'}", "-ldl"]
    built = command("g++", *STRICT, HERE / "plugin.cpp", *library, "-o", host)
    assert built.returncode == 0, built.stderr
    plugin = program(runtime, HERE / "plugin.cpp", tmp_path / "plugin.so", "-DPLUGIN", "-shared", "-fPIC")
    done = command(host, plugin, engine, broken, broken)
    assert done.returncode == 0, done.stderr
    said = ["TensorRT-RTX: no such plan", f"TensorRT-RTX cannot open {broken}/model.plan: see its message above."]
    assert done.stderr.splitlines() == said * 2


@pytest.fixture(scope="module")
def embedded(runtime, stand_in, tmp_path_factory):
    return linked(runtime, stand_in, "embedded", tmp_path_factory.mktemp("embedded"))


def run_embedded(program, engine, batch, scratch, *arguments):
    noise(batch).tofile(scratch / "images.f32")
    return command(program, engine, scratch / "images.f32", batch, *arguments)


def test_what_the_library_says_goes_where_the_program_wants_it(embedded, engine, tmp_path):
    """Warnings too, which by themselves go nowhere: see the second session's test; what only informs is left out."""
    done = run_embedded(embedded, engine, 2, tmp_path, 0)
    assert done.stdout.splitlines() == ["warning: TensorRT-RTX: a toy", *["ran: 2"] * 3]
    assert done.stderr == ""


def test_a_plan_for_later_versions_is_told_to_be_of_another_in_pythons_words(embedded, engine, tmp_path, monkeypatch):
    """As is one that was to be recorded as a CUDA graph."""
    settings = {"version_compatible": True, "cuda_graph": True}
    reseal(engine, backend_version="1.6.9", settings=settings)
    _, version, graph, *ran = run_embedded(embedded, engine, 2, tmp_path, 0).stdout.splitlines()
    directory = engine
    said = f"{directory} was built and checked with tensorrt_rtx 1.6.9; this is {VERSION}. "
    assert version == f"version: {said}Run `ztp selftest --engine {directory}`."
    assert graph.startswith(
        f"cuda_graph: {directory} was built with cuda_graph; this runtime launches kernel by kernel"
    )
    assert ran == ["ran: 2"] * 3


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_contexts_are_made_than_runs_are_allowed(embedded, engine, tmp_path, limit):
    done = run_embedded(embedded, engine, 2, tmp_path, limit, 12)
    *_, different, contexts = done.stdout.splitlines()
    assert different == "different: 0"
    assert 1 <= int(contexts.removeprefix("contexts: ")) <= limit
    free = run_embedded(embedded, engine, 2, tmp_path, 64, 12)  # else the number would say nothing
    assert int(free.stdout.splitlines()[-1].removeprefix("contexts: ")) > 3


def test_a_run_that_fails_makes_room_for_the_next(embedded, engine, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_LOST", "1")
    done = run_embedded(embedded, engine, 2, tmp_path, 1)
    assert done.stdout.splitlines()[1:] == ["refused: CUDA failed to copy outputs: no device."] * 3


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sessions_in_threads_under_sanitizers(stand_in, engine, tmp_path, sanitizer):
    """The whole runtime and the stand-in, whose contexts are fewer than the threads."""
    flags = f"-O1 -g1 -fsanitize={sanitizer} -fno-sanitize-recover=all"
    roots = [f"-DTENSORRT_RTX_ROOT={stand_in}", f"-DCUDA_ROOT={stand_in}", "-DZTP_WITH_TENSORRT_RTX=ON"]
    options = ["-DBUILD_SHARED_LIBS=OFF", "-DZTP_BUILD_RUN=OFF", *OTHERS, "-DZTP_WITH_TENSORRT=OFF"]
    cmake(SOURCE, tmp_path / "build", f"-DCMAKE_CXX_FLAGS={flags}", "-DZTP_STRICT=ON", *options, *roots)
    sources = [HERE / "embedded.cpp", FAKE / "fake.cpp", tmp_path / "build" / "libztp_runtime.a"]
    include = [f"-I{FAKE}", f"-I{SOURCE / 'include'}"]
    built = command("g++", *STRICT, *flags.split(), *include, *sources, "-ldl", "-pthread", "-o", tmp_path / "embedded")
    assert built.returncode == 0, built.stderr
    done = run_embedded(tmp_path / "embedded", engine, 1, tmp_path, 3, 8)
    assert done.returncode == 0, done.stderr
    assert "different: 0" in done.stdout


def test_threads_on_other_devices_run_and_close_an_engine_where_it_was_opened(
    runtime, stand_in, engine, tmp_path, monkeypatch
):
    """What a stand-in made on one device ends the process where it is used on another."""
    monkeypatch.setenv("FAKE_GPUS", "2")
    done = command(linked(runtime, stand_in, "devices", tmp_path), engine)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "opened on 1, run on 0, closed on 0\n"


def test_a_run_that_fails_is_waited_for(runtime, engine, tmp_path, monkeypatch):
    """What a stand-in is still running ends the process where it is destroyed."""
    monkeypatch.setenv("FAKE_LOST", "1")
    done = runtime.consume(engine, noise(2), tmp_path)
    assert done.stderr.startswith("CUDA failed to copy outputs: no device.")
    assert done.returncode == 3


@pytest.mark.parametrize(
    "text, changes, said",
    [
        ("engine", {}, "TensorRT-RTX cannot open {engine}/model.plan: see its message above."),
        (f"toy float32 {toys.SIZE} 4", {}, "TensorRT-RTX's engine takes no batch of 8, unlike its manifest."),
        (
            f"toy float32 {toys.SIZE} 8",
            {"outputs": ["logits"]},
            "TensorRT-RTX's engine has 3 inputs and outputs, the manifest 2.",
        ),
        (
            f"toy float32 {toys.SIZE} 8",
            {"settings": {"strip_plan": True}},
            "This engine's plan was stripped of its weights, which only the Python runtime puts back.",
        ),
    ],
)
def test_plans_unlike_their_manifest_are_refused(runtime, engine, tmp_path, text, changes, said):
    (engine / "model.plan").write_text(text)
    reseal(engine, **changes)
    done = runtime.consume(engine, noise(1), tmp_path)
    assert said.format(engine=engine) in done.stderr.splitlines()
    assert done.returncode == 2


def test_engines_of_the_other_tensorrt_are_refused(runtime, engine, tmp_path):
    reseal(engine, backend="tensorrt")
    done = runtime.consume(engine, noise(1), tmp_path)
    assert done.stderr.splitlines() == [
        "This is an engine for tensorrt; this build of the runtime opens: tensorrt_rtx.",
        "Configure it with -DZTP_WITH_TENSORRT=ON.",
    ]
    assert done.returncode == 3


def configure(stand_in, build, *options):
    roots = [f"-DTENSORRT_ROOT={stand_in}", f"-DCUDA_ROOT={stand_in}"]
    return command("cmake", "-G", "Ninja", "-S", SOURCE, "-B", build, *FLAGS, *OTHERS, *roots, *options)


def test_a_static_runtime_finds_the_libraries_again(stand_in, engine, tmp_path, monkeypatch):
    """Its user asks for ztp alone, and is told nowhere where TensorRT and CUDA are."""
    for name in ("TENSORRT_ROOT", "TENSORRT_RTX_ROOT", "CUDA_ROOT"):
        monkeypatch.delenv(name, raising=False)
    options = ["-DBUILD_SHARED_LIBS=OFF", "-DZTP_BUILD_RUN=OFF", *OTHERS, "-DZTP_WITH_TENSORRT=OFF"]
    roots = [f"-DTENSORRT_RTX_ROOT={stand_in}", f"-DCUDA_ROOT={stand_in}", "-DZTP_WITH_TENSORRT_RTX=ON"]
    static = build_runtime(tmp_path / "static", *options, *roots)
    np.testing.assert_allclose(static.outputs(engine, noise(2), tmp_path).logits, toys.expected(noise(2))[0], atol=1e-6)


def test_a_build_has_room_for_one_of_the_two(stand_in, tmp_path):
    rtx = ["-DZTP_WITH_TENSORRT_RTX=ON", f"-DTENSORRT_RTX_ROOT={stand_in}"]
    done = configure(stand_in, tmp_path, *rtx)
    assert done.returncode != 0
    assert (
        "ZTP_WITH_TENSORRT_RTX=ON was asked for, but there is TensorRT in this build, whose functions have the same "
        "names: set ZTP_WITH_TENSORRT=OFF."
    ) in " ".join(done.stderr.split())


def test_headers_of_one_are_not_taken_for_the_others(stand_in, tmp_path):
    assert configure(stand_in, tmp_path, "-DZTP_WITH_TENSORRT=ON", "-DZTP_BUILD_RUN=OFF").returncode == 0
    done = command("ninja", "-C", tmp_path, "CMakeFiles/ztp_runtime.dir/src/backend_tensorrt.cpp.o")
    assert done.returncode != 0
    assert "NvInfer.h belongs to the other of TensorRT and TensorRT-RTX" in done.stdout
