"""The C++ runtime, built once, and engines for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from filelock import FileLock

import ztp_deploy as ztp
from ztp_deploy.manifest import EngineManifest, hash_files, read_manifest, sealed

HERE = Path(__file__).parent
SOURCE = Path(ztp.__file__).parent / "cpp"
PACKAGES = {"g++": "g++", "cmake": "cmake", "ninja": "ninja-build"}
HEADERS = {"nlohmann/json.hpp": "nlohmann-json3-dev", "stb/stb_image.h": "libstb-dev"}
# AMD's quantiser carries the C header of Microsoft's 1.17, unchanged; nothing else of the package is used.
ORT_HEADERS = Path(sys.prefix) / "onnxruntime-headers"
# Fast to compile, still with the warnings that optimising finds, and with lines for valgrind.
FLAGS = ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1 -g1", f"-DPython3_EXECUTABLE={sys.executable}"]

STRICT = ["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"]


def command(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=300, **options)


def cmake(source: Path, build: Path, *definitions: object) -> str:
    """Configures and builds; returns what the configuration said."""
    configured = command("cmake", "-G", "Ninja", "-S", source, "-B", build, *FLAGS, *definitions)
    assert configured.returncode == 0, configured.stdout + configured.stderr
    jobs = min(4, os.cpu_count() or 1)
    built = command("cmake", "--build", build, "-j", jobs)
    assert built.returncode == 0, built.stdout + built.stderr
    return configured.stdout


class Outputs(NamedTuple):
    """What `ztp::Outputs` held."""

    logits: np.ndarray
    kept: list[np.ndarray]
    assignment: list[np.ndarray]


@dataclass(frozen=True)
class Runtime:
    """A built and installed runtime, and the program of tests/cpp/consumer on top of it."""

    build: Path
    prefix: Path
    consumer: Path
    backends: tuple[str, ...]

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """`ztp-run …` from the build tree."""
        return command(self.build / "run" / "ztp-run", *arguments)

    def outputs(self, engine: Path, images: np.ndarray, scratch: Path, *, threads: int = 0) -> Outputs:
        """One run through the installed library."""
        done = self.consume(engine, images, scratch, threads=threads)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["different"] == 0
        batch = len(images)
        return Outputs(
            np.array(found["logits"], np.float32).reshape(batch, found["classes"]),
            *(
                [np.array(stage, np.int32).reshape(batch, -1) for stage in found[name]]
                for name in ("kept", "assignment")
            ),
        )

    def consume(
        self, engine: Path, images: np.ndarray, scratch: Path, *, threads: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """The consumer as a process: prints JSON, or problem and fix on stderr."""
        file = scratch / ("images.u8" if images.dtype == np.uint8 else "images.f32")
        images.tofile(file)
        return command(self.consumer, engine, file, len(images), threads)


def require_tools() -> None:
    """Skips by name where something to build with is missing."""
    for tool, package in PACKAGES.items():
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: apt-get install {package}")
    for header, package in HEADERS.items():
        if command("g++", "-E", "-x", "c++", "-", input=f"#include <{header}>\n").returncode:
            pytest.skip(f"{header} is not installed: apt-get install {package}")


def onnxruntime_header() -> Path | None:
    """The folder of ONNX Runtime's C header: `ORT_ROOT`, else where `make setup` puts it; None where it is not."""
    root = Path(os.environ.get("ORT_ROOT", ORT_HEADERS))
    return next((path.parent for path in root.rglob("onnxruntime_c_api.h")), None)


def build_runtime(scratch: Path, *definitions: object) -> Runtime:
    """Builds with warnings as errors, installs, and builds the consumer against what was installed."""
    said = cmake(SOURCE, scratch / "build", "-DZTP_STRICT=ON", *definitions)
    installed = command("cmake", "--install", scratch / "build", "--prefix", scratch / "prefix")
    assert installed.returncode == 0, installed.stderr
    cmake(HERE / "consumer", scratch / "consumer", f"-DCMAKE_PREFIX_PATH={scratch / 'prefix'}")
    known = ("aotinductor", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")
    found = [name for name in known if f"  {name}: yes" in said]
    return runtime_in(scratch, *found)


def runtime_in(scratch: Path, *backends: str) -> Runtime:
    """What `build_runtime` made of a folder."""
    return Runtime(scratch / "build", scratch / "prefix", scratch / "consumer" / "consumer", backends)


@pytest.fixture(scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """A shared library with what is found here; libtorch has a build of its own, for valgrind's patience."""
    require_tools()
    if find_spec("openvino") is None:
        pytest.skip("openvino is not installed: pip install openvino")
    onnxruntime = f"-DZTP_WITH_ONNXRUNTIME={'ON' if onnxruntime_header() else 'OFF'}"
    triton = ["-DZTP_BUILD_TRITON=ON", f"-DTRITON_ROOT={HERE / 'triton'}"]
    options = ["-DBUILD_SHARED_LIBS=ON", "-DZTP_WITH_OPENVINO=ON", onnxruntime, *triton]
    others = [f"-DZTP_WITH_{name}=OFF" for name in ("AOTINDUCTOR", "TENSORRT", "TENSORRT_RTX")]
    # Processes that run tests beside this one share the build.
    shared = (
        tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else tmp_path_factory.mktemp("cpp")
    )
    built = shared / "runtime.json"
    with FileLock(shared / "runtime.lock"):
        if not built.exists():
            backends = build_runtime(shared / "runtime", *options, *others).backends
            built.write_text(json.dumps(backends), encoding="utf-8")
    return runtime_in(shared / "runtime", *json.loads(built.read_text(encoding="utf-8")))


def program(runtime: Runtime, source: Path, executable: Path, *options: object) -> Path:
    """Compiles one file against the installed runtime."""
    library = [f"-I{runtime.prefix / 'include'}", f"-L{runtime.build}", "-lztp_runtime", f"-Wl,-rpath,{runtime.build}"]
    done = command("g++", *STRICT, source, *options, *library, "-pthread", "-o", executable)
    assert done.returncode == 0, done.stderr
    return executable


def reseal(directory: Path, like: Path | None = None, **changes: object) -> Path:
    """Gives a folder a manifest, that of `like` with changes, which fits its files; any key goes."""
    manifest = json.loads(((like or directory) / "manifest.json").read_text(encoding="utf-8")) | changes
    manifest["files"] = {name: record.model_dump() for name, record in hash_files(directory).items()}
    (directory / "manifest.json").write_bytes(sealed(manifest)[0])
    return directory


@pytest.fixture(scope="session")
def openvino_engine(openvino_engine: ztp.backends.Engine) -> Path:
    """The OpenVINO engine's folder."""
    return openvino_engine.directory


def needs_onnxruntime(runtime: Runtime) -> None:
    """Skips where there was no header to compile the back end with."""
    if "onnxruntime" not in runtime.backends:
        pytest.skip(f"onnxruntime_c_api.h is not in {ORT_HEADERS}: make setup puts it there, or set ORT_ROOT")


@pytest.fixture(params=["openvino", "onnxruntime"])
def back_end(request: pytest.FixtureRequest, runtime: Runtime) -> str:
    """Each back end that the shared library opens."""
    if request.param == "onnxruntime":
        needs_onnxruntime(runtime)
    return str(request.param)


@pytest.fixture
def engine(back_end: str, openvino_engine: Path, shared_engine: ztp.backends.Engine) -> Path:
    """An engine's folder for each of them, from one graph."""
    return {"openvino": openvino_engine, "onnxruntime": shared_engine.directory}[back_end]


@pytest.fixture
def damaged(shared_engine, tmp_path) -> Path:
    """A copy of the ONNX Runtime engine for a test to damage; both languages refuse before they open it."""
    return Path(shutil.copytree(shared_engine.directory, tmp_path / "damaged"))


@pytest.fixture(scope="session")
def prepare(runtime: Runtime, tmp_path_factory) -> Path:
    """A program that writes ztp-run's prepared pixels."""
    names = ("images", "picture", "pnm", "resize")
    objects = [runtime.build / f"run/CMakeFiles/ztp-run.dir/{name}.cpp.o" for name in names]
    executable = tmp_path_factory.mktemp("prepare") / "prepare"
    return program(runtime, HERE / "prepare.cpp", executable, f"-I{SOURCE / 'run'}", *objects)


def manifest_of(directory: Path) -> EngineManifest:
    """An engine's manifest."""
    return read_manifest(directory, EngineManifest)
