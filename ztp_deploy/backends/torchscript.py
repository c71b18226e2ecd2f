"""TorchScript, run by torch itself on the CPU or with CUDA."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ztp_deploy.backends import torch_device
from ztp_deploy.backends.base import (
    BuildJob,
    Device,
    OnGpu,
    any_target,
    as_exported,
    needs_its_gpu,
    no_instructions,
    no_tools,
)
from ztp_deploy.errors import DamagedFiles, first_line
from ztp_deploy.manifest import EngineManifest, listed

if TYPE_CHECKING:
    from torch import Tensor

SUMMARY = "TorchScript: torch's own runtime, CPU or CUDA"
FORMAT = "torchscript"
DEVICES: tuple[str, ...] = ("cpu", "cuda")
PRECISIONS: tuple[str, ...] = ("fp32",)
CALIBRATED: tuple[str, ...] = ()
GPU_REPORT: OnGpu | None = None  # the kernels of eager PyTorch, which is in it

missing = torch_device.missing
version = torch_device.version
instructions = no_instructions
tools = no_tools
graph_precision = as_exported
check_target = any_target
unrunnable = needs_its_gpu


class Settings(BaseModel):
    """`threads` 0 leaves torch's own choice; the number holds for the whole process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int = Field(default=0, ge=0, le=1024)


def resolve_device(device: str) -> Device:
    """`auto` takes CUDA where torch sees a GPU, else the CPU."""
    return torch_device.resolve(device, "TorchScript")


def build(job: BuildJob) -> dict[str, Any]:
    """The engine is the graph itself."""
    job.copy_graph()
    return {}


def open_runner(directory: Path, manifest: EngineManifest) -> TorchScriptRunner:
    """Opens `model.ts`, which is code: its hash was checked, load only what you built."""
    from ztp_deploy.exporters.torchscript import GRAPH_FILE

    return TorchScriptRunner(listed(directory, manifest, GRAPH_FILE), manifest)


class TorchScriptRunner:
    """One loaded module; `audited` is its second method."""

    def __init__(self, graph: Path, manifest: EngineManifest) -> None:
        import torch

        torch_device.prepare(manifest.provider)
        threads = Settings(**manifest.settings).threads
        if threads:
            torch.set_num_threads(threads)
        self._manifest = manifest
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch announces TorchScript's retirement
                self._module: Any = torch.jit.load(str(graph), map_location=manifest.provider)
                point_at_device(self._module, manifest.provider)
        except (RuntimeError, ValueError) as error:
            reason = first_line(error)
            raise DamagedFiles(f"torch cannot open {graph}: {reason}.", "Build the engine again.") from error

    def run(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return self._host("forward", images, self._manifest.outputs)

    def run_tensors(self, images: Tensor) -> dict[str, Tensor]:
        """See `EngineRunner`."""
        torch_device.require(images, self._manifest.provider)
        return self._run("forward", images, self._manifest.outputs)

    def audit(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return self._host("audited", images, (*self._manifest.outputs, *self._manifest.audit))

    def close(self) -> None:
        self._module = None

    def _host(self, method: str, images: NDArray[Any], names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        batch = torch_device.tensor_of(images).to(self._manifest.provider)
        return {name: value.cpu().numpy() for name, value in self._run(method, batch, names).items()}

    def _run(self, method: str, images: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        import torch

        with torch.inference_mode():
            return dict(zip(names, getattr(self._module, method)(images), strict=True))


def point_at_device(module: Any, provider: str) -> None:
    """Makes what a trace creates, positions for example, on `provider`: it names the device it was traced on."""
    from ztp_deploy.exporters.torchscript import nodes_of

    for method in ("forward", "audited"):
        for node in nodes_of(module._c._get_method(method).graph):
            if node.kind() == "prim::Constant" and node.output().type().kind() == "DeviceObjType":
                node.s_("value", provider)
