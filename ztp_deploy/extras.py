"""What is installed: the runtime, which serves engines, or with the extra `build` also what makes and checks them."""

from __future__ import annotations

import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from ztp_deploy.errors import MissingSoftware

BUILD_MODULES = (
    *("torch", "torchvision", "timm", "onnx", "onnxscript", "onnx_ir", "polygraphy", "huggingface_hub"),
    *("matplotlib", "jinja2", "sklearn", "scipy", "optuna"),
)
"""What the packages of the extra `build` are imported as; ONNX Runtime, which serves too, is asked for by its back end."""
_INSTALL = 'pip install "ztp_deploy[build]"'


class MissingName(MissingSoftware, AttributeError):
    """A public name that cannot be had here: to `hasattr` and its like it is not there."""


def install() -> str:
    """What to type for the extra `build`, whose ONNX Runtime must not lie beside the CPU's."""
    takes_gpus = sys.platform == "linux" and platform.machine() == "x86_64"
    try:
        version("onnxruntime")
    except PackageNotFoundError:
        return _INSTALL
    return f"pip uninstall onnxruntime; {_INSTALL}" if takes_gpus else _INSTALL


def lacking() -> str | None:
    """The first module that is not installed of those that make and check engines; None where all are."""
    return next((module for module in BUILD_MODULES if find_spec(module) is None), None)


@cache  # what raises is asked again
def require(what: str) -> None:
    """Raises MissingSoftware, saying that `what` needs it, where a module of the extra `build` is not installed."""
    module = lacking()
    if module:
        raise MissingName(*_refusal(what, module))


def refusal(error: ImportError, what: str) -> MissingSoftware | None:
    """The refusal that stands for a failed import, by `what`, of a module of the extra `build`; None for any other."""
    module = (error.name or "").partition(".")[0]
    if module not in BUILD_MODULES or find_spec(module) is not None:
        return None
    return MissingSoftware(*_refusal(what, module))


def _refusal(what: str, module: str) -> tuple[str, str]:
    return f"{what} needs {module}, which is not installed here: serving engines does without it.", install()
