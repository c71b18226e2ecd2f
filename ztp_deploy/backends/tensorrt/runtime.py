"""Running a plan: device buffers that stay, one execution at a time, tensors in and out without a host copy."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ztp_deploy.backends import torch_device
from ztp_deploy.backends.cuda_graph import capture
from ztp_deploy.backends.tensorrt.library import Library, captured_log, forwarding_log, sentence, started
from ztp_deploy.errors import BadRequest, DamagedFiles, MissingSoftware, first_line

if TYPE_CHECKING:
    import tensorrt

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}
_ALIGNMENT = 256
"""Bytes; TensorRT takes no address that is not a multiple. torch's own are, views of them need not be."""

_UNFIT = {
    "VERSION_MISMATCH": ("it was built with another release", "Build it again with this release."),
    "UNSUPPORTED_CC": ("it does not support the compute capability of this GPU", "Use the back end onnxruntime."),
    "OLD_CUDA_DRIVER": ("the GPU's driver is too old", "Install a newer driver."),
    "INSUFFICIENT_GPU_MEMORY": ("the GPU's memory is too small", "Free some, or use another GPU."),
}
"""By the library's diagnostic, what keeps a plan from running and what to do."""


def open_engine(library: Library, path: Path, weights: Path | None, host_code: bool = False) -> tensorrt.ICudaEngine:
    """The engine in a plan file; `weights` is the graph that fills a stripped one.

    `host_code`: version-compatible plans carry code for the processor, which the library runs only when told to.

    Only for files whose hash was verified, on a machine with a GPU: without one the library crashes here.
    Raises DamagedFiles and MissingSoftware.
    """
    trt = library.load()
    errors: list[str] = []
    with (
        torch_device.first_gpu(),
        forwarding_log(trt, lambda severity, text: errors.append(text) if "error" in severity else None) as log,
    ):
        runtime: tensorrt.Runtime = started(trt.Runtime, log, library, errors)
        runtime.engine_host_code_allowed = host_code
        plan = path.read_bytes()
        _check_fits(trt, library, runtime, plan, path)
        engine: tensorrt.ICudaEngine = runtime.deserialize_cuda_engine(plan)
        if engine is not None and weights is not None:
            _refit(trt, engine, log, weights, errors)
    if engine is None:
        reason = _reason(errors[:1])
        raise DamagedFiles(
            f"{library.title} {trt.__version__} cannot open {path}: {reason}.",
            "A plan fits the GPU and the version it was built with; build it again on this machine.",
        )
    return engine


def _check_fits(trt: Any, library: Library, runtime: Any, plan: bytes, path: Path) -> None:
    """Raises MissingSoftware where a library that can tell says that the plan is whole, but not for this machine."""
    ask = getattr(runtime, "get_engine_validity", None)  # TensorRT has no such question
    if ask is None:
        return
    validity, found = ask(plan)
    diagnostics = getattr(trt, "EngineInvalidityDiagnostics", None)
    for name, (reason, fix) in _UNFIT.items():
        if validity.name == "INVALID" and found & int(getattr(diagnostics, name, 0)):
            raise MissingSoftware(f"{library.title} {trt.__version__} cannot run {path} here: {reason}.", fix)


def _refit(trt: Any, engine: tensorrt.ICudaEngine, log: tensorrt.ILogger, weights: Path, errors: Sequence[str]) -> None:
    refitter: tensorrt.Refitter = trt.Refitter(engine, log)
    parser: tensorrt.OnnxParserRefitter = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_file(str(weights)) or not refitter.refit_cuda_engine():
        raise DamagedFiles(
            f"The weights in {weights} do not fit the stripped plan: {_reason(errors)}.", "Build the engine again."
        )


def _reason(errors: Sequence[str], otherwise: str = "it gave no reason") -> str:
    """What the library last complained of, in its words."""
    return sentence(errors[-1].splitlines()[0]) if errors else otherwise


def inspect(library: Library, path: Path, host_code: bool = False) -> str:
    """What the engine inspector says of a plan's layers, one a line; needs a GPU."""
    trt = library.load()
    engine = open_engine(library, path, None, host_code)
    inspector: tensorrt.EngineInspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.ONELINE))


def portable_config(trt: Any, engine: Any, cuda_graph: bool) -> Any:
    """How TensorRT-RTX is to run an engine.

    Kernels are finished for a batch size before its first run: by default other ones run meanwhile, and those would be
    what is checked, timed or recorded. CUDA graphs are the library's to record, as it may replace kernels.
    Raises MissingSoftware where this release records none.
    """
    config = engine.create_runtime_config()
    # Looked up by name, since TensorRT has neither.
    if kernels := getattr(trt, "DynamicShapesKernelSpecializationStrategy", None):
        config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER
    if cuda_graph:
        graphs = getattr(trt, "CudaGraphStrategy", None)
        if graphs is None:
            raise MissingSoftware(
                f"cuda_graph=true needs TensorRT-RTX 1.2 or newer; this is {trt.__version__}.",
                "Build without cuda_graph, or install another release.",
            )
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE
    return config


@dataclass
class _Lane:
    """An execution context with the buffers it writes to, and the graph that replays it."""

    context: tensorrt.IExecutionContext
    recordable: bool
    buffers: dict[str, Tensor] = field(default_factory=dict)
    graph: Any = None


class Executor:
    """One plan on one device.

    Calls from several threads wait for each other. Outputs are copied out of the buffers before the next call may
    write to them, so they are the caller's. With `cuda_graph` every batch size gets a context, buffers and a graph
    of its own: a recorded graph is bound to the shapes and addresses it was recorded with. `config` is what contexts
    are made with where the library records by itself.
    """

    def __init__(
        self, engine: tensorrt.ICudaEngine, *, largest: int, device: str, cuda_graph: bool, config: Any = None
    ) -> None:
        self._engine = engine
        self._closed = False
        self._errors: list[str] = []
        self._largest = largest
        self.device = torch.device(device)
        self._cuda_graph = cuda_graph
        self._config = config
        self._lock = threading.Lock()
        self._lanes: dict[int, _Lane] = {}
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.inputs = [name for name in names if engine.get_tensor_mode(name).name == "INPUT"]
        self.outputs = [name for name in names if name not in self.inputs]

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """Images on the device → outputs on the device, in the order of the caller's current stream."""
        with self._lock, captured_log() as self._errors:
            if self._closed:
                raise BadRequest("The session is closed.", "Open the engine again with load_engine.")
            if self._stream is None:
                return self._execute(images, 0)
            caller = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                outputs = self._execute(images, self._stream.cuda_stream)
            # The allocator must not hand this memory to others while either stream still uses it.
            images.record_stream(self._stream)
            for value in outputs.values():
                value.record_stream(caller)
            caller.wait_stream(self._stream)
            return outputs

    def _execute(self, images: Tensor, stream: int) -> dict[str, Tensor]:
        batch = images.shape[0]
        lane = self._lane(images)
        if not self._cuda_graph:
            if images.data_ptr() % _ALIGNMENT:
                images = images.clone()
            self._bind(lane, self.inputs[0], images)
            self._enqueue(lane, stream)
        else:
            lane.buffers[self.inputs[0]].copy_(images)
            if lane.graph is not None:
                lane.graph.replay()
            else:
                # The first run after a change of shape prepares things that cannot be recorded.
                self._enqueue(lane, stream)
                if lane.recordable:
                    lane.graph = self._record(lane, stream)
                    lane.recordable = lane.graph is not None
        return {name: lane.buffers[name][:batch].clone() for name in self.outputs}

    def _lane(self, images: Tensor) -> _Lane:
        """The context for this batch, its shapes and addresses set."""
        batch = images.shape[0]
        key = batch if self._cuda_graph else 0
        lane = self._lanes.get(key)
        if lane is None:
            how = () if self._config is None else (self._config,)
            context = self._engine.create_execution_context(*how)
            if context is None:
                reason = _reason(self._errors, "the GPU's memory is short")
                raise MissingSoftware(f"TensorRT could not set the engine up: {reason}.", "Free memory on the GPU.")
            lane = self._lanes[key] = _Lane(context, recordable=self._config is None)
        if lane.buffers and tuple(lane.context.get_tensor_shape(self.inputs[0])) == tuple(images.shape):
            return lane
        if not lane.context.set_input_shape(self.inputs[0], tuple(images.shape)):
            raise BadRequest(
                f"The engine takes no images of shape {list(images.shape)}: {_reason(self._errors)}.",
                "See its batch range.",
            )
        if not lane.buffers:
            self._allocate(lane, images)
        return lane

    def _allocate(self, lane: _Lane, images: Tensor) -> None:
        """Buffers for the largest batch that this context will see: all of them, or none where memory is short."""
        largest = images.shape[0] if self._cuda_graph else self._largest
        buffers = {self.inputs[0]: torch.empty_like(images)} if self._cuda_graph else {}
        for name in self.outputs:
            shape = tuple(lane.context.get_tensor_shape(name))
            dtype = _DTYPES[self._engine.get_tensor_dtype(name).name]
            buffers[name] = torch.empty((largest, *shape[1:]), dtype=dtype, device=self.device)
        for name, buffer in buffers.items():
            self._bind(lane, name, buffer)
        lane.buffers = buffers

    def _bind(self, lane: _Lane, name: str, memory: Tensor) -> None:
        """Refused, an address leaves the one before in its place: the run would read or write there."""
        if not lane.context.set_tensor_address(name, memory.data_ptr()):
            raise DamagedFiles(
                f"TensorRT did not take the memory for {name}: {_reason(self._errors)}.", "Build the engine again."
            )

    def _enqueue(self, lane: _Lane, stream: int) -> None:
        if not lane.context.execute_async_v3(stream):
            raise DamagedFiles(
                f"TensorRT could not run the engine: {_reason(self._errors)}.", "Build it again on this machine."
            )

    def _record(self, lane: _Lane, stream: int) -> Any:
        """The run as a graph; None where it cannot be recorded, which a warning says."""
        try:
            with capture(self._stream) as graph:
                self._enqueue(lane, stream)
        except (RuntimeError, DamagedFiles) as error:  # torch's own, which may hide the library's
            reason = _reason(self._errors, first_line(error))
            warnings.warn(f"TensorRT runs without a CUDA graph, which could not be recorded: {reason}.", stacklevel=2)
            return None
        return graph

    def close(self) -> None:
        """Frees contexts, buffers and engine, once the device is done with them."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._stream is not None:
                self._stream.synchronize()
            with torch.cuda.stream(self._stream):  # whatever device is the thread's
                self._lanes.clear()
                del self._engine, self._config


class TensorRTRunner:
    """A session's plan and, on first audit, its second plan with the scores."""

    def __init__(
        self, shipped: Executor, audited: Callable[[], Executor], outputs: Sequence[str], audit: Sequence[str]
    ) -> None:
        self._shipped = shipped
        self._open_audit = audited
        self._audited: Executor | None = None
        self._outputs = tuple(outputs)
        self._audit = tuple(audit)
        self._lock = threading.Lock()

    def run(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return self._host(self._shipped, images, self._outputs)

    def run_tensors(self, images: Tensor) -> dict[str, Tensor]:
        """See `EngineRunner`."""
        torch_device.require(images, str(self._shipped.device))
        outputs = self._shipped.run(images.contiguous())
        return {name: outputs[name] for name in self._outputs}

    def audit(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        with self._lock:
            if self._audited is None:
                self._audited = self._open_audit()
        return self._host(self._audited, images, (*self._outputs, *self._audit))

    def close(self) -> None:
        with self._lock:
            self._audited = self._audited or self._shipped  # a late audit opens no plan
            self._shipped.close()
            self._audited.close()

    def _host(self, executor: Executor, images: NDArray[Any], names: Sequence[str]) -> dict[str, NDArray[Any]]:
        batch = torch_device.tensor_of(images).to(executor.device)
        outputs = executor.run(batch)
        return {name: outputs[name].cpu().numpy() for name in names}
