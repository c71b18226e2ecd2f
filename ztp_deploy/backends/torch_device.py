"""torch under the back ends that it runs itself: its version, its devices, and the tensors that engines are given."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ztp_deploy import environment
from ztp_deploy.backends.base import Device, loading
from ztp_deploy.errors import BadRequest, MissingSoftware

if TYPE_CHECKING:
    from torch import Tensor


def missing() -> str | None:
    """`Backend.missing` of the back ends that torch runs."""
    return None if environment.installed("torch") else "torch"


def version() -> str:
    """`Backend.version` of the back ends that torch runs."""
    return environment.installed("torch") or "none"


def resolve(device: str, backend: str) -> Device:
    """`auto` takes CUDA where torch sees a GPU, else the CPU. Raises BadRequest and MissingSoftware."""
    with loading("PyTorch", "torch"):
        import torch

    if device not in ("auto", "cpu", "cuda"):
        raise BadRequest(f"{backend} knows no device {device!r}.", "Use auto, cpu or cuda.")
    found = environment.gpus()
    if device != "cpu" and found and torch.cuda.is_available():
        return Device("cuda", f"cuda-{found[0].slug}", "cuda:0")
    if device == "cuda":
        raise MissingSoftware("device=cuda was asked for, but torch sees no GPU.", "Use device=cpu.")
    return Device("cpu", "cpu", "cpu")


def require(images: Tensor, device: str) -> None:
    """Raises BadRequest for a tensor that does not lie on the engine's device (`cpu`, `cuda:0`)."""
    import torch

    wanted = torch.device(device)
    if images.device.type != wanted.type or wanted.index not in (None, images.device.index):
        raise BadRequest(
            f"This engine takes tensors on {wanted}; got one on {images.device}.",
            "Move it there, or give a NumPy array.",
        )


def first_gpu() -> AbstractContextManager[Any]:
    """GPU 0 as the thread's current device where torch sees one: engines are built, opened and run there."""
    import torch

    return torch.cuda.device(0) if torch.cuda.is_available() else nullcontext()


def tensor_of(images: NDArray[Any]) -> Tensor:
    """A contiguous array as a tensor of the CPU, copied only where others may not write to it."""
    import torch

    return torch.from_numpy(np.require(images, requirements=("C", "W")))


def prepare(provider: str) -> None:
    """Readies the process for engines on `cpu` or `cuda:0`. Raises MissingSoftware where torch sees no GPU."""
    import torch

    if not provider.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        raise MissingSoftware("This engine was built for a GPU and torch sees none.", "Build it again with device=cpu.")
    # TF32 is not the float32 that was checked: convolutions default to it, products may have been set to it. Holds for
    # the process. Through this function for products, since torch takes its flags' mix for an error when it reads them.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
