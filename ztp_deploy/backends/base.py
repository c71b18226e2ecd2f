"""`Session`, the one face of an open engine, and what a back end supplies behind it."""

from __future__ import annotations

import math
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from ztp_deploy import environment
from ztp_deploy.errors import BadRequest, GateFailed, MissingSoftware, first_line
from ztp_deploy.exporters import Artifact
from ztp_deploy.manifest import BatchRange, EngineManifest, ImageInput
from ztp_deploy.preprocessing import open_image, transform_for
from ztp_deploy.pruning.assignment import assign

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class Device:
    """Where an engine runs: `name` is cpu or cuda, `slug` names it in folders, `provider` is the library's word."""

    name: str
    slug: str
    provider: str


@dataclass(frozen=True)
class BuildJob:
    """What a back end is asked to build: `artifact`'s graph into files in `directory`, a folder still being made.

    `calibration` are images [M, 3, H, W] for precisions that need some. `advance` takes shares of the
    work done, which add up to 1.
    """

    artifact: Artifact
    directory: Path
    device: Device
    precision: str
    batch: BatchRange
    settings: dict[str, Any]
    calibration: NDArray[Any] | None
    advance: Callable[[float], None]

    def copy_graph(self) -> None:
        """Takes the artifact's files over as they are, for libraries that compile when they open."""
        for file in self.artifact.manifest.files:
            shutil.copyfile(self.artifact.directory / file, self.directory / file)


class Runner(Protocol):
    """What the parity gate asks: a graph opened by something that runs it."""

    def run(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """All outputs of the shipped graph."""

    def audit(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """The same graph's outputs with the stage scores."""


class EngineRunner(Runner, Protocol):
    """An engine opened by its library."""

    def run_tensors(self, images: Tensor) -> dict[str, Tensor]:
        """As `run`, from a tensor on the engine's device to tensors there, without a copy through the host.

        The outputs are the caller's, ready in the order of its current stream. The pixels are not looked at, which
        would make a GPU wait. Raises BadRequest for a tensor that lies elsewhere.
        """

    def close(self) -> None:
        """Frees what the library holds."""


@dataclass(frozen=True)
class OnGpu:
    """How the GPU report takes a back end.

    `built_alone`: its builds time kernels on the GPU, which other work there would falsify. `records`: its engines record
    CUDA graphs themselves (setting `cuda_graph`); what waits for the device or asks it anything in a run cannot be
    recorded from outside.
    """

    built_alone: bool = False
    records: bool = False


class Backend(Protocol):
    """The face of a module in `backends/`."""

    SUMMARY: str
    FORMAT: str
    DEVICES: tuple[str, ...]
    """Of `cpu` and `cuda`, what its engines can run on."""
    PRECISIONS: tuple[str, ...]
    CALIBRATED: tuple[str, ...]
    """Those precisions that are fitted to images."""
    GPU_REPORT: OnGpu | None
    """None where the GPU report leaves it out."""

    @property
    def Settings(self) -> type[BaseModel]:
        """What a user may decide about an engine; a property, since modules have narrower types."""

    def missing(self) -> str | None:
        """The pip package to install, None when the software is here."""

    def version(self) -> str:
        """Version of the engine library."""

    def instructions(self, settings: dict[str, Any]) -> list[str]:
        """Those of this processor's that decide what is built with such settings; none where the library compiles when it opens."""

    def tools(self, precision: str, settings: dict[str, Any]) -> dict[str, str]:
        """What besides the library makes such an engine, by name its version: packages and compilers that are here."""

    def resolve_device(self, device: str) -> Device:
        """`auto`, `cpu` or `cuda` → the device; raises BadRequest and MissingSoftware."""

    def graph_precision(self, precision: str) -> str:
        """The precision of the artifact that an engine of this precision is built from."""

    def check_target(self, device: str, precision: str, settings: dict[str, Any]) -> None:
        """Raises BadRequest and MissingSoftware for what cannot be built for that device: before anything is loaded for it."""

    def build(self, job: BuildJob) -> dict[str, Any]:
        """Writes the engine's files and returns what the manifest should say of them (`built`).

        A `provider` among that takes the place of the device's.
        Raises BadRequest, BuildFailed (the library could not make it), GateFailed (it is not what was asked for) and
        MissingSoftware.
        """

    def unrunnable(self, device: str) -> str | None:
        """Why this machine cannot open an engine for `cpu` or `cuda`, as a sentence; None when it can."""

    def open_runner(self, directory: Path, manifest: EngineManifest) -> EngineRunner:
        """Opens the files of an engine folder; raises DamagedFiles and MissingSoftware."""


# --- answers that several back ends give -------------------------------------------------------


def as_exported(precision: str) -> str:
    """`Backend.graph_precision` of back ends that run the graph in the precision it has."""
    return precision


def any_target(device: str, precision: str, settings: dict[str, Any]) -> None:
    """`Backend.check_target` of back ends that build all they list for every device."""


def no_instructions(settings: dict[str, Any]) -> list[str]:
    """`Backend.instructions` of back ends that choose their kernels when they open, or build for GPUs."""
    return []


def no_tools(precision: str, settings: dict[str, Any]) -> dict[str, str]:
    """`Backend.tools` of back ends whose engines are the artifact's graph, whose versions are recorded."""
    return {}


def needs_its_gpu(device: str) -> str | None:
    """`Backend.unrunnable` of back ends that run on any CPU, and on any GPU that is here."""
    return "no NVIDIA GPU was found" if device == "cuda" and not environment.gpus() else None


@contextmanager
def loading(title: str, package: str) -> Iterator[None]:
    """Around the import of a library that is installed. Raises MissingSoftware with the reason where that fails."""
    try:
        yield
    except (ImportError, OSError) as error:
        raise MissingSoftware(
            f"{title} is installed but cannot be loaded: {first_line(error)}.",
            f"Install it whole: pip install --force-reinstall {package}",
        ) from error


# --- the session -------------------------------------------------------------------------------


class Session:
    """An open engine: `run` images, ask what was `kept`; a context manager.

    `run` may be called from several threads; `kept` answers for the calling thread's last run.
    """

    def __init__(self, directory: Path, manifest: EngineManifest, runner: EngineRunner) -> None:
        self.directory = directory
        self.manifest = manifest
        self._runner = runner
        self._last = threading.local()
        self._closed = False
        self._transform: Any = None

    @property
    def runner(self) -> EngineRunner:
        """What answers with every output by its name: the engine as the parity gate compares it."""
        return self._runner

    @overload
    def run(self, images: NDArray[Any]) -> NDArray[np.float32]: ...

    @overload
    def run(self, images: Tensor) -> Tensor: ...

    def run(self, images: Any) -> Any:
        """Images [B, 3, H, W] (float32 normalised, or uint8 pixels, as the manifest's input says) → logits [B, classes].

        A torch tensor on the engine's device (a CPU tensor for a CPU engine) is answered with one there, without a
        copy through the host and in the order of the caller's stream; on a GPU its pixels are not looked at.
        Raises BadRequest for a wrong dtype, shape or batch, for pixels that are not finite, for a tensor that lies
        elsewhere and where the session is closed.
        """
        self._require_open()
        outputs: Mapping[str, Any]
        self._check(images)
        outputs = self._runner.run_tensors(images.resolve_neg()) if is_tensor(images) else self._runner.run(images)
        self._last.outputs = outputs
        return outputs["logits"]

    def kept(self) -> list[NDArray[np.int32]]:
        """Per stage, the original patch positions [B, k] kept in this thread's last run, ascending.

        -1 stands for a masked slot, patch_tokens + i for a token that stage i made anew from several.
        Raises GateFailed where the engine reports tokens that cannot be, BadRequest before a run.
        """
        plan = self.manifest.plan
        highest = plan.patch_tokens + len(plan.stages) - 1
        found = [np.sort(kept, axis=1) for kept in self._last_outputs("kept")]
        for number, positions in enumerate(found, start=1):
            wrong = positions[(positions < -1) | (positions > highest)]
            twice = (np.diff(positions, axis=1) == 0) & (positions[:, 1:] >= 0)
            if wrong.size or twice.any():
                what = f"position {wrong[0]}" if wrong.size else f"position {positions[:, 1:][twice][0]} twice"
                raise self._broken(f"stage {number} kept {what}, of {plan.patch_tokens} patches")
        return found

    def assignment(self) -> list[NDArray[np.int32]]:
        """Per stage, for every patch [B, n0] the index in `kept()` of the token that carries it, -1 where it is dropped.

        Raises as `kept`.
        """
        self.kept()
        try:
            return assign(self._last_outputs("kept"), self._last_outputs("merged"), self.manifest.plan.patch_tokens)
        except IndexError as error:
            raise self._broken("tokens merged into others that are not there") from error

    def _broken(self, what: str) -> GateFailed:
        return GateFailed(
            f"The engine says that {what}.", f"It is broken: `ztp check --engine {self.directory}` shows where."
        )

    def _require_open(self) -> None:
        if self._closed:
            raise BadRequest("The session is closed.", "Open the engine again with load_engine.")

    def _last_outputs(self, kind: str) -> list[NDArray[np.int32]]:
        if not hasattr(self._last, "outputs"):
            raise BadRequest("Nothing was run yet in this thread.", "Call run(images) first.")
        outputs = [self._last.outputs[name] for name in self.manifest.outputs if name.startswith(f"{kind}_")]
        # Tensors come to the host here and not in `run`, which need not wait for them.
        return [value if isinstance(value, np.ndarray) else value.cpu().numpy() for value in outputs]

    def audit(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Outputs and stage scores of the very same graph, by name; slower than `run`. Raises BadRequest as `run`."""
        self._require_open()
        self._check(images)
        return self._runner.audit(images)

    def preprocess(self, images: Image | NDArray[Any] | Path | str | list[Any] | tuple[Any, ...]) -> NDArray[Any]:
        """Pictures, one or a list of them, → what `run` takes; equals timm's transform for the model.

        A picture is a PIL image, a path, or a uint8 array [H, W, 3] in RGB (OpenCV reads BGR: image[..., ::-1]).
        Raises BadRequest for what is none.
        """
        if self._transform is None:
            self._transform = transform_for(self.manifest.source.preprocessing, self.manifest.input.dtype)
        many = images if isinstance(images, (list, tuple)) else [images]
        if not many:
            raise BadRequest("No image was given.", "Give at least one.")
        return np.stack([self._transform(open_image(image)) for image in many])

    def close(self) -> None:
        """Frees the engine; further runs are refused, what the last one kept can still be asked."""
        if not self._closed:
            self._closed = True
            self._runner.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, images: NDArray[Any] | Tensor) -> None:
        check_images(images, self.manifest.input)
        count, span = len(images), self.manifest.batch
        if not count:
            raise BadRequest("A batch holds at least one image; got none.", "Give at least one.")
        if not span.min <= count <= span.max:
            raise BadRequest(
                f"A batch of {count} is outside this engine's range {span.min} to {span.max}.",
                f"Split it, or build with --batch {min(span.min, count)}:{span.opt}:{max(span.max, count)}.",
            )


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether it is a torch tensor, without importing torch: where nobody has, there is none."""
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    return tensor is not None and isinstance(value, tensor)


def check_images(images: NDArray[Any] | Tensor, wanted: ImageInput) -> None:
    """Raises BadRequest unless these are what an engine of that input takes, but for their number.

    The pixels of tensors on a GPU are not looked at, which would make it wait.
    """
    size = wanted.size
    if isinstance(images, np.ma.MaskedArray):
        raise BadRequest("This engine takes plain arrays; got a masked one.", "Fill it: images.filled(0).")
    known = isinstance(images, np.ndarray) or is_tensor(images)
    dtype = str(images.dtype).removeprefix("torch.") if known else type(images).__name__
    if dtype != wanted.dtype:
        raise BadRequest(
            f"This engine takes {wanted.dtype} arrays [B, 3, {size}, {size}]; got {dtype}.",
            "Use session.preprocess(images), or convert them.",
        )
    if images.ndim != 4 or images.shape[1:] != (3, size, size):
        raise BadRequest(
            f"This engine takes images [B, 3, {size}, {size}]; got {list(images.shape)}.",
            "Use session.preprocess(images).",
        )
    if is_tensor(images):
        if str(images.layout) != "torch.strided":
            raise BadRequest(f"This engine takes dense tensors; got one of {images.layout}.", "Call .to_dense().")
        if images.device.type != "cpu":
            return
        images = images.detach().numpy(force=True)
    # The sum finds every NaN or infinity in one fast pass; only then the slow look decides.
    if wanted.dtype == "float32" and not math.isfinite(float(images.sum())) and not np.isfinite(images).all():
        count = int(images.size - np.isfinite(images).sum())
        raise BadRequest(f"{count} of the pixels are NaN or infinite.", "Check where the images come from.")
