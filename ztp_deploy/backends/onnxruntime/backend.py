"""ONNX Runtime, on the CPU, with CUDA or with TensorRT-RTX; the provider that really runs is checked."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ztp_deploy import environment
from ztp_deploy.backends import torch_device
from ztp_deploy.backends.base import (
    BuildJob,
    Device,
    OnGpu,
    as_exported,
    loading,
    needs_its_gpu,
    no_instructions,
    no_tools,
)
from ztp_deploy.backends.cuda_graph import Turns
from ztp_deploy.backends.onnxruntime import cuda, rtx
from ztp_deploy.backends.onnxruntime.graph import fuse_attention
from ztp_deploy.errors import BadRequest, DamagedFiles, MissingSoftware, first_line
from ztp_deploy.exporters.files import GRAPH_FILE
from ztp_deploy.manifest import ArtifactManifest, EngineManifest, listed

if TYPE_CHECKING:
    from torch import Tensor

SUMMARY = "ONNX Runtime: CPU everywhere, CUDA where there is a GPU"
FORMAT = "onnx"
DEVICES: tuple[str, ...] = ("cpu", "cuda")
PRECISIONS: tuple[str, ...] = ("fp32", "fp16", "bf16")
CALIBRATED: tuple[str, ...] = ()
GPU_REPORT: OnGpu | None = OnGpu(records=True)
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_LOG_ERRORS_ONLY = 3
_PRECISIONS_OF = {"cpu": ("fp32",), "cuda": ("fp32", "fp16", "bf16")}
# Left to itself, CUDA computes float32 matrix products in TF32, which is not what was checked.
_PROVIDER_OPTIONS: dict[str, dict[str, str]] = {CPU: {}, CUDA: {"use_tf32": "0"}}

instructions = no_instructions
tools = no_tools
graph_precision = as_exported
unrunnable = needs_its_gpu


class Settings(BaseModel):
    """`threads` 0: one per core. `spin_between_runs`: idle threads keep a core busy for a faster wake-up.

    `provider`: the device's own (CPU or CUDA), or on RTX GPUs NVIDIA's plugin for TensorRT-RTX. `operators`: "fused"
    makes attention that no stage reads the library's own operator (fp32 on the CPU) and rewrites more for CUDA's kernels
    (fp16, see `cuda`); "exported" leaves the graph as it was exported. `cuda_graph`: on a GPU, record one CUDA graph per batch
    size when it first comes and replay it; the library keeps them by thread, so serve from one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int = Field(default=0, ge=0, le=1024)
    spin_between_runs: bool = False
    provider: Literal["auto", "tensorrt_rtx"] = "auto"
    operators: Literal["fused", "exported"] = "fused"
    cuda_graph: bool = False


def missing() -> str | None:
    """The pip package to install, of the two that overwrite each other the one for this machine; None when one is here."""
    if environment.installed("onnxruntime-gpu") or environment.installed("onnxruntime"):
        return None
    return "onnxruntime-gpu" if environment.gpus() else "onnxruntime"


def version() -> str:
    """ONNX Runtime's version."""
    return str(_library().__version__)


def _library() -> Any:
    """The imported module. Raises MissingSoftware with the reason."""
    package = "onnxruntime-gpu" if environment.installed("onnxruntime-gpu") else "onnxruntime"
    with loading("ONNX Runtime", package):
        import onnxruntime

    return onnxruntime


def resolve_device(device: str) -> Device:
    """`auto` takes CUDA where both a GPU and the CUDA provider are here, else the CPU."""
    providers = _library().get_available_providers()
    cpu = Device("cpu", "cpu", CPU)
    if device == "cpu":
        return cpu
    if device not in ("auto", "cuda"):
        raise BadRequest(f"ONNX Runtime knows no device {device!r}.", "Use auto, cpu or cuda.")
    found = environment.gpus()
    if found and CUDA in providers:
        return Device("cuda", f"cuda-{found[0].slug}", CUDA)
    if device == "cuda":
        lacks = "no NVIDIA GPU was found" if not found else "this onnxruntime has no CUDA provider"
        fix = "Use device=cpu, or install onnxruntime-gpu." if found else "Use device=cpu."
        raise MissingSoftware(f"device=cuda was asked for, but {lacks}.", fix)
    return cpu


def check_target(device: str, precision: str, settings: dict[str, Any]) -> None:
    """Refuses precisions and settings that the device does not have."""
    asked = Settings(**settings)
    if asked.cuda_graph and (device != "cuda" or asked.provider != "auto"):
        where = "the CPU" if device != "cuda" else f"provider={asked.provider}"
        raise BadRequest(
            f"cuda_graph=true was asked for on {where}.", "Leave it out, or build with device=cuda and provider=auto."
        )
    if asked.provider == "tensorrt_rtx":
        rtx.device()
        if device != "cuda" or precision not in rtx.PRECISIONS:
            raise BadRequest(
                f"provider=tensorrt_rtx computes in {' or '.join(rtx.PRECISIONS)} on cuda (its fp32 may be TF32); "
                f"{precision} on {device} was asked for.",
                f"Use device=cuda and precision={rtx.PRECISIONS[0]}.",
            )
        return
    known = _PRECISIONS_OF[device]
    if precision not in known:
        raise BadRequest(
            f"ONNX Runtime has no {precision} kernels for the {device}: it would compute in fp32 all the same.",
            f"Use precision {known[0]}, or on a CPU the back end openvino, which has bf16 and int8.",
        )


def build(job: BuildJob) -> dict[str, Any]:
    """The engine is a graph."""
    settings = Settings(**job.settings)
    job.copy_graph()
    if settings.provider == "tensorrt_rtx":
        return {"provider": rtx.PROVIDER}
    # On CUDA its float32 may be TF32 whatever is asked, and its bf16 is younger than the releases that are supported.
    if settings.operators == "exported" or job.precision != {"cpu": "fp32", "cuda": "fp16"}[job.device.name]:
        return {}
    if job.device.name == "cuda":
        return cuda.fit(job.directory / GRAPH_FILE)
    fused, unread = fuse_attention(job.directory / GRAPH_FILE)
    return {"attention_fused": fused, "attention_expected": unread}


def open_runner(directory: Path, manifest: EngineManifest) -> OnnxRuntimeRunner:
    """Opens `model.onnx` on the manifest's provider. Raises DamagedFiles and MissingSoftware."""
    return OnnxRuntimeRunner(
        listed(directory, manifest, GRAPH_FILE),
        manifest,
        provider=manifest.provider,
        settings=Settings(**manifest.settings),
    )


def open_unoptimised(directory: Path, manifest: ArtifactManifest) -> OnnxRuntimeRunner:
    """An exported graph run node by node on the CPU: what the file says, before any engine changes it.

    Raises BadRequest for a precision that the CPU has no kernels for.
    """
    if manifest.precision == "bf16":
        raise BadRequest("ONNX Runtime has no bf16 kernels for the CPU.", "Check the engine itself.")
    graph = listed(directory, manifest, GRAPH_FILE)
    return OnnxRuntimeRunner(graph, manifest, provider=CPU, settings=Settings(), optimise=False)


@dataclass(frozen=True)
class _Bound:
    """A run that can be repeated: what it reads and what it writes stay where they are."""

    session: Any
    binding: Any
    options: Any
    images: Tensor
    outputs: dict[str, Tensor]

    def go(self) -> dict[str, Tensor]:
        """Runs, and returns the outputs, which are written to again by the next run."""
        import torch

        if self.images.is_cuda:
            # The library works on a stream of its own, and is done with it when it returns.
            torch.cuda.current_stream(self.images.device).synchronize()
        self.session.run_with_iobinding(self.binding, self.options)
        return self.outputs


class OnnxRuntimeRunner:
    """One InferenceSession, and a second one with the audit scores on first use.

    With `cuda_graph` the library records a run per batch size and calling thread. Replays are of the addresses that
    were recorded: all lie in one set of buffers, and calls come one at a time.
    """

    def __init__(
        self,
        graph: Path,
        manifest: ArtifactManifest | EngineManifest,
        *,
        provider: str,
        settings: Settings,
        optimise: bool = True,
    ) -> None:
        self._graph = graph
        self._manifest = manifest
        self._provider = provider
        self._settings = settings
        self._optimise = optimise
        self._session = self._open(str(graph), recording=settings.cuda_graph)
        self._audit_session: Any = None
        self._auditing = threading.Lock()
        self._recordings: dict[int, _Bound] = {}
        self._buffers: tuple[Tensor, dict[str, Tensor]] | None = None
        self._one_at_a_time = threading.Lock()
        self._turns = Turns()

    def run(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        if not self._settings.cuda_graph:
            return self._run(self._session, images, self._manifest.outputs)

        outputs = self.run_tensors(torch_device.tensor_of(images).to(self._torch_device))
        return {name: value.cpu().numpy() for name, value in outputs.items()}

    def run_tensors(self, images: Tensor) -> dict[str, Tensor]:
        """See `EngineRunner`."""
        torch_device.require(images, self._torch_device)
        if self._settings.cuda_graph:
            with self._one_at_a_time:
                return self._replayed(images)
        return self._bound(images.contiguous(), self._outputs(len(images), images.device)).go()

    def _replayed(self, images: Tensor) -> dict[str, Tensor]:
        count = len(images)
        if self._buffers is None:
            assert isinstance(self._manifest, EngineManifest)
            largest = self._manifest.batch.max
            self._buffers = images.new_empty((largest, *images.shape[1:])), self._outputs(largest, images.device)
        recording = self._recordings.get(count)
        if recording is None:
            held, outputs = self._buffers
            first = {name: value[:count] for name, value in outputs.items()}
            recording = self._recordings[count] = self._bound(held[:count], first, graph=str(count))
        if images.is_cuda:
            self._turns.take(images.device)
        recording.images.copy_(images)
        return {name: value.clone() for name, value in recording.go().items()}

    def _outputs(self, batch: int, device: Any) -> dict[str, Tensor]:
        import torch

        return {
            name: torch.empty((batch, *shape), dtype=dtype, device=device)
            for name, (dtype, shape) in self._shapes.items()
        }

    def _bound(self, images: Tensor, outputs: dict[str, Tensor], graph: str | None = None) -> _Bound:
        """Contiguous images and outputs, bound for a run; `graph` names the CUDA graph that is to be recorded."""
        import onnxruntime as ort

        binding = self._session.io_binding()
        place = (images.device.type, images.device.index or 0)

        def memory(value: Tensor) -> tuple[Any, ...]:
            element = np.dtype(str(value.dtype).removeprefix("torch.")).type
            return *place, element, tuple(value.shape), value.data_ptr()

        binding.bind_input(self._manifest.input.name, *memory(images))
        for name, value in outputs.items():
            binding.bind_output(name, *memory(value))
        options = ort.RunOptions()
        if graph is not None:
            options.add_run_config_entry("gpu_graph_id", graph)
        return _Bound(self._session, binding, options, images, outputs)

    @property
    def _torch_device(self) -> str:
        return "cpu" if self._provider == CPU else "cuda:0"

    def audit(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        with self._auditing:
            if self._session is not None and self._audit_session is None:
                self._audit_session = self._open(self._audited(), recording=False)
        return self._run(self._audit_session, images, (*self._manifest.outputs, *self._manifest.audit))

    def close(self) -> None:
        self._session = self._audit_session = None
        self._recordings.clear()
        self._buffers = None

    @cached_property
    def _shapes(self) -> dict[str, tuple[Any, list[int]]]:
        """By name what an output holds: its torch dtype, and its sides after the batch."""
        import torch

        dtypes = {"tensor(float)": torch.float32, "tensor(int32)": torch.int32}
        found = {value.name: value for value in self._session.get_outputs()}
        return {name: (dtypes[found[name].type], found[name].shape[1:]) for name in self._manifest.outputs}

    def _run(self, session: Any, images: NDArray[Any], names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        values = session.run(list(names), {self._manifest.input.name: np.ascontiguousarray(images)})
        return dict(zip(names, values, strict=True))

    def _audited(self) -> bytes:
        import onnx

        from ztp_deploy.exporters.onnx import with_audit

        # Large weights stay in their file: with them a message would be beyond protobuf's 2 GB.
        model = with_audit(onnx.load(str(self._graph), load_external_data=False), self._manifest.audit)
        return bytes(model.SerializeToString())

    def _open(self, graph: str | bytes, *, recording: bool) -> Any:
        ort = _library()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._settings.threads
        options.log_severity_level = _LOG_ERRORS_ONLY
        if isinstance(graph, bytes):
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(self._graph.parent))
        if not self._settings.spin_between_runs:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if not self._optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if self._provider == CUDA:
            if not environment.gpus():
                raise MissingSoftware(
                    "This engine was built for a GPU and none was found.", "Build it again with device=cpu."
                )
            ort.preload_dlls()
        provider_options = dict(_PROVIDER_OPTIONS.get(self._provider, {}))
        if recording and self._provider == CUDA:
            provider_options["enable_cuda_graph"] = "1"
        providers: Any = [(self._provider, provider_options)]
        if self._provider == rtx.PROVIDER:
            rtx.use(options, self._manifest)
            providers = None  # named here, they would take the place of those in the options
        try:
            session = ort.InferenceSession(graph, options, providers=providers, enable_fallback=0)
        except Exception as error:  # ONNX Runtime raises a dozen unrelated classes
            reason = first_line(error)
            if recording and self._provider == CUDA:
                raise BadRequest(
                    f"ONNX Runtime cannot open {self._graph} with CUDA graphs: {reason}.",
                    "Build it without cuda_graph.",
                ) from error
            raise DamagedFiles(f"ONNX Runtime cannot open {self._graph}: {reason}.", "Build it again.") from error
        running = session.get_providers()[0]
        if running != self._provider:
            raise MissingSoftware(
                f"ONNX Runtime fell back to {running} although {self._provider} was asked for.",
                "Check the CUDA libraries (`ztp doctor`), or build with device=cpu.",
            )
        session.disable_fallback()  # of the Python package, which would run on the CPU after an error
        return session
