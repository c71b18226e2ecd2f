"""AOTInductor: torch's compiler ahead of time, CPU or CUDA; C++ loads the same file.

An engine is `model.pt2`, which holds a shared library: it is code, load only what you built. Its outputs are the
manifest's `outputs`, then its `audit` scores: an audit asks the very code that ships.
"""

from __future__ import annotations

import contextlib
import io
import shlex
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ztp_deploy import environment
from ztp_deploy.backends import torch_device
from ztp_deploy.backends.base import BuildJob, Device, OnGpu, as_exported, needs_its_gpu
from ztp_deploy.backends.cuda_graph import Recorder
from ztp_deploy.errors import BadRequest, BuildFailed, DamagedFiles, MissingSoftware, first_line
from ztp_deploy.manifest import EngineManifest, listed
from ztp_deploy.quiet import quiet

if TYPE_CHECKING:
    from torch import Tensor

SUMMARY = "AOTInductor: compiled by torch ahead of time, CPU or CUDA; runs without Python too"
FORMAT = "torch_export"
DEVICES: tuple[str, ...] = ("cpu", "cuda")
PRECISIONS: tuple[str, ...] = ("fp32", "fp16", "bf16")
CALIBRATED: tuple[str, ...] = ()
GPU_REPORT: OnGpu | None = OnGpu(records=True)
PACKAGE_FILE = "model.pt2"
_CXX_LIBRARY = b"libstdc++.so"
_OPENING_S = 300

missing = torch_device.missing
version = torch_device.version
graph_precision = as_exported
unrunnable = needs_its_gpu


class Settings(BaseModel):
    """How the package is compiled.

    `threads` 0: as many as torch uses where the engine is opened; else that many, compiled in and set for the
    whole process. `max_autotune` tries kernels at the optimal batch and keeps the fastest: a build takes minutes longer.
    `cuda_graph`: on a GPU, record one CUDA graph per batch size when it first comes and replay it. `kernels`: on a GPU,
    stages that have kernels of their own are made of them; false: of torch's operators, as on the CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int = Field(default=0, ge=0, le=1024)
    max_autotune: bool = False
    cuda_graph: bool = False
    kernels: bool = True


def instructions(settings: dict[str, Any]) -> list[str]:
    """All that the compiler may use."""
    return sorted(environment.instruction_flags())


def tools(precision: str, settings: dict[str, Any]) -> dict[str, str]:
    """The C++ compiler."""
    try:
        return {"c++": _compiler()}
    except MissingSoftware:
        return {}


def resolve_device(device: str) -> Device:
    """`auto` takes CUDA where torch sees a GPU, else the CPU."""
    return torch_device.resolve(device, "AOTInductor")


def check_target(device: str, precision: str, settings: dict[str, Any]) -> None:
    """Refuses settings for a GPU on a CPU."""
    if settings["cuda_graph"] and device != "cuda":
        raise BadRequest("cuda_graph=true was asked for on the CPU.", "Leave it out, or build with device=cuda.")
    if not settings["kernels"] and device != "cuda":
        raise BadRequest(
            "kernels=false was asked for on the CPU, where there are none.", "Leave it out, or build with device=cuda."
        )


def build(job: BuildJob) -> dict[str, Any]:
    """Compiles `model.pt2` and reports the instruction set it was compiled for.

    The compiler works in a scratch folder of its own, which goes whatever happens.
    Raises MissingSoftware (no C++ compiler, or one that links what would crash) and BuildFailed (the compiler gave up).
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    from ztp_deploy.exporters.torch_export import GRAPH_FILE, read

    torch_device.prepare(job.device.provider)
    with quiet("torch", errors=True), _scratch(job.directory) as scratch:
        compiler = _compiler()
        program = _placed(read(job.artifact.directory / GRAPH_FILE), job)
        job.advance(0.1)
        package = _compile(program, job, Settings(**job.settings), _sharing(scratch))
        isa = str(pick_vec_isa()) if job.device.name == "cpu" else "none"
    # Through memory: torch's own file writer aborts the process on a full disk.
    (job.directory / PACKAGE_FILE).write_bytes(package)
    _check_opens(job.directory / PACKAGE_FILE, compiler)
    job.advance(0.9)
    return {"compiler": compiler, "isa": isa, "cpu_flags": instructions(job.settings)}


def open_runner(directory: Path, manifest: EngineManifest) -> AotInductorRunner:
    """Opens `model.pt2`, which is code: its hash was checked, load only what you built.

    Raises MissingSoftware where this CPU lacks instructions that the code was compiled for.
    """
    return AotInductorRunner(listed(directory, manifest, PACKAGE_FILE), manifest)


class AotInductorRunner:
    """One loaded package; its code runs one call at a time, further threads wait."""

    def __init__(self, package: Path, manifest: EngineManifest) -> None:
        import torch
        from torch._inductor import aoti_load_package

        environment.require_instructions(manifest.built.get("cpu_flags", ()))
        torch_device.prepare(manifest.provider)
        settings = Settings(**manifest.settings)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self._manifest = manifest
        self._names = (*manifest.outputs, *manifest.audit)
        try:
            with quiet("torch", errors=True):
                # Its bookkeeping for threads asks the device what has ended, which no recording allows.
                self._model: Any = aoti_load_package(
                    str(package),
                    run_single_threaded=settings.cuda_graph,
                    device_index=0 if manifest.device == "cuda" else -1,  # -1: whichever is the thread's own
                )
        except ModuleNotFoundError as error:  # torch's compiler has requirements that torch does not name
            raise MissingSoftware(
                f"torch needs {error.name} to open AOTInductor engines, and it is not installed.",
                f"pip install {error.name}",
            ) from error
        except Exception as error:  # a damaged archive raises anything
            reason = first_line(error)
            raise DamagedFiles(f"torch cannot open {package}: {reason}.", "Build the engine again.") from error
        self._replay = Recorder(self._model) if settings.cuda_graph else None
        self._one_at_a_time = threading.Lock()

    def run(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return self._host(images, self._manifest.outputs)

    def run_tensors(self, images: Tensor) -> dict[str, Tensor]:
        """See `EngineRunner`."""
        torch_device.require(images, self._manifest.provider)
        return self._run(images.contiguous(), self._manifest.outputs)

    def audit(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return self._host(images, self._names)

    def close(self) -> None:
        self._model = self._replay = None

    def _host(self, images: NDArray[Any], names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        batch = torch_device.tensor_of(images).to(self._manifest.provider)
        return {name: value.cpu().numpy() for name, value in self._run(batch, names).items()}

    def _run(self, images: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        import torch

        with torch.inference_mode():
            if self._replay is None:
                return dict(zip(names, self._model(images), strict=False))
            with self._one_at_a_time:  # the recording's buffers are written to by the next call
                values = self._replay(images)
                return {name: value.clone() for name, value in zip(names, values, strict=False)}


def _placed(program: Any, job: BuildJob) -> Any:
    """The program on the job's device, with stages written out for it.

    Traced anew where stages were, where the batch is fixed, or where kernels are tried out at the optimal one.
    """
    import torch
    from torch.export import Dim
    from torch.export.passes import move_to_device_pass

    from ztp_deploy.exporters.torch_export import export_module
    from ztp_deploy.methods.zero_tprune_op import has_kernels, write_out

    span = job.batch
    fixed = span.min == span.max
    module = program.module()
    kernels = job.settings["kernels"] and has_kernels(torch.device(job.device.provider))
    if write_out(module, kernels) or fixed or job.settings["max_autotune"]:
        [example] = program.example_inputs[0]
        # A batch of 1 is a special case to the tracer and would be the only one.
        wanted = span.opt if fixed else max(2, span.opt)
        example = example[:1].expand(wanted, *example.shape[1:]).contiguous()
        batch = None if fixed else Dim("batch", min=span.min, max=max(2, span.max))
        program = export_module(module, example, batch)
    return move_to_device_pass(program, job.device.provider) if job.device.name == "cuda" else program


def _compile(program: Any, job: BuildJob, settings: Settings, sharing: dict[str, Any]) -> bytes:
    from torch._inductor import aoti_compile_and_package

    options: dict[str, Any] = {"max_autotune": settings.max_autotune, **sharing}
    if job.device.name == "cpu":
        options |= {"cpp.threads": settings.threads} if settings.threads else {"cpp.dynamic_threads": True}
    else:  # the host's part computes nothing, and to try out what its vector units can takes most of a minute
        options["cpp.vec_isa_ok"] = False
    buffer = io.BytesIO()
    try:
        aoti_compile_and_package(program, package_path=buffer, inductor_configs=options)
    except OSError:
        raise
    except Exception as error:  # compilers of three languages, each with errors of its own
        raise BuildFailed(
            f"AOTInductor could not compile the program for {job.device.name}: "
            f"{type(error).__name__}: {first_line(error)}.",
            "Try other settings, or another back end (`ztp list`).",
        ) from error
    return buffer.getvalue()


def _compiler() -> str:
    """The C++ compiler's version. Raises MissingSoftware where there is none that works."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        done = subprocess.run([get_cpp_compiler(), "--version"], capture_output=True, text=True, check=True)
    except Exception as error:  # torch's own exception says that none was found
        raise MissingSoftware(
            "AOTInductor compiles C++ and found no working compiler.",
            "Install one (apt-get install g++), or name it in the variable CXX.",
        ) from error
    return done.stdout.splitlines()[0]


def _sharing(scratch: Path) -> dict[str, Any]:
    """Options that make the compiler ask for the C++ library in this process, where it would link a copy instead.

    Two copies in one process may disagree about locales, and the loader of torch 2.11 then crashes at its first
    regular expression.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    own = get_cpp_compiler()
    probe = scratch / "probe.so"
    source = "#include <iostream>\nvoid say() { std::cout << 1; }\n"
    command = [own, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(probe)]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    if done.returncode or _CXX_LIBRARY in probe.read_bytes():
        return {}
    maps = Path("/proc/self/maps").read_text().splitlines()
    loaded = next((line.split(maxsplit=5)[5] for line in maps if _CXX_LIBRARY.decode() in line), None)
    if loaded is None:
        return {}
    wrapper = scratch / "c++"
    # Behind the code and before what the compiler adds by itself: no symbol is left for the copy.
    wrapper.write_text(
        f'#!/bin/sh\ncase " $* " in *" -shared "*) set -- "$@" -x none {shlex.quote(loaded)};; esac\n'
        f'exec {shlex.quote(own)} "$@"\n'
    )
    wrapper.chmod(0o755)
    return {"cpp.cxx": (None, str(wrapper))}


def _check_opens(package: Path, compiler: str) -> None:
    """Raises MissingSoftware where opening the package ends the process: it is tried in another one first.

    Only where the compiler linked the C++ library into the code all the same (`_sharing`).
    """
    with zipfile.ZipFile(package) as archive:
        if all(_CXX_LIBRARY in archive.read(name) for name in archive.namelist() if name.endswith(".so")):
            return
    reason = f"torch crashes when it opens what {compiler} compiled: it holds a copy of the C++ library."
    opening = "import sys; from torch._inductor import aoti_load_package; aoti_load_package(sys.argv[1])"
    try:
        command = [sys.executable, "-c", opening, str(package)]
        code = subprocess.run(command, capture_output=True, check=False, timeout=_OPENING_S).returncode
    except subprocess.TimeoutExpired:
        code, reason = -1, f"torch did not open what {compiler} compiled within {_OPENING_S} s."
    if code < 0:  # by a signal
        raise MissingSoftware(
            reason,
            "Install the shared library for this compiler (libstdc++.so), or name another compiler in the variable CXX.",
        )


@contextlib.contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    """A cache for the compiler beside the engine being made, gone at the end.

    Elsewhere where that path would need quoting: the compiler's command lines are split at spaces.
    """
    from torch._inductor.async_compile import shutdown_compile_workers
    from torch._inductor.utils import fresh_cache

    path = str(directory.resolve())
    beside = path if shlex.quote(path) == path else None
    with tempfile.TemporaryDirectory(dir=beside, prefix="compile-") as folder, fresh_cache(dir=folder):
        try:
            yield Path(folder)
        except BaseException:
            shutdown_compile_workers()  # some may still write there
            raise
